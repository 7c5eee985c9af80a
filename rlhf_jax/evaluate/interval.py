"""95% confidence intervals over N held-out rows, in float64.

The normal quantile is used throughout, so say n beside the interval: for a mean over 10 rows it covers about 92%
rather than 95% (Student's t would widen it by 15%), and from 30 rows on the difference is below a percent of coverage.
"""

import numpy as np

from rlhf_jax.errors import InputError

Z95 = 1.959963984540054  # 97.5th percentile of the standard normal


def mean_ci95(x_N):
    """Interval (lo, hi) of the mean of independent rows, in their unit: mean -+ z s / sqrt(n), s unbiased (n - 1).

    One row says nothing about its spread: (-inf, inf). No rows is an InputError.
    """
    x_N = np.asarray(x_N, np.float64)
    n = x_N.size
    if n == 0:
        raise InputError("mean_ci95: expected at least one row, got none")
    half = Z95 * x_N.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    return float(x_N.mean() - half), float(x_N.mean() + half)


def t95(n):
    """What the unbiased standard deviation of n >= 2 values is times, to be the half-width of their mean's interval.

    By Student's t, for a few seeds.
    """
    import scipy.special  # a fifth of a second

    return float(scipy.special.stdtrit(n - 1, 0.975) / np.sqrt(n))


def paired_gain(after_N, before_N):
    """Mean of after - before on the same N rows, and its interval: (gain, (lo, hi)).

    Differencing first takes out what makes one row harder than another, often most of the spread.
    """
    after_N, before_N = np.asarray(after_N, np.float64), np.asarray(before_N, np.float64)
    if after_N.shape != before_N.shape:
        raise InputError(f"paired_gain: expected the same rows twice, got shapes {after_N.shape} and {before_N.shape}")
    gains_N = after_N - before_N
    interval = mean_ci95(gains_N)
    return float(gains_N.mean()), interval


def wilson(wins, n):
    """Score interval (lo, hi) of a win rate from `wins` of n (Wilson 1927): the rates p that `wins` does not reject,

        |wins / n - p| <= z sqrt(p (1 - p) / n).

    Stays inside [0, 1] and keeps a width at 0 wins, at n wins and at n = 1, where mean -+ z s / sqrt(n) has none.
    `wins` may count a tie as 0.5: a tie has less variance than the p (1 - p) assumed, so the interval is then on the
    wide side.
    """
    if not (n > 0 and 0 <= wins <= n):
        raise InputError(f"wilson: expected n > 0 and 0 <= wins <= n, got wins {wins} of n {n}")
    losses = n - wins
    centre = (wins + Z95**2 / 2) / (n + Z95**2)
    half = Z95 * np.sqrt(wins * losses / n + Z95**2 / 4) / (n + Z95**2)
    # With no wins, or no losses, centre and half-width cancel exactly on paper but not in floats.
    return float(centre - half) if wins else 0.0, float(centre + half) if losses else 1.0
