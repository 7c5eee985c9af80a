"""Over-optimization against curves made by hand, scipy's least squares, and best-of-n by counting subsets."""

import itertools

import numpy as np
import pytest
from scipy import optimize

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import best_of_n, scaling

KL = np.linspace(0.2, 16, 30)
CURVES = {  # a, b, and where the curve is highest
    "best_of_n": (1.2, 0.3, 2.0),
    "rl": (0.9, 0.5, np.exp(0.8)),
}


def curve(kind, a, b, d):
    return d * (a - b * d) if kind == "best_of_n" else d * (a - b * np.log(d))


@pytest.mark.parametrize("kind", CURVES)
def test_a_curve_without_noise_is_found(kind):
    a, b, peak = CURVES[kind]
    found = scaling.fit(kind, KL, curve(kind, a, b, np.sqrt(KL)), resamples=50)
    assert (found.a, found.b, found.peak) == pytest.approx((a, b, peak))
    assert found.peak_ci95 == pytest.approx((peak, peak)) and found.most == 4
    np.testing.assert_allclose(found(np.array([1.0, 3.0])), curve(kind, a, b, np.array([1.0, 3.0])))
    d = np.linspace(0.1, 4, 1000)
    assert d[found(d).argmax()] == pytest.approx(peak, abs=0.01)


@pytest.mark.parametrize("kind", CURVES)
def test_with_noise_it_is_scipys_fit(kind):
    a, b, peak = CURVES[kind]
    d, noise = np.sqrt(KL), np.random.default_rng(0).normal(0, 0.05, KL.size)
    gain = curve(kind, a, b, d) + noise
    found = scaling.fit(kind, KL, gain)
    theirs, _ = optimize.curve_fit(lambda d, a, b: curve(kind, a, b, d), d, gain)
    assert (found.a, found.b) == pytest.approx(tuple(theirs), abs=1e-6)
    assert found.peak_ci95[0] < peak < found.peak_ci95[1]


@pytest.mark.parametrize("kind", CURVES)
def test_a_peak_outside_the_data_is_refused(kind):
    a, b, peak = CURVES[kind]
    short = np.linspace(0.1, (0.8 * peak) ** 2, 30)
    found = scaling.fit(kind, short, curve(kind, a, b, np.sqrt(short)))
    assert (found.peak, found.peak_ci95) == (None, None) and found.a == pytest.approx(a)
    assert scaling.fit(kind, KL, np.sqrt(KL)).peak is None  # it rises without end


def test_a_peak_that_some_resamples_do_not_reach_is_refused():
    gain = curve("best_of_n", 1.2, 0.16, np.sqrt(KL)) + np.random.default_rng(1).normal(0, 0.5, KL.size)
    found = scaling.fit("best_of_n", KL, gain)
    assert 0 < found.a / (2 * found.b) < found.most and found.peak is None


def test_points_of_a_group_are_resampled_together():
    """Ten runs with three points each: as many groups as curves, and the same fit."""
    kl = np.repeat([1.0, 4.0, 9.0], 10)
    runs, noise = np.tile(np.arange(10), 3), np.tile(np.random.default_rng(0).normal(0, 0.3, 10), 3)
    gain = curve("best_of_n", 1.2, 0.3, np.sqrt(kl)) + noise * np.sqrt(kl)
    together, apart = scaling.fit("best_of_n", kl, gain, runs), scaling.fit("best_of_n", kl, gain)
    assert (together.a, together.b, together.peak) == pytest.approx((apart.a, apart.b, apart.peak))
    width = [fit.peak_ci95[1] - fit.peak_ci95[0] for fit in (together, apart)]
    assert width[0] != pytest.approx(width[1], rel=0.1)
    equal = scaling.fit("best_of_n", kl, gain - noise * np.sqrt(kl), runs)
    assert equal.peak_ci95 == pytest.approx((2, 2))


@pytest.mark.parametrize(("kl", "gain"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([0, 1, 2], [1, 2, 3])])
def test_too_little_data(kl, gain):
    with pytest.raises(InputError, match="expected 3 different KL > 0"):
        scaling.fit("rl", kl, gain)


def test_an_unknown_kind():
    with pytest.raises(InputError, match="kind: expected one of best_of_n, rl, got 'x'"):
        scaling.fit("x", KL, KL)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_the_best_of_n_by_counting_subsets(n):
    rng = np.random.default_rng(n)
    reward, gold = rng.normal(size=7), rng.normal(size=7)
    best = [max(subset, key=lambda i: reward[i]) for subset in itertools.combinations(range(7), n)]
    expected = np.mean(reward[best]), np.mean(gold[best])
    assert scaling.best_of_n(reward, gold, n) == pytest.approx(expected)
    assert scaling.best_of_n(reward, reward, n)[1] == pytest.approx(best_of_n.best_of_n(reward, n)[0])


def test_equal_rewards_share_their_place():
    """Of two equal best ones, each is chosen half of the time, in any order."""
    assert scaling.best_of_n([1, 1, 0], [0.2, 0.8, 0.0], 3) == pytest.approx((1, 0.5))
    assert scaling.best_of_n([0, 1, 1], [0.0, 0.8, 0.2], 2) == pytest.approx((1, 0.5))


def test_the_best_of_256_of_1024():
    reward = np.arange(1024.0)
    assert scaling.best_of_n(reward, reward, 256)[0] == pytest.approx(256 * 1025 / 257 - 1)  # of order statistics
