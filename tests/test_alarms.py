import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import alarms

BEFORE = {"distinct2": 0.8, "repeat_rate": 0.0, "entropy": 2.0, "length": 30.0, "kl_exact": 0.0}
FINE = {"distinct2": 0.7, "repeat_rate": 0.04, "entropy": 1.0, "length": 20.0, "kl_exact": 3.0}
COLLAPSED = {"distinct2": 0.5, "repeat_rate": 0.2, "entropy": 0.5, "length": 10.0, "kl_exact": 9.0}
CONFIG = alarms.Config(patience=4)


def test_each_limit_is_against_what_was_before():
    assert alarms.outside(FINE, BEFORE, CONFIG) == dict.fromkeys(alarms.WATCHED, False)
    assert alarms.outside(COLLAPSED, BEFORE, CONFIG) == dict.fromkeys(alarms.WATCHED, True)


def test_texts_long_enough_to_repeat_words_are_no_alarm():
    """Where half of the samples did so before, half may; a twentieth more is too many."""
    before = BEFORE | {"repeat_rate": 0.5}
    few, many = (alarms.outside(FINE | {"repeat_rate": rate}, before, CONFIG)["repeat_rate"] for rate in (0.54, 0.56))
    assert (few, many) == (False, True)


def test_a_limit_of_no_kl_is_no_limit():
    assert not alarms.outside(COLLAPSED, BEFORE, alarms.Config(kl_exact=0.0))["kl_exact"]


def test_with_limits_off_nothing_is_outside():
    """Not even a policy that writes one word without end."""
    worst = {"distinct2": 0.0, "repeat_rate": 1.0, "entropy": 0.0, "length": 0.0, "kl_exact": 1e6}
    assert not any(alarms.outside(worst, BEFORE, alarms.OFF).values())


@pytest.mark.parametrize(("changes", "active"), [
    ({}, False), ({"patience": 3}, False), ({"freeze": True}, False),
    ({"distinct2": 0.1}, True), ({"repeat_rate": 0.9}, True), ({"entropy": 0.1}, True), ({"length": 0.1}, True),
    ({"kl_exact": 1.0}, True), ({"over_optimization": 2.0}, True),
])  # fmt: skip
def test_alarms_are_active_where_there_is_any_limit(changes, active):
    assert dataclasses.replace(alarms.OFF, **changes).active is active
    assert alarms.Config().active


def test_one_bad_rollout_trips_no_alarm_and_many_do():
    """Running mean of distinct-2 over 4: .8, then .725, .669, .627, .595, .571, .553; the limit is .56."""
    state, numbers = alarms.begin(BEFORE), FINE | {"distinct2": 0.5}
    tripped = []
    for _ in range(7):
        state, new = alarms.track(state, numbers, BEFORE, CONFIG)
        tripped.append(new)
    assert tripped == [[], [], [], [], [], ["distinct2"], []]
    np.testing.assert_allclose(state["mean"]["distinct2"], 0.5 + 0.3 * 0.75**7, rtol=1e-5)


def test_an_alarm_stays_on():
    """Without the collapse there is none; after it, it is reported once, however fine the rollouts are that follow."""
    fine = state = alarms.begin(BEFORE)
    for _ in range(20):
        state, _ = alarms.track(state, COLLAPSED, BEFORE, CONFIG)
        fine, _ = alarms.track(fine, FINE, BEFORE, CONFIG)
    assert state["tripped"] and not fine["tripped"]
    for _ in range(40):
        state, new = alarms.track(state, FINE, BEFORE, CONFIG)
        assert not new
    assert state["tripped"]


def test_the_state_is_arrays_of_the_same_types_at_every_step():
    """It is part of the TrainState: a checkpoint holds it, and another type would be a compilation."""
    state = alarms.begin(BEFORE)
    after, _ = alarms.track(state, FINE, BEFORE, CONFIG)
    for tree in state, after:
        assert {name: mean.dtype for name, mean in tree["mean"].items()} == dict.fromkeys(alarms.WATCHED, jnp.float32)
        assert tree["tripped"].dtype == bool


# Over-optimization: the judge's standard deviation is 1, so two means of 8 differ with a standard error of 1/2

SPREAD = np.array([1, -1] * 4) * np.sqrt(7 / 8)


def evaluated(*means, reward=(1, 2, 3, 4)):
    """Whether the judge has fallen after each evaluation; before them the judge and the reward are 0."""
    state, found = alarms.begin(BEFORE) | alarms.watch_judge(0.0, 0.0), []
    for judge, learned in zip(means, reward, strict=False):
        state = alarms.judged(state, judge + SPREAD, learned, dataclasses.replace(CONFIG, over_optimization=2.0))
        found.append(bool(state["judge"]["fell"]))
    return found


def test_the_judge_falls_below_its_best_while_the_reward_rises():
    assert evaluated(2.0, 1.1, 0.9) == [False, False, True]  # by .9, and by 1.1: two standard errors are 1
    assert evaluated(-0.9, -1.1) == [False, True]  # below the first policy
    assert evaluated(0.5, -0.4, 0.6) == [False, False, False]


def test_a_judge_that_falls_with_the_reward_is_another_thing():
    """Learning has become unstable, which the reward shows by itself."""
    assert evaluated(2.0, 0.5, reward=(3, 2)) == [False, False]


def test_it_has_fallen_once_and_for_all_and_track_keeps_it():
    assert evaluated(2.0, 0.0, 3.0) == [False, True, True]
    state = alarms.begin(BEFORE) | alarms.watch_judge(1.0, 0.0)
    assert alarms.track(state, FINE, BEFORE, CONFIG)[0]["judge"] == state["judge"]
