"""Whether one of k completions is right."""

import math

import numpy as np

from rlhf_jax.errors import InputError


def pass_at_k(right_NO, k):
    """Probability [N] that one of k completions of a prompt is right, from O >= k completions of each of N prompts.

        1 - C(O - c, k) / C(O, k),    c of O completions are right

    Unbiased: a mean over all subsets of k (Chen et al. 2021, arXiv 2107.03374, eq. 1). Raises InputError unless
    1 <= k <= O.
    """
    right_NO = np.asarray(right_NO, bool)
    O = right_NO.shape[1]  # noqa: E741 (the axis)
    if not 1 <= k <= O:
        raise InputError(f"pass_at_k: expected k from 1 to {O}, the number of completions, got {k}")
    return np.array([1 - math.comb(O - int(c), k) / math.comb(O, k) for c in right_NO.sum(axis=1)])
