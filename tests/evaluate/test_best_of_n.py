import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import best_of_n

scores = st.lists(st.floats(-1, 1), min_size=1, max_size=7)


def test_best_of_two_of_three_by_hand():
    # The pairs of 0, 3, 9 have the maxima 3, 9, 9; KL = log 2 - 1/2
    score, kl = best_of_n.best_of_n([9, 0, 3], 2)
    assert score == pytest.approx(7)
    assert kl == pytest.approx(math.log(2) - 0.5)


@given(scores, st.integers(1, 7))
def test_it_is_the_mean_over_all_subsets(scores, n):
    n = min(n, len(scores))
    subsets = [max(subset) for subset in itertools.combinations(scores, n)]
    assert best_of_n.best_of_n(scores, n)[0] == pytest.approx(np.mean(subsets), abs=1e-9)


def test_best_of_one_is_the_mean_at_no_kl_and_best_of_all_is_the_maximum():
    assert best_of_n.best_of_n([1, 2, 6], 1) == (pytest.approx(3), 0)
    assert best_of_n.best_of_n([1, 2, 6], 3)[0] == pytest.approx(6)


def test_the_curve_rises_and_stops_at_a_tenth_of_the_samples():
    n_M, score_M, kl_M = zip(*best_of_n.curve(np.linspace(-1, 1, 100)), strict=True)
    assert n_M == (1, 2, 3, 4, 6, 8)
    assert all(np.diff(score_M) > 0) and all(np.diff(kl_M) > 0)


def test_at_a_kl_between_two_n_it_is_between_their_scores():
    score_N = np.linspace(-1, 1, 100)
    (_, low, kl_low), (_, high, kl_high) = best_of_n.curve(score_N)[2:4]
    assert best_of_n.at_kl(score_N, (kl_low + kl_high) / 2) == pytest.approx((low + high) / 2)
    assert best_of_n.at_kl(score_N, 0.0) == pytest.approx(0.0)
    assert best_of_n.at_kl(score_N, 99.0) == pytest.approx(best_of_n.curve(score_N)[-1][1])


@pytest.mark.parametrize("n", [0, 4])
def test_n_above_the_number_of_scores_is_an_error(n):
    with pytest.raises(InputError, match="expected n from 1 to 3"):
        best_of_n.best_of_n([1, 2, 3], n)
