"""Best-of-n sampling: the best of n samples of a policy, the baseline of every trained policy."""

import math

import numpy as np

from rlhf_jax.errors import InputError


def best_of_n(score_N, n):
    """(mean score of the best of n, its KL from the policy in nats), from N >= n scores of one prompt's samples.

    The mean is over all C(N, n) subsets of n scores: in ascending order from i = 0, score i is the best of C(i, n - 1)
    of them. KL = log n - (n - 1) / n, exact if no two samples are equal, else an upper bound (Stiennon et al. 2020,
    app. G.3). Raises InputError unless 1 <= n <= N.
    """
    score_N = np.sort(np.asarray(score_N, np.float64))
    N = score_N.size
    if not 1 <= n <= N:
        raise InputError(f"best_of_n: expected n from 1 to {N}, the number of scores, got {n}")
    shares_N = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    return float(shares_N @ score_N), math.log(n) - (n - 1) / n


def curve(score_N):
    """[(n, score, KL in nats)] for n = 1, 2, 3, 4, 6, 8, ... up to N / 10: above it, a few lucky samples decide."""
    sizes = sorted({round(2 ** (i / 2)) for i in range(40)})
    return [(n, *best_of_n(score_N, n)) for n in sizes if n <= max(len(score_N) // 10, 1)]


def at_kl(score_N, kl):
    """Mean score of best-of-n at a KL in nats, linear between the points of `curve`, constant outside them."""
    _, scores, nats = zip(*curve(score_N), strict=True)
    return float(np.interp(kl, nats, scores))
