import numpy as np

from rlhf_jax import alarms

BEFORE = {"distinct2": 0.8, "repeat_rate": 0.0, "entropy": 2.0, "length": 30.0, "kl_exact": 0.0}
FINE = {"distinct2": 0.7, "repeat_rate": 0.04, "entropy": 1.0, "length": 20.0, "kl_exact": 3.0}
COLLAPSED = {"distinct2": 0.5, "repeat_rate": 0.2, "entropy": 0.5, "length": 10.0, "kl_exact": 9.0}
CONFIG = alarms.Config(patience=4)


def seeds(*numbers):
    return {name: np.array([some[name] for some in numbers], np.float32) for name in alarms.WATCHED}


def test_each_limit_is_against_what_was_before():
    wrong = alarms.outside(seeds(FINE, COLLAPSED), BEFORE, CONFIG)
    assert set(wrong) == set(alarms.WATCHED)
    assert all(value_K.tolist() == [False, True] for value_K in wrong.values())


def test_texts_long_enough_to_repeat_words_are_no_alarm():
    """Where half of the samples did so before, half may; a twentieth more is too many."""
    before = BEFORE | {"repeat_rate": 0.5}
    wrong = alarms.outside(seeds(FINE | {"repeat_rate": 0.54}, FINE | {"repeat_rate": 0.56}), before, CONFIG)
    assert wrong["repeat_rate"].tolist() == [False, True]


def test_a_limit_of_no_kl_is_no_limit():
    assert "kl_exact" not in alarms.outside(seeds(COLLAPSED), BEFORE, alarms.Config(kl_exact=0.0))


def test_one_bad_rollout_rings_no_alarm_and_many_do():
    """Running mean of distinct-2 over 4: .8, then .725, .669, .627, .595, .571, .553; the limit is .56."""
    state, numbers = alarms.begin(BEFORE, 1), seeds(FINE | {"distinct2": 0.5})
    rung = []
    for _ in range(7):
        state, new = alarms.listen(state, numbers, BEFORE, CONFIG)
        rung.append([name for name, new_K in new.items() if new_K.any()])
    assert rung == [[], [], [], [], [], ["distinct2"], []]
    np.testing.assert_allclose(state["mean"]["distinct2"], [0.5 + 0.3 * 0.75**7], rtol=1e-5)


def test_an_alarm_stays_on_and_concerns_its_seed_alone():
    state = alarms.begin(BEFORE, 2)
    for _ in range(20):
        state, _ = alarms.listen(state, seeds(FINE, COLLAPSED), BEFORE, CONFIG)
    assert np.asarray(state["rung"]).tolist() == [False, True]
    for _ in range(40):
        state, new = alarms.listen(state, seeds(FINE, FINE), BEFORE, CONFIG)
    assert np.asarray(state["rung"]).tolist() == [False, True]
    assert not any(new_K.any() for new_K in new.values())
