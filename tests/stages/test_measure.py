"""What reinforcement learning says of its samples, by hand."""

import types

import numpy as np
import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.stages.measure import Measured, judge, samples


@pytest.mark.parametrize(("rule", "totals"), [("replace", (0.5, -3.2)), ("subtract", (0.5, -1.2))])
def test_the_total_of_a_sample_by_hand(rule, totals):
    """kl_coef is that of the moment, .1, and not the config's; the second text never ended: -3, or 1 - 2 = -1."""
    rows = {"score": np.float32([1, 1]), "kl": np.float32([5, 2]), "eos_rate": np.array([True, False])}
    config = ppo.Config(kl_coef=0.7, missing_eos=rule, missing_eos_penalty=3.0 if rule == "replace" else 2.0)
    state = types.SimpleNamespace(kl_coef=np.float32(0.1))
    first, second = samples(Measured({}, rows, ["a", "b"]), state, config, "score")
    assert first == {"completion": "a", "score": 1, "kl": 5, "total": pytest.approx(totals[0])}
    assert second == {"completion": "b", "score": 1, "kl": 2, "total": pytest.approx(totals[1])}


def test_an_answer_that_has_not_ended_is_not_exact():
    """Whitespace after an answer makes no other text of it, but a completion without EOS is no answer."""
    task = types.SimpleNamespace(judge=lambda rows, texts: {"exact": np.array([1.0, 1, 0])})
    found = judge(task, None, [{}] * 3, ["12", "12 ", "1"], np.array([True, False, True]))
    np.testing.assert_array_equal(found["exact"], [1, 0, 0])
    other = types.SimpleNamespace(reward="exact", judge=None)
    assert judge(other, types.SimpleNamespace(name="exact"), [], [], np.array([])) == {}
