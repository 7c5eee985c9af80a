"""The win rate that two models would have at equal lengths: judges like long texts, and so does reward hacking."""

import numpy as np

from rlhf_jax.errors import InputError

RIDGE = 1e-3  # on both coefficients: separable wins have no finite fit without it
STEPS = 50  # most steps of Newton's method, which needs about 10
RESAMPLES = 1_000


def length_controlled(wins_N, length_N, other_N, *, resamples=RESAMPLES, seed=0):
    """(rate, (lo, hi)) in [0, 1], from N prompts: wins (1, 0, or .5 for a tie) and the lengths of both texts.

    The wins are fitted by P(win) = sigmoid(a + b tanh(d / s)), where d is the difference of the lengths and s its root
    mean square; the rate is sigmoid(a), that at d = 0 (AlpacaEval 2, Dubois et al. 2024, arXiv 2404.04475, without its
    term for each prompt's difficulty). Lengths may have any unit. The interval is the 95% percentile bootstrap over
    prompts, the same for the same seed. Without an effect of length it is the plain rate; swapped sides give 1 - rate.

    Raises InputError for fewer than 2 prompts, other shapes, or a win outside [0, 1].
    """
    wins_N = np.asarray(wins_N, np.float64)
    apart_N = np.asarray(length_N, np.float64) - np.asarray(other_N, np.float64)
    if wins_N.ndim != 1 or wins_N.shape != apart_N.shape or wins_N.size < 2:
        raise InputError(f"length_controlled: expected at least 2 prompts, got wins {wins_N.shape} and {apart_N.shape}")
    if not ((wins_N >= 0) & (wins_N <= 1)).all():
        raise InputError("length_controlled: expected wins from 0 to 1")
    rate = _rates(wins_N[None], apart_N[None])[0]
    rows_XN = np.random.default_rng(seed).integers(0, wins_N.size, (resamples, wins_N.size))
    lo, hi = np.quantile(_rates(wins_N[rows_XN], apart_N[rows_XN]), (0.025, 0.975))
    return float(rate), (float(lo), float(hi))


def _rates(wins_XN, apart_XN):
    """The rate at equal lengths of each of X samples of prompts."""
    size_X1 = np.sqrt(np.mean(apart_XN**2, axis=1, keepdims=True))
    x_XN = np.tanh(apart_XN / np.where(size_X1 > 0, size_X1, 1))
    a_X1, b_X1 = np.zeros_like(size_X1), np.zeros_like(size_X1)
    for _ in range(STEPS):
        p_XN = np.exp(-np.logaddexp(0, -(a_X1 + b_X1 * x_XN)))
        error_XN, weight_XN = wins_XN - p_XN, p_XN * (1 - p_XN)
        slope_a = np.sum(error_XN, axis=1, keepdims=True) - RIDGE * a_X1
        slope_b = np.sum(error_XN * x_XN, axis=1, keepdims=True) - RIDGE * b_X1
        aa = np.sum(weight_XN, axis=1, keepdims=True) + RIDGE
        ab = np.sum(weight_XN * x_XN, axis=1, keepdims=True)
        bb = np.sum(weight_XN * x_XN**2, axis=1, keepdims=True) + RIDGE
        size = aa * bb - ab**2
        step_a, step_b = (bb * slope_a - ab * slope_b) / size, (aa * slope_b - ab * slope_a) / size
        # Where the wins are separable a whole step can go too far.
        shrink = np.minimum(1, 2 / np.maximum(np.abs(step_a), np.abs(step_b)).clip(1e-300))
        a_X1, b_X1 = a_X1 + shrink * step_a, b_X1 + shrink * step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-10:
            break
    return np.exp(-np.logaddexp(0, -a_X1))[:, 0]
