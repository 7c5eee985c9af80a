"""What the policy algorithms share. The policy is a table of the logits of what follows each token."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import POLICY, policy
from rlhf_jax.rollout import Apply, Rollout
from rlhf_jax.training import optim
from tests.support import OPTIMIZED, TablePolicy, assert_trees_equal

IDS, B, R = 256, 6, 3
BAD = 7  # a token at which `Broken` is not finite


class TableScalar:
    """values[v] after token v."""

    @staticmethod
    def values(table, tokens_BT, attend_BT, count):
        return table[tokens_BT[:, -count - 1 : -1]]


class Broken(TablePolicy):
    """A policy whose log-probs are NaN in the rows that contain BAD."""

    @staticmethod
    def logprobs(table, tokens_BT, attend_BT, count, *, temperature):
        logp_BR = TablePolicy.logprobs(table, tokens_BT, attend_BT, count, temperature=temperature)
        return jnp.where(jnp.any(tokens_BT == BAD, axis=1, keepdims=True), jnp.nan, logp_BR)


SOUND, BROKEN = Apply(TablePolicy, TableScalar), Apply(Broken, TableScalar)
BOTH = pytest.mark.parametrize("name", ["ppo", "policy_gradient", "rloo"])  # with a value model, alone, in groups


@cache
def made(name):
    """(config, optimizer) of an algorithm that takes six optimizer steps a rollout."""
    group = 2 if POLICY[name].Config().group > 1 else 1
    sizes = {"batch": B, "group": group, "epochs": 2, "minibatches": 3, "lr": 0.1}
    config = POLICY[name].Config(**sizes, kl_target=1e-3, kl_horizon=60)
    return config, optim.adamw(config, 100)


def begin(name):
    config, tx = made(name)
    value = jnp.linspace(-1, 1, IDS) if POLICY[name].NEEDS_VALUE else None
    table = jax.random.normal(jax.random.key(0), (IDS, IDS))
    return policy.init(table, jax.random.key(2), config=config, tx=tx, value=value, reward=jnp.ones(3))


@cache
def learner(name, guard="off", apply=SOUND):
    """The compiled step, donated as a stage does it, and optimized: two programs must round alike."""
    config, tx = made(name)
    step = partial(policy.step, POLICY[name], config=config, apply=apply, tx=tx, guard=guard)
    return jax.jit(step, donate_argnums=0, compiler_options=OPTIMIZED)


@pytest.fixture(scope="module")
def rollout():
    """Six rows of three tokens, one of them with BAD in it."""
    response_BR = jax.random.randint(jax.random.key(2), (B, R), BAD + 1, IDS).at[4, 1].set(BAD)
    blank_BR, full_BR = jnp.zeros((B, R)), jnp.ones((B, R), bool)
    return Rollout(
        prompt_BP=jnp.full((B, 1), 2),
        prompt_mask_BP=jnp.ones((B, 1), bool),
        response_BR=response_BR,
        mask_BR=full_BR,
        eos_B=jnp.ones(B, bool),
        logp_BR=blank_BR - 5,
        logp_ref_BR=blank_BR - 6,
        kl_exact_BR=blank_BR,
        entropy_BR=blank_BR,
        values_BR=blank_BR,
        score_B=jnp.arange(float(B)),
    )


def assert_same(actual, expected):
    """States of the same numbers, keys included."""
    actual, expected = (state.replace(key=jax.random.key_data(state.key)) for state in (actual, expected))
    assert_trees_equal(actual, expected)


def test_a_missing_end_is_punished():
    """invariant 7: by default the score becomes -1; or 1 is taken off it."""
    score_B, eos_B = jnp.array([3.0, 3, -5]), jnp.array([True, False, False])
    config = policy.Config()
    assert (config.missing_eos, config.missing_eos_penalty) == ("replace", 1)
    np.testing.assert_array_equal(policy.final_score(score_B, eos_B, missing_eos="replace", penalty=1), [3, -1, -1])
    np.testing.assert_array_equal(policy.final_score(score_B, eos_B, missing_eos="subtract", penalty=1), [3, 2, -6])


def test_the_trace_of_an_update_by_hand():
    """Means over all minibatches so far: (0 + 2) / 2, then (0 + 2 + 3 + 5) / 4."""
    aux = {
        "approx_kl": jnp.array([[0.0, 2.0], [3.0, 5.0]]),
        "clip_fraction": jnp.array([[0.0, 0.0], [0.5, 1.0]]),
    }
    assert {name: float(value) for name, value in policy.trace(aux).items()} == {
        "approx_kl_epoch_1": 1.0,
        "approx_kl_epoch_2": 2.5,
        "clip_fraction_epoch_1": 0.0,
        "clip_fraction_epoch_2": 0.375,
    }


# What a trace records


@pytest.mark.parametrize(
    ("name", "microbatches"), [("ppo", 1), ("ppo", 2), ("policy_gradient", 1), ("rloo", 2)]
)  # each algorithm, and both ways of collecting rows
def test_recording_changes_no_number_and_hands_out_what_the_loss_computed(name, microbatches, rollout):
    """Bit for bit. In each minibatch, rows_B says which rows of the rollout the arrays are of."""
    config, tx = made(name)
    changes = {"group": 3 if config.group > 1 else 1, "minibatches": 1, "microbatches": microbatches}
    config = dataclasses.replace(config, **changes)
    parts = {"config": config, "apply": SOUND, "tx": tx}
    steps = (partial(policy.step, POLICY[name], record=on, **parts) for on in (False, True))
    plain, traced = (jax.jit(step, compiler_options=OPTIMIZED) for step in steps)
    expected, expected_numbers = plain(begin(name), rollout)
    ours, numbers = traced(begin(name), rollout)
    record = numbers.pop("record")
    assert_same(ours, expected)
    assert_trees_equal(numbers, expected_numbers)
    rows, given = record["update"]["rows_B"], record["rollout"]
    assert rows.shape == (2, 1, B) and given.rewards_BR.shape == given.raw_advantages_BR.shape == (B, R)
    tokens = (rollout.tokens_BT, rollout.attend_BT, R)
    fresh_BR = TablePolicy.logprobs(begin(name).policy, *tokens, temperature=config.temperature)
    np.testing.assert_allclose(record["update"]["logp_BR"][0, 0], fresh_BR[rows[0, 0]], rtol=1e-5)
    assert record["minibatch"]["policy_loss"].shape == (2, 1)


@BOTH
def test_without_a_trace_the_program_is_that_of_a_loss_that_hands_out_nothing(name, rollout):
    """To the letter, before XLA has optimized anything."""
    config, tx = made(name)

    def bare(*args, **parts):
        value, numbers = POLICY[name].loss(*args, **parts)
        return value, numbers | {"rows": {}}

    without = SimpleNamespace(**vars(POLICY[name]) | {"loss": bare})
    step = partial(policy.step, config=config, apply=SOUND, tx=tx)
    texts = [jax.jit(partial(step, each)).lower(begin(name), rollout).as_text() for each in (POLICY[name], without)]
    assert texts[0] == texts[1]
    recording = jax.jit(partial(step, POLICY[name], record=True)).lower(begin(name), rollout).as_text()
    assert recording != texts[0]


# Numbers that are not finite (training/optim.py has the rules)


@BOTH
@pytest.mark.parametrize("guard", ["stop", "skip"])
def test_a_guard_changes_nothing_of_what_is_finite(name, guard, rollout):
    """Bit for bit, and it is told that no update was left out."""
    ours, numbers = learner(name, guard)(begin(name), rollout)
    expected, expected_numbers = learner(name)(begin(name), rollout)
    assert_same(ours, expected)
    assert_trees_equal(numbers, expected_numbers)
    assert numbers["skipped"] == 0 and ours.applied == 0


@BOTH
@pytest.mark.parametrize(("guard", "step"), [("stop", 0), ("skip", 1)])
def test_a_score_that_is_not_finite_moves_neither_policy_nor_kl_coefficient(name, guard, step, rollout):
    """They go on from where they were, with "skip" from the next step on."""
    ours, numbers = learner(name, guard)(begin(name), rollout.replace(score_B=rollout.score_B.at[3].set(jnp.nan)))
    assert_same(ours, begin(name).replace(step=jnp.int32(step), skipped=jnp.int32(1)))
    assert numbers["skipped"] == 1


@BOTH
def test_an_update_that_was_begun_is_finished_and_not_repeated(name, rollout):
    """In the state of an incident `applied` optimizer steps of six are taken; the others follow, bit for bit."""
    config, _ = made(name)
    stopped, numbers = learner(name, "stop", BROKEN)(begin(name), rollout)
    taken = int(stopped.applied)
    assert numbers["skipped"] == stopped.skipped == 1 and stopped.step == 0
    assert 0 < taken < config.epochs * config.minibatches
    assert (stopped.policy != begin(name).policy).any() and jnp.isfinite(stopped.policy).all()
    again, _ = learner(name, "stop", BROKEN)(jax.tree.map(jnp.copy, stopped), rollout)
    assert_same(again, stopped.replace(skipped=jnp.int32(2)))  # dispatched after it: it changes nothing
    again, _ = learner(name, "stop", BROKEN)(jax.tree.map(jnp.copy, stopped).replace(skipped=jnp.int32(0)), rollout)
    assert_same(again, stopped)  # made again, it stops at the same step
    resumed, _ = learner(name, "stop")(stopped.replace(skipped=jnp.int32(0)), rollout)
    whole, _ = learner(name, "stop")(begin(name), rollout)
    assert_same(resumed, whole)


@BOTH
@pytest.mark.parametrize("guard", ["stop", "skip"])
def test_a_guard_sets_no_second_copy_of_the_state_aside(name, guard, rollout):
    """Parameters and optimizer are most of this model; beside them the update needs as much with a guard as without."""
    state = begin(name)
    of_state = sum(x.nbytes for x in jax.tree.leaves((state.policy, state.value, state.optimizer)))

    def temporary(guard):
        return learner(name, guard).lower(begin(name), rollout).compile().memory_analysis().temp_size_in_bytes

    assert of_state > 700_000
    assert temporary(guard) - temporary("off") < of_state / 10
