import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.interval import wilson
from rlhf_jax.evaluate.win_rate import win_rate

pairs = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=30)


def test_win_rate_by_hand():
    # win, tie, loss, win: (1 + .5 + 0 + 1) / 4
    rate, interval = win_rate([3, 2, 1, 9], [1, 2, 3, -9])
    assert rate == 0.625
    assert interval == wilson(2.5, 4)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_all_wins_is_one_but_not_certain(n):
    rate, (lo, hi) = win_rate(np.ones(n), np.zeros(n))
    assert (rate, hi) == (1, 1)
    assert 0 < lo < 1


@given(pairs)
def test_swapping_the_models_mirrors_the_rate(scores):
    a_N, b_N = np.array(scores).T
    rate, (lo, hi) = win_rate(a_N, b_N)
    swapped, interval = win_rate(b_N, a_N)
    assert swapped == pytest.approx(1 - rate)
    assert interval == pytest.approx((1 - hi, 1 - lo))


def test_a_model_against_itself_is_a_half():
    assert win_rate([1, 2, 3], [1, 2, 3])[0] == 0.5


def test_bad_scores_are_refused():
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(1,\)"):
        win_rate([1, 2], [1])
    with pytest.raises(InputError, match="NaN in row 1"):
        win_rate([1.0, 2.0], [1.0, np.nan])
    with pytest.raises(InputError, match="n > 0"):
        win_rate([], [])
