"""Intervals of numbers that have two sources of chance: the seed of a run and the prompts that it is measured on."""

import numpy as np

from rlhf_jax.errors import InputError

RESAMPLES = 2_000


def two_level(values_KN, *, statistic=np.mean, resamples=RESAMPLES, seed=0):
    """(statistic of all values, its 95% interval) of K runs on the same N prompts, by the percentile bootstrap.

    Each resample draws K runs and then N prompts of each, with replacement: prompts lie within seeds (Davison and
    Hinkley 1997, section 3.8). One run is a bootstrap over its prompts alone. With few seeds the interval is too narrow
    by about sqrt(1 - 1 / K): three seeds cover about 85%. Raises InputError for no values.
    """
    values_KN = np.asarray(values_KN, np.float64)
    if values_KN.ndim != 2 or values_KN.size == 0:
        raise InputError(f"two_level: expected values [runs, prompts], got shape {values_KN.shape}")
    K, N = values_KN.shape
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        runs_K = rng.integers(0, K, K)
        draws.append(statistic(values_KN[runs_K[:, None], rng.integers(0, N, (K, N))]))
    lo, hi = np.quantile(draws, (0.025, 0.975))
    return float(statistic(values_KN)), (float(lo), float(hi))


def iqm(values):
    """The interquartile mean: the mean of the middle half of all values (Agarwal et al. 2021, arXiv 2108.13264).

    Where a quarter of the values is no whole number, the values at its edges count in part.
    """
    values = np.sort(np.ravel(np.asarray(values, np.float64)))
    n = values.size
    # Value i covers i / n to (i + 1) / n; its weight is the share of that within the middle half.
    edges = np.arange(n + 1) / n
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return float(weights @ values / weights.sum())


def stratified(values_MK, *, statistic=iqm, resamples=RESAMPLES, seed=0):
    """(statistic, its 95% interval) of M tasks with K runs each: runs are drawn anew within each task.

    values_MK: normalized numbers, so that tasks can be averaged (Agarwal et al. 2021, section 4.3). Raises InputError
    for fewer than 2 tasks or 5 runs, where the interval says too little.
    """
    values_MK = np.asarray(values_MK, np.float64)
    if values_MK.ndim != 2 or values_MK.shape[0] < 2 or values_MK.shape[1] < 5:
        raise InputError(f"stratified: expected at least 2 tasks x 5 seeds, got shape {values_MK.shape}")
    M, K = values_MK.shape
    runs = np.random.default_rng(seed).integers(0, K, (resamples, M, K))
    lo, hi = np.quantile([statistic(np.take_along_axis(values_MK, each, axis=1)) for each in runs], (0.025, 0.975))
    return float(statistic(values_MK)), (float(lo), float(hi))
