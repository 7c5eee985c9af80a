"""Whether a reward model's margins mean what they say: P(chosen is preferred) = sigmoid(r_chosen - r_rejected)."""

import numpy as np

from rlhf_jax.errors import InputError

BINS = 10  # of the confidence, of equal width between .5 and 1
SCALES = (1e-3, 1e3)  # least and largest temperature


def brier(margin_N):
    """Mean of (1 - P)^2 over N pairs, in [0, 1], where P is the probability of the label (Brier 1950). .25: a coin."""
    margin_N = _margins(margin_N)
    return float(np.mean(_sigmoid(-margin_N) ** 2))


def ece(margin_N, bins=BINS):
    """Expected calibration error in [0, .5] (Naeini et al. 2015; Guo et al. 2017, eq. 3).

    A pair's confidence is that of the more likely answer, max(P, 1 - P), in [.5, 1]. The error is the mean distance of
    a bin's accuracy from its mean confidence, weighted by its pairs. A tie counts one half. Few pairs make it large by
    chance alone: about .1 for 50 pairs.
    """
    margin_N = _margins(margin_N)
    confidence_N, right_N = _sigmoid(np.abs(margin_N)), np.where(margin_N == 0, 0.5, margin_N > 0)
    place_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    apart = [abs(np.sum(right_N[place_N == b] - confidence_N[place_N == b])) for b in range(bins)]
    return float(np.sum(apart) / margin_N.size)


def temperature(margin_N):
    """T that makes -mean log sigmoid(margin / T) smallest (Guo et al. 2017, section 4.2), in [.001, 1000].

    Above 1 the model is over-confident, below 1 it could say more. The loss is convex in 1 / T: its slope is bisected.
    """
    margin_N = _margins(margin_N)
    least, most = 1 / SCALES[1], 1 / SCALES[0]
    for _ in range(100):
        middle = np.sqrt(least * most)
        rises = np.mean(margin_N * _sigmoid(-middle * margin_N)) < 0  # minus the slope of the loss in 1 / T
        least, most = (least, middle) if rises else (middle, most)
    return float(1 / np.sqrt(least * most))


def _margins(margin_N):
    margin_N = np.asarray(margin_N, np.float64)
    if margin_N.size == 0 or np.isnan(margin_N).any():
        raise InputError("calibration: expected margins of at least one pair, without NaN")
    return margin_N


def _sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))
