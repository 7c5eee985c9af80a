"""Intervals of numbers that have two sources of chance: the seed of a run and the prompts that it is measured on."""

import math

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import interval

RESAMPLES = 2_000
CHUNK = 10_000_000  # values resampled at a time


def two_level(values_KN, *, resamples=RESAMPLES, seed=0):
    """(mean of all values, its 95% interval) of K runs on N prompts each, by the percentile bootstrap.

    Each resample has K runs and then N prompts of each, both with replacement: prompts lie within seeds (Davison and
    Hinkley 1997, section 3.8). One run is a bootstrap over its prompts alone. Of several, the distance from the mean to
    either end is multiplied by sqrt(K / (K - 1)) t / 1.96, with Student's t of K - 1 degrees of freedom, as K resampled
    runs show sqrt(1 - 1 / K) of their spread (Hesterberg 2015, arXiv 1411.5279, section 3). Where seeds differ as much
    as prompts do, it covers .95 to .97 with 3 runs and .94 with 20 (a test); where they do not differ, more. Raises
    InputError for no values or a NaN.
    """
    values_KN = np.asarray(values_KN, np.float64)
    if values_KN.ndim != 2 or values_KN.size == 0:
        raise InputError(f"two_level: expected values [runs, prompts], got shape {values_KN.shape}")
    if np.isnan(values_KN).any():
        raise InputError(
            f"two_level: expected values, got NaN in run {int(np.isnan(values_KN).any(axis=1).argmax()) + 1}"
        )
    K, N = values_KN.shape
    rng, means = np.random.default_rng(seed), []
    for size in _parts(resamples, K * N):
        runs_XK1 = rng.integers(0, K, (size, K, 1))
        means.append(values_KN[runs_XK1, rng.integers(0, N, (size, K, N))].mean(axis=(1, 2)))
    mean, ends = float(values_KN.mean()), _ends(means)
    if K == 1:
        return mean, ends
    wider = interval.t95(K) * K / (interval.Z95 * math.sqrt(K - 1))
    lo, hi = (mean + wider * (end - mean) for end in ends)
    return mean, (max(lo, float(values_KN.min())), min(hi, float(values_KN.max())))  # no mean is outside its values


def iqm(values, axis=None):
    """The interquartile mean: the mean of the middle half of the values (Agarwal et al. 2021, arXiv 2108.13264).

    axis: the last axes of the array that are taken together; None: all. Where a quarter of the values is no whole
    number, the values at its edges count in part.
    """
    values = np.asarray(values, np.float64)
    kept = values.shape[: values.ndim - (values.ndim if axis is None else axis)]
    values = np.sort(values.reshape(*kept, -1), axis=-1)
    n = values.shape[-1]
    # Value i covers i / n to (i + 1) / n; its weight is the share of that within the middle half.
    edges = np.arange(n + 1) / n
    weights = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return values @ weights / weights.sum()


def stratified(values_MK, *, resamples=RESAMPLES, seed=0):
    """(interquartile mean, its 95% interval) of M tasks with K runs each: runs are resampled within each task.

    values_MK: normalized numbers, so that tasks can be averaged (Agarwal et al. 2021, section 4.3). Raises InputError
    for fewer than 2 tasks or 5 runs, where the interval says too little.
    """
    values_MK = np.asarray(values_MK, np.float64)
    if values_MK.ndim != 2 or values_MK.shape[0] < 2 or values_MK.shape[1] < 5:
        raise InputError(f"stratified: expected at least 2 tasks x 5 seeds, got shape {values_MK.shape}")
    M, K = values_MK.shape
    rng, found = np.random.default_rng(seed), []
    for size in _parts(resamples, M * K):
        runs_XMK = rng.integers(0, K, (size, M, K))
        found.append(iqm(values_MK[np.arange(M)[:, None], runs_XMK], axis=2))
    return float(iqm(values_MK)), _ends(found)


def _parts(resamples, size):
    """Numbers of resamples of `size` values that fit in memory together."""
    most = max(CHUNK // size, 1)
    return [min(most, resamples - start) for start in range(0, resamples, most)]


def _ends(parts):
    lo, hi = np.quantile(np.concatenate(parts), (0.025, 0.975))
    return float(lo), float(hi)
