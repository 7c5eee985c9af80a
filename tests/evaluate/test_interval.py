import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.interval import Z95, mean_ci95, paired_gain, wilson

floats = st.floats(-1e3, 1e3)
halves_of_n = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n)))


def test_z95_leaves_a_fortieth_in_each_tail():
    assert math.erfc(Z95 / math.sqrt(2)) == pytest.approx(0.05, rel=1e-12)


def test_mean_by_hand():
    # mean 3, unbiased variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5, standard error sqrt(2.5 / 5) = .70711
    # half-width .70711 * 1.95996 = 1.3859
    assert mean_ci95([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.3859, 3 + 1.3859), abs=1e-4)


def test_one_row_has_an_infinite_interval_and_no_row_is_an_error():
    assert mean_ci95([7.0]) == (-np.inf, np.inf)
    with pytest.raises(InputError, match="at least one row"):
        mean_ci95([])


def test_mean_of_float32_rows_is_taken_in_float64():
    # from 2^24 on float32 counts by twos, so it cannot hold the mean, 2^24 + 2 / 4
    lo, hi = mean_ci95(np.array([2**24, 2**24, 2**24 + 2, 2**24], np.float32))
    assert (lo + hi) / 2 == 2**24 + 0.5


def test_mean_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = np.array([mean_ci95(x_N) for x_N in rng.normal(2.0, 3.0, (2000, 100))])
    covered = np.mean((intervals[:, 0] <= 2) & (intervals[:, 1] >= 2))
    assert covered == pytest.approx(0.95, abs=0.015)  # 3 standard errors of a rate over 2000


@given(st.lists(floats, min_size=2, max_size=20), floats, st.floats(0.1, 10))
def test_mean_interval_moves_and_stretches_with_the_unit(x_N, shift, scale):
    lo, hi = mean_ci95(x_N)
    assert mean_ci95(shift + scale * np.array(x_N)) == pytest.approx((shift + scale * lo, shift + scale * hi), abs=1e-6)


def test_gain_by_hand():
    # differences 1, 2, 3: gain 2, unbiased variance 1, standard error sqrt(1 / 3) = .57735; .57735 * 1.96 = 1.13159
    gain, interval = paired_gain([11, 22, 33], [10, 20, 30])
    assert gain == 2
    assert interval == pytest.approx((2 - 1.13159, 2 + 1.13159), abs=1e-5)


def test_gain_refuses_rows_that_do_not_pair():
    with pytest.raises(InputError, match=r"same rows twice, got shapes \(3,\) and \(1,\)"):
        paired_gain([1, 2, 3], [1])


def test_wilson_by_hand():
    # 1 win of 1: lo = (1 + z^2/2 - z^2/2) / (1 + z^2) = 1 / 4.8415 = .2065, hi = (1 + z^2) / (1 + z^2) = 1
    assert wilson(1, 1) == pytest.approx((0.20655, 1), abs=1e-5)
    # half of 4: centre .5, half-width z sqrt(2 * 2 / 4 + .9604) / 7.8415 = 1.96 * 1.4001 / 7.8415 = .34996
    assert wilson(2, 4) == pytest.approx((0.5 - 0.34996, 0.5 + 0.34996), abs=1e-5)


@given(halves_of_n)
def test_wilson_stays_in_range_holds_the_rate_and_mirrors(halves_of_n):
    halves, n = halves_of_n
    wins = halves / 2
    lo, hi = wilson(wins, n)
    assert 0 <= lo <= wins / n <= hi <= 1
    assert lo < hi
    assert wilson(n - wins, n) == pytest.approx((1 - hi, 1 - lo), abs=1e-12)


@pytest.mark.parametrize("n", [1, 16, 29])  # the formula gives 1 + 2e-16 at 16 of 16 and 1 - 1e-16 at 29 of 29
def test_wilson_reaches_the_ends_exactly(n):
    assert wilson(0, n)[0] == 0
    assert wilson(n, n)[1] == 1


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (0, 40), (3, 7), (65, 100), (256, 256)])
def test_wilson_is_scipys(wins, n):
    oracle = stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
    assert wilson(wins, n) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


@pytest.mark.parametrize(("wins", "n"), [(0, 0), (3, 2), (-1, 2), (math.nan, 2)])
def test_wilson_refuses_impossible_counts(wins, n):
    with pytest.raises(InputError, match="0 <= wins <= n"):
        wilson(wins, n)
