import numpy as np
import pytest

from rlhf_jax.evaluate import seeds

T95 = 12.7062  # Student's t, 97.5%, of 1 degree of freedom


def test_rows_by_hand():
    """Means; the half-width is t s / sqrt(2), with s = |a - b| / sqrt(2) of two values."""
    runs = [
        [{"step": 1, "time": 2.0, "rl/reward": 1.0, "rl/alarms": 1.0, "rl/only": 3.0}, {"step": 2, "time": 3.0}],
        [{"step": 1, "time": 5.0, "rl/reward": 3.0, "rl/alarms": 1.0}, {"step": 2, "time": 7.0}],
    ]
    first, second = seeds.rows(runs)
    assert first["step"] == 1 and first["time"] == 7.0
    assert first["rl/reward"] == 2.0 and first["rl/reward_ci95"] == pytest.approx(T95 * 1.0, rel=1e-4)
    assert first["rl/alarms"] == 2.0 and "rl/alarms_ci95" not in first  # how many runs have one
    assert "rl/only" not in first  # of one run alone
    assert second == {"step": 2, "time": 10.0}


def test_rows_of_one_run_are_its_own():
    row = {"step": 3, "time": 1.5, "rl/reward": 0.5}
    assert seeds.rows([[row]]) == [row | {"rl/reward_ci95": 0.0}]


def test_runs_of_unequal_length_are_an_error():
    with pytest.raises(ValueError):
        seeds.rows([[{"step": 1, "time": 0.0}], []])


def test_numbers_by_hand():
    summaries = [
        {"seed": 1, "seconds": 9, "rl/reward": 1.0, "rl/reward_gain": 0.5, "rl/reward_ci95": [0, 1], "rl/steps": 6},
        {"seed": 1, "seconds": 8, "rl/reward": 2.0, "rl/reward_gain": 1.5, "rl/reward_ci95": [1, 2], "rl/steps": 6},
    ]
    merged = seeds.numbers(summaries, "rl")
    assert merged["rl/reward"] == 1.5 and merged["rl/reward_gain"] == 1.0 and merged["rl/steps"] == 6
    # The interval of a gain is over the seeds, and not the mean of theirs.
    assert merged["rl/reward_ci95"] == pytest.approx((1 - T95 / 2, 1 + T95 / 2), rel=1e-4)
    assert merged["rl/seeds"] == {"reward": [1.0, 2.0], "reward_gain": [0.5, 1.5], "steps": [6.0, 6.0]}
    assert "seed" not in merged and "seconds" not in merged


def test_half_width_of_three_by_hand():
    """1, 2, 6: mean 3, s = sqrt(7), t of 2 degrees of freedom 4.3027; half = 4.3027 sqrt(7 / 3)."""
    assert seeds.half_width(np.array([1.0, 2.0, 6.0])) == pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4)
    assert seeds.half_width(np.array([4.0])) == 0.0
