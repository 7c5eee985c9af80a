import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import calibration

THREE = np.log(3)  # the margin at which P = .75


def test_brier_by_hand():
    assert calibration.brier([0, 0]) == 0.25
    assert calibration.brier([THREE, -THREE]) == pytest.approx((0.25**2 + 0.75**2) / 2)


def test_ece_by_hand():
    """Three of four pairs right at confidence .75: no error; all four: .25; a coin that says .5: none."""
    assert calibration.ece([THREE, THREE, THREE, -THREE]) == pytest.approx(0, abs=1e-12)
    assert calibration.ece([THREE] * 4) == pytest.approx(0.25)
    assert calibration.ece([0.0, 0.0]) == 0
    # two bins: one right pair at .75, and one wrong at sigmoid(4) = .982: (.25 + .982) / 2
    assert calibration.ece([THREE, -4.0]) == pytest.approx((0.25 + 0.98201) / 2, abs=1e-5)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_temperature_is_where_a_minimizer_finds_it(margins):
    margins = np.array(margins)
    loss = lambda s: np.mean(np.logaddexp(0, -margins * np.exp(s)))  # noqa: E731
    found = calibration.temperature(margins)
    best = optimize.minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e3)), method="bounded").fun
    assert loss(-np.log(found)) <= best + 1e-9


def test_temperature_of_a_model_that_says_twice_too_much():
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 40_000)
    signs = np.where(rng.random(true.size) < 1 / (1 + np.exp(-true)), 1, -1)  # whether the label agrees
    assert calibration.temperature(signs * true) == pytest.approx(1, abs=0.05)
    assert calibration.temperature(2 * signs * true) == pytest.approx(2, abs=0.1)
    assert calibration.ece(signs * true) < 0.01 < 0.05 < calibration.ece(2 * signs * true)
    assert calibration.temperature([1.0, 2.0]) == pytest.approx(1e-3)  # no pair is wrong
    assert calibration.temperature([-1.0, -2.0]) == pytest.approx(1e3)  # none is right


@pytest.mark.parametrize("margins", [[], [1.0, np.nan]])
def test_no_margins(margins):
    for number in (calibration.brier, calibration.ece, calibration.temperature):
        with pytest.raises(InputError, match="at least one pair, without NaN"):
            number(margins)
