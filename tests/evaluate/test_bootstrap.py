import numpy as np
import pytest
from scipy import stats

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import bootstrap


def test_one_run_is_scipys_bootstrap():
    x_N = np.random.default_rng(0).normal(1, 2, 60)
    mean, (lo, hi) = bootstrap.two_level(x_N[None], resamples=4_000)
    theirs = stats.bootstrap((x_N,), np.mean, method="percentile", n_resamples=4_000, rng=1).confidence_interval
    assert mean == pytest.approx(x_N.mean())
    assert (lo, hi) == pytest.approx(tuple(theirs), abs=0.05)


def test_runs_that_differ_widen_it():
    """Prompts that all score the same leave the three runs' means alone: 3 of 27 resamples are (0, 0, 0)."""
    mean, (lo, hi) = bootstrap.two_level(np.array([[0.0] * 50, [1.0] * 50, [5.0] * 50]))
    assert (mean, lo, hi) == (2, 0, 5)
    assert bootstrap.two_level(np.ones((3, 4))) == (1, (1, 1))


def test_it_is_reproducible():
    values = np.random.default_rng(1).random((3, 20))
    assert bootstrap.two_level(values, resamples=50) == bootstrap.two_level(values, resamples=50)
    assert bootstrap.two_level(values, resamples=50) != bootstrap.two_level(values, resamples=50, seed=1)


def test_iqm_by_hand():
    assert bootstrap.iqm([0, 1, 2, 100]) == 1.5
    # of 6 values, 1.5 are cut on each side: half of 1, all of 2 and 3, half of 4
    assert bootstrap.iqm([0, 1, 2, 3, 4, 99]) == pytest.approx((0.5 + 2 + 3 + 0.5 * 4) / 3)
    x = np.random.default_rng(2).random(40)
    assert bootstrap.iqm(x) == pytest.approx(stats.trim_mean(x, 0.25))


def test_stratified_draws_within_tasks():
    """Tasks of equal runs have nothing to draw."""
    value, interval = bootstrap.stratified(np.repeat([[0.0], [1.0]], 5, axis=1), resamples=20)
    assert value == 0.5 and interval == (0.5, 0.5)
    _, (lo, hi) = bootstrap.stratified(np.array([[0.0, 1, 2, 3, 4], [10.0, 11, 12, 13, 14]]), resamples=200)
    assert 4 < lo < 7 < hi < 10


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3)])
def test_no_values(values):
    with pytest.raises(InputError, match="expected values"):
        bootstrap.two_level(values)
    with pytest.raises(InputError, match="2 tasks x 5 seeds"):
        bootstrap.stratified(values)
