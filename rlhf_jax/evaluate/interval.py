"""95% confidence intervals over N held-out rows, in float64.

All intervals but t95's use the normal quantile, so report n beside the interval. A mean over 10 rows is covered in
about 92% of cases, not 95% (Student's t interval is 15% wider); from 30 rows on the coverage is above 94%.
"""

import numpy as np

from rlhf_jax.errors import InputError

Z95 = 1.959963984540054  # 97.5th percentile of the standard normal


def mean_ci95(x_N):
    """Interval (lo, hi) of the mean of independent rows, in their unit: mean +- z s / sqrt(n), with the unbiased s.

    One row has no spread to estimate: (-inf, inf). Raises InputError for no rows.
    """
    x_N = np.asarray(x_N, np.float64)
    n = x_N.size
    if n == 0:
        raise InputError("mean_ci95: expected at least one row, got none")
    half = Z95 * x_N.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    return float(x_N.mean() - half), float(x_N.mean() + half)


def t95(n):
    """Factor c such that mean +- c s is the 95% Student-t interval of n >= 2 values: for a few seeds.

    s is the values' unbiased standard deviation.
    """
    import scipy.special  # a fifth of a second

    return float(scipy.special.stdtrit(n - 1, 0.975) / np.sqrt(n))


def paired_gain(after_N, before_N):
    """Mean of after - before on the same N rows, in their unit, and its interval: (gain, (lo, hi)).

    The difference removes how hard each row is, which is often most of the spread. Raises InputError for other shapes.
    """
    after_N, before_N = np.asarray(after_N, np.float64), np.asarray(before_N, np.float64)
    if after_N.shape != before_N.shape:
        raise InputError(f"paired_gain: expected the same rows twice, got shapes {after_N.shape} and {before_N.shape}")
    gains_N = after_N - before_N
    interval = mean_ci95(gains_N)
    return float(gains_N.mean()), interval


def wilson(wins, n):
    """Score interval (lo, hi) of the rate of `wins` in n (Wilson 1927): the rates p that the wins do not reject,

        |wins / n - p| <= z sqrt(p (1 - p) / n).

    It is inside [0, 1], and has a positive, finite width at 0 wins, at n wins and at n = 1, where mean +- z s / sqrt(n)
    has none. `wins` may count a tie as 0.5. Ties have less variance than p (1 - p), so the interval is then too wide,
    never too narrow. Raises InputError for impossible counts.
    """
    if not (n > 0 and 0 <= wins <= n):
        raise InputError(f"wilson: expected n > 0 and 0 <= wins <= n, got wins {wins} of n {n}")
    losses = n - wins
    centre = (wins + Z95**2 / 2) / (n + Z95**2)
    half = Z95 * np.sqrt(wins * losses / n + Z95**2 / 4) / (n + Z95**2)
    # With no wins, or no losses, centre and half-width cancel exactly on paper but not in floats.
    return float(centre - half) if wins else 0.0, float(centre + half) if losses else 1.0
