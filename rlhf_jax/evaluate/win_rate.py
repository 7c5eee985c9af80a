"""How often one model's score beats another's on the same prompts."""

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.interval import wilson


def win_rate(a_N, b_N):
    """Share of N prompts where `a` scores above `b`, a tie counting one half, and its Wilson interval.

    Returns (rate, (lo, hi)), all in [0, 1]; win_rate(b, a) is the mirror image, (1 - rate, (1 - hi, 1 - lo)).
    Ties make the interval wider than necessary, never narrower. Raises InputError for a NaN score.
    """
    a_N, b_N = np.asarray(a_N), np.asarray(b_N)
    if a_N.shape != b_N.shape:
        raise InputError(f"win_rate: expected scores of the same prompts, got shapes {a_N.shape} and {b_N.shape}")
    if (nan_N := np.isnan(a_N) | np.isnan(b_N)).any():
        raise InputError(f"win_rate: expected scores, got NaN in row {nan_N.argmax()}")
    wins = float(np.sum(a_N > b_N) + 0.5 * np.sum(a_N == b_N))
    interval = wilson(wins, a_N.size)
    return wins / a_N.size, interval
