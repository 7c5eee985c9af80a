import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.controlled import RIDGE, length_controlled

WINS = st.sampled_from([0.0, 0.5, 1.0])
ROWS = st.lists(st.tuples(WINS, st.integers(1, 60), st.integers(1, 60)), min_size=2, max_size=40)


def columns(rows):
    return tuple(np.array(rows, float).T)


def test_the_same_texts_give_one_half():
    assert length_controlled([0.5] * 9, [7] * 9, [7] * 9) == (0.5, (0.5, 0.5))


def test_without_an_effect_of_length_it_is_the_plain_rate():
    """Two wins of three at each difference of length: the slope is 0."""
    rate, _ = length_controlled([1, 1, 0] * 40, [20] * 60 + [10] * 60, [15] * 120, resamples=2)
    assert rate == pytest.approx(2 / 3, abs=1e-4)  # the ridge takes 1e-5


def test_a_judge_of_length_alone_is_seen_through():
    """It wins two of three because two of three of its texts are longer; at equal lengths it wins one half."""
    apart = np.array([-12, -9, -7, -5, -3, -1, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 15] * 10)
    wins = apart > 0
    assert wins.mean() == pytest.approx(2 / 3)
    rate, (lo, hi) = length_controlled(wins, 30 + apart, np.full(apart.size, 30), resamples=100)
    assert 0.4 < rate < 0.6 and lo < 0.5 < hi


@given(ROWS)
def test_it_is_the_fit_that_a_minimizer_finds(rows):
    wins, length, other = columns(rows)
    apart = length - other
    x = np.tanh(apart / (np.sqrt(np.mean(apart**2)) or 1))

    def loss(ab):
        z = ab[0] + ab[1] * x
        return np.sum(wins * np.logaddexp(0, -z) + (1 - wins) * np.logaddexp(0, z)) + RIDGE / 2 * np.sum(ab**2)

    found = optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    rate, _ = length_controlled(wins, length, other, resamples=2)
    assert rate == pytest.approx(1 / (1 + np.exp(-found.x[0])), abs=2e-4)


@given(ROWS)
def test_swapped_sides_are_the_mirror_image(rows):
    wins, length, other = columns(rows)
    rate, (lo, hi) = length_controlled(wins, length, other, resamples=20)
    mirror, (low, high) = length_controlled(1 - wins, other, length, resamples=20)
    assert (mirror, low, high) == pytest.approx((1 - rate, 1 - hi, 1 - lo), abs=1e-9)
    assert lo <= hi


def test_its_interval_covers_the_truth():
    """The rate at equal lengths is .6; length adds to it. 200 draws of 30 prompts."""
    rng = np.random.default_rng(30)
    covered = 0
    for draw in range(200):
        apart = rng.normal(3, 8, 30)
        z = np.log(0.6 / 0.4) + 1.5 * np.tanh(apart / np.sqrt(73))
        wins = rng.random(30) < 1 / (1 + np.exp(-z))
        _, (lo, hi) = length_controlled(wins, 40 + apart, np.full(30, 40), resamples=200, seed=draw)
        covered += lo <= 0.6 <= hi
    assert 0.9 < covered / 200 < 0.98


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1], [3], [4]), "at least 2 prompts"),
        (([1, 0], [3, 4], [4, 5, 6]), "operands|prompts"),
        (([1, 2], [3, 4], [4, 5]), "wins from 0 to 1"),
        (([1, np.nan], [3, 4], [4, 5]), "wins from 0 to 1"),
    ],
)
def test_what_cannot_be_fitted(args, message):
    with pytest.raises((InputError, ValueError), match=message):
        length_controlled(*args)
