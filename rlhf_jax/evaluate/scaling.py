"""Over-optimization as a function of d = sqrt(KL) from the first policy (Gao et al. 2022, arXiv 2210.10760, sec. 3.1).

    best of n:                 gain(d) = d (a - b d)        peak at d = a / (2 b)
    reinforcement learning:    gain(d) = d (a - b ln d)     peak at d = exp(a / b - 1)

gain is the gold score minus that of the first policy. Both are linear in (a, b), so a least-squares fit is exact.
"""

import dataclasses

import numpy as np

from rlhf_jax.errors import InputError

RESAMPLES = 1_000
KINDS = ("best_of_n", "rl")


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted curve; its peak is None where the data do not reach it."""

    kind: str  # one of KINDS
    a: float
    b: float
    most: float  # largest d of the data
    peak: float | None = None  # d
    peak_ci95: tuple[float, float] | None = None

    def __call__(self, d):
        """The gain at d > 0."""
        d = np.asarray(d, np.float64)
        return _features(self.kind, d) @ np.array([self.a, self.b])


def fit(kind, kl_N, gain_N, groups_N=None, *, resamples=RESAMPLES, seed=0) -> Fit:
    """The curve of N points (KL in nats, gain in gold), KL > 0, and its peak with a percentile bootstrap.

    groups_N: which points are resampled together, as those of a run or of a prompt; None: each alone. The peak is
    refused (None) where it is beyond the largest d of the data, or where b <= 0 makes the curve rise without end, and
    also where the interval's upper end is such a peak. Raises InputError for fewer than 3 points with different KL.
    """
    kl_N, gain_N = np.asarray(kl_N, np.float64), np.asarray(gain_N, np.float64)
    if kind not in KINDS:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kl_N.shape != gain_N.shape or len(np.unique(kl_N)) < 3 or not (kl_N > 0).all():
        raise InputError(f"fit: expected 3 different KL > 0 or more, and a gain at each, got KL {kl_N.tolist()[:9]}")
    d_N = np.sqrt(kl_N)
    _, group_N = np.unique(np.arange(kl_N.size) if groups_N is None else groups_N, return_inverse=True)
    G = group_N.max() + 1
    # The normal equations of a group of points; those of a resample are a sum of some of them.
    features_N2 = _features(kind, d_N)
    squares_G22, targets_G2 = np.zeros((G, 2, 2)), np.zeros((G, 2))
    np.add.at(squares_G22, group_N, features_N2[:, :, None] * features_N2[:, None, :])
    np.add.at(targets_G2, group_N, features_N2 * gain_N[:, None])

    def solve(rows_G):
        return np.linalg.lstsq(squares_G22[rows_G].sum(axis=0), targets_G2[rows_G].sum(axis=0), rcond=None)[0]

    a, b = solve(np.arange(G))
    rng, peaks = np.random.default_rng(seed), []
    for rows_G in rng.integers(0, G, (resamples, G)):
        if len(np.unique(d_N[np.isin(group_N, rows_G)])) > 1:
            peaks.append(_peak(kind, *solve(rows_G)))
    found, peak = Fit(kind, float(a), float(b), float(d_N.max())), _peak(kind, a, b)
    lo, hi = np.quantile(peaks, (0.025, 0.975), method="nearest")
    if max(peak, hi) > found.most:
        return found
    return dataclasses.replace(found, peak=peak, peak_ci95=(float(lo), float(hi)))


def best_of_n(reward_N, gold_N, n):
    """(mean reward, mean gold) of the best of n by reward, over all C(N, n) subsets of one prompt's N samples.

    In ascending order from i = 0, sample i is the best of C(i, n - 1) subsets, as in evaluate/best_of_n.py. Samples of
    equal reward share their places. Raises InputError unless 1 <= n <= N.
    """
    reward_N, gold_N = np.asarray(reward_N, np.float64), np.asarray(gold_N, np.float64)
    N = reward_N.size
    if not 1 <= n <= N:
        raise InputError(f"best_of_n: expected n from 1 to {N}, the number of scores, got {n}")
    # C(i, n - 1) / C(N, n), each from the next: the binomials of 256 samples have 76 digits.
    shares_N = np.zeros(N)
    shares_N[-1] = n / N
    for i in range(N - 1, n - 1, -1):
        shares_N[i - 1] = shares_N[i] * (i - n + 1) / i
    order_N = np.argsort(reward_N, kind="stable")
    _, tied_N = np.unique(reward_N[order_N], return_inverse=True)
    mean_gold = np.bincount(tied_N, gold_N[order_N]) / np.bincount(tied_N)
    return float(shares_N @ reward_N[order_N]), float(shares_N @ mean_gold[tied_N])


def _features(kind, d_N):
    """What a and b are multiplied by, [N, 2]."""
    return np.stack([d_N, -(d_N**2) if kind == "best_of_n" else -d_N * np.log(d_N)], axis=-1)


def _peak(kind, a, b):
    """Where the curve is highest; inf where it rises without end, 0 where it only falls."""
    if b <= 0:
        return np.inf
    if kind == "best_of_n":
        return max(float(a / (2 * b)), 0.0)
    return float(np.exp(min(a / b - 1, 100.0)))
