import numpy as np
import pytest
from scipy import stats

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import bootstrap, interval


def test_one_run_is_scipys_bootstrap():
    x_N = np.random.default_rng(0).normal(1, 2, 60)
    mean, (lo, hi) = bootstrap.two_level(x_N[None], resamples=4_000)
    theirs = stats.bootstrap((x_N,), np.mean, method="percentile", n_resamples=4_000, rng=1).confidence_interval
    assert mean == pytest.approx(x_N.mean())
    assert (lo, hi) == pytest.approx(tuple(theirs), abs=0.05)


def test_runs_that_differ_widen_it():
    """Prompts that all score the same leave the three runs' means alone: 1 of 27 resamples is (0, 0, 0)."""
    mean, (lo, hi) = bootstrap.two_level(np.array([[0.0] * 50, [1.0] * 50, [5.0] * 50]))
    assert (mean, lo, hi) == (2, 0, 5)
    assert bootstrap.two_level(np.ones((3, 4))) == (1, (1, 1))


def test_how_much_the_bootstrap_over_runs_is_widened(monkeypatch):
    """Five runs: t = 2.7764 of four degrees of freedom, and sqrt(5 / 4); one run: not at all."""
    monkeypatch.setattr(bootstrap, "_ends", lambda parts: (0.4, 0.7))
    values = np.tile([0.0, 1.0], (5, 5))  # mean .5
    factor = 2.7764 / 1.96 * np.sqrt(5 / 4)
    _, ends = bootstrap.two_level(values, resamples=1)
    assert ends == pytest.approx((0.5 - 0.1 * factor, 0.5 + 0.2 * factor), abs=1e-4)
    assert bootstrap.two_level(values[:1], resamples=1)[1] == (0.4, 0.7)


def test_it_is_reproducible_and_its_parts_do_not_matter(monkeypatch):
    values = np.random.default_rng(1).random((3, 20))
    assert bootstrap.two_level(values, resamples=50) == bootstrap.two_level(values, resamples=50)
    assert bootstrap.two_level(values, resamples=50) != bootstrap.two_level(values, resamples=50, seed=1)
    monkeypatch.setattr(bootstrap, "CHUNK", 60 * 7)
    assert bootstrap._parts(50, 60) == [7] * 7 + [1]
    mean, (lo, hi) = bootstrap.two_level(values, resamples=50)
    assert lo < mean < hi


def test_iqm_by_hand():
    assert bootstrap.iqm([0, 1, 2, 100]) == 1.5
    # of 6 values, 1.5 are cut on each side: half of 1, all of 2 and 3, half of 4
    assert bootstrap.iqm([0, 1, 2, 3, 4, 99]) == pytest.approx((0.5 + 2 + 3 + 0.5 * 4) / 3)
    x = np.random.default_rng(2).random((3, 5, 8))
    assert bootstrap.iqm(x) == pytest.approx(stats.trim_mean(x.ravel(), 0.25))
    np.testing.assert_allclose(bootstrap.iqm(x, axis=2), [stats.trim_mean(each.ravel(), 0.25) for each in x])


def test_stratified_resamples_within_tasks():
    """Tasks of equal runs have nothing to resample."""
    value, ends = bootstrap.stratified(np.repeat([[0.0], [1.0]], 5, axis=1), resamples=20)
    assert value == 0.5 and ends == (0.5, 0.5)
    _, (lo, hi) = bootstrap.stratified(np.array([[0.0, 1, 2, 3, 4], [10.0, 11, 12, 13, 14]]), resamples=200)
    assert 4 < lo < 7 < hi < 10


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3)])
def test_no_values(values):
    with pytest.raises(InputError, match="expected values"):
        bootstrap.two_level(values)
    with pytest.raises(InputError, match="2 tasks x 5 seeds"):
        bootstrap.stratified(values)


def test_nan_is_named():
    with pytest.raises(InputError, match="got NaN in run 2"):
        bootstrap.two_level([[0.0, 1.0], [np.nan, 1.0]])


# Coverage: how many of 2,000 intervals hold the truth, where nothing else is said. Its own standard error is .005.

DRAWS = 2_000


@pytest.mark.parametrize(("n", "draws", "least"), [(30, DRAWS, 0.92), (500, 500, 0.93)])
def test_the_bootstrap_over_prompts_holds_the_truth(n, draws, least):
    """The percentile interval of the mean of 30 is narrower than Student's by a twentieth."""
    wins_DN = np.random.default_rng(n).random((draws, n)) < 0.7
    ends = [bootstrap.two_level(wins_N[None], resamples=200, seed=i)[1] for i, wins_N in enumerate(wins_DN)]
    assert least <= np.mean([lo <= 0.7 <= hi for lo, hi in ends]) <= 0.97


@pytest.mark.parametrize("K", [3, 20])
def test_the_bootstrap_over_seeds_and_prompts_holds_the_truth(K):
    """Runs of standard deviation 1 around 2, and 30 prompts of standard deviation 1 around each run."""
    rng = np.random.default_rng(K)
    values_DKN = 2 + rng.normal(0, 1, (500, K, 1)) + rng.normal(0, 1, (500, K, 30))
    ends = [bootstrap.two_level(values_KN, resamples=200, seed=i)[1] for i, values_KN in enumerate(values_DKN)]
    assert 0.92 <= np.mean([lo <= 2 <= hi for lo, hi in ends]) <= 0.98


@pytest.mark.parametrize("n", [30, 500])
def test_wilsons_interval_holds_the_truth(n):
    """Of rates from .3 to .9: at a single one wins are whole numbers, and .7 of 30 is covered in .92 of the draws."""
    rng = np.random.default_rng(n)
    rate_D = rng.uniform(0.3, 0.9, DRAWS)
    ends_D2 = np.array([interval.wilson(int(wins), n) for wins in rng.binomial(n, rate_D)])
    assert 0.93 <= np.mean((ends_D2[:, 0] <= rate_D) & (rate_D <= ends_D2[:, 1])) <= 0.97


@pytest.mark.parametrize("n", [30, 500])
def test_the_interval_of_a_mean_holds_the_truth(n):
    ends = [interval.mean_ci95(x_N) for x_N in np.random.default_rng(n).normal(2, 3, (DRAWS, n))]
    assert 0.93 <= np.mean([lo <= 2 <= hi for lo, hi in ends]) <= 0.97


@pytest.mark.parametrize("K", [3, 10])
def test_students_interval_of_few_seeds_holds_the_truth(K):
    x_DK = np.random.default_rng(K).normal(2, 3, (DRAWS, K))
    half_D = x_DK.std(axis=1, ddof=1) * interval.t95(K)
    assert 0.93 <= np.mean(np.abs(x_DK.mean(axis=1) - 2) <= half_D) <= 0.97
