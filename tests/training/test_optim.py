import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import masked
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState
from tests.support import assert_trees_equal


def test_defaults_are_the_published_ones():
    """invariant 10"""
    config = optim.Config()
    assert (config.adam_b2, config.adam_eps, config.weight_decay) == (0.999, 1e-5, 0)
    assert (config.schedule, config.end_lr) == ("linear", 0)


def test_linear_decay_ends_at_zero():
    """invariant 10: a straight line from lr at the first update to 0 after the last."""
    lr = optim.schedule(optim.Config(lr=0.8), 4)
    np.testing.assert_allclose([lr(i) for i in range(6)], [0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-7)


def test_linear_decay_to_a_tenth():
    lr = optim.schedule(optim.Config(lr=1.0, end_lr=0.1), 2)
    np.testing.assert_allclose([lr(i) for i in range(4)], [1, 0.55, 0.1, 0.1], rtol=1e-6)


def test_cosine_and_constant():
    lr = optim.schedule(optim.Config(lr=0.8, schedule="cosine"), 4)
    np.testing.assert_allclose([lr(0), lr(2), lr(4)], [0.8, 0.4, 0], atol=1e-7)
    lr = optim.schedule(optim.Config(lr=0.8, schedule="cosine", end_lr=0.5), 4)
    np.testing.assert_allclose([lr(0), lr(2), lr(4)], [0.8, 0.6, 0.4], atol=1e-7)
    lr = optim.schedule(optim.Config(lr=0.8, schedule="constant"), 4)
    np.testing.assert_allclose([lr(0), lr(4)], [0.8, 0.8])


@pytest.mark.parametrize("schedule, end", [("linear", 0), ("cosine", 0), ("constant", 1)])
def test_warmup(schedule, end):
    """From 0 to lr in the first updates; the rest still ends with the last update."""
    lr = optim.schedule(optim.Config(lr=1.0, schedule=schedule, warmup=2), 6)
    np.testing.assert_allclose([lr(0), lr(1), lr(2), lr(6)], [0, 0.5, 1, end], atol=1e-7)


def moves(config, *grads, start=0.0):
    """Where a scalar goes under these gradients."""
    places = []
    for state, _ in taken(optim.adamw(config, updates=1000), jnp.float32(start), *map(jnp.float32, grads)):
        places.append(float(state.policy))
    return places


def taken(tx, params, *grads):
    """(state, numbers) after each update of one optimizer step."""
    state = TrainState.create(jax.random.key(3), policy=params, optimizer={"policy": tx.init(params)})
    for grad in grads:
        update = optim.begin(state, ("policy",), grad, guard="off")
        update, numbers = optim.step(update, state, {"policy": grad}, {}, tx=tx, guard="off")
        state, _ = optim.end(state, update, guard="off")
        yield state, numbers


def test_adams_eps_by_hand():
    """invariant 10: the first step is lr g / (|g| + eps): half of lr where g is eps, 1e-5."""
    config = optim.Config(lr=1.0, schedule="constant", max_grad_norm=0)
    np.testing.assert_allclose(moves(config, 1e-5), [-0.5], rtol=1e-4)
    np.testing.assert_allclose(moves(config, 3e-5), [-0.75], rtol=1e-4)


def test_adam_by_hand():
    # g = 1 then -1. m = .1, then .9 * .1 - .1 = -.01, over 1 - .9^2 is -.01/.19; v = 1 both times: up by .01/.19
    config = optim.Config(lr=1.0, schedule="constant", max_grad_norm=0)
    np.testing.assert_allclose(moves(config, 1, -1), [-1, -1 + 0.01 / 0.19], rtol=1e-4)


def test_adams_second_moment_by_hand():
    # g = 1 then 0, b2 = 1/2. m = .09 over .19; v = 1/4 over 3/4: down by .09/.19 * sqrt(3)
    config = optim.Config(lr=1.0, schedule="constant", max_grad_norm=0, adam_b2=0.5)
    np.testing.assert_allclose(moves(config, 1, 0), [-1, -1 - 0.09 / 0.19 * 3**0.5], rtol=1e-4)


def test_weight_decay_is_apart_from_the_gradient():
    config = optim.Config(lr=0.1, schedule="constant", weight_decay=0.5)
    np.testing.assert_allclose(moves(config, 0, start=2.0), [2 - 0.1 * 0.5 * 2], rtol=1e-6)


def test_gradients_are_clipped_at_the_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}  # norm 50, clipped to (.6, .8) * 1e-5
    tx = optim.adamw(optim.Config(lr=1.0, schedule="constant", max_grad_norm=1e-5), updates=10)
    ((state, numbers),) = taken(tx, params, grads)
    moved = state.policy
    np.testing.assert_allclose([moved["a"][0], moved["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-4)
    assert optim.norm(grads) == numbers["policy_grad_norm"] == 50  # before clipping


def token_means(rows):
    """A stand-in for a gradient: means over tokens."""
    x_BT, mask_BT = rows["x_BT"], rows["mask_BT"]
    return {"mean": masked.mean(x_BT, mask_BT), "squares": masked.mean(x_BT**2, mask_BT)}


def test_accumulation_by_hand():
    """invariant 8: slices of 1 and 3 tokens with means 8 and 2 have mean (8 + 6) / 4, not 5."""
    batch = {"x_BT": jnp.array([[8.0, 99, 99], [1, 2, 3]]), "mask_BT": jnp.array([[1, 0, 0], [1, 1, 1]])}
    assert optim.accumulate(token_means, batch, batch["mask_BT"].sum(axis=1), 2)["mean"] == 3.5


@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-4, 4, width=32)), hnp.arrays(bool, (6, 3)))
def test_accumulation_is_the_whole_batch(x_BT, mask_BT):
    """invariant 8: whatever the number of tokens in each row, empty rows, slices and batches among them.

    1e-5 is ten units in the last place of the largest square, 16.
    """
    batch = {"x_BT": jnp.asarray(x_BT), "mask_BT": jnp.asarray(mask_BT)}
    weights_B = mask_BT.sum(axis=1)
    whole = ACCUMULATE[1](batch, weights_B)
    for microbatches in 2, 3, 6:
        parts = ACCUMULATE[microbatches](batch, weights_B)
        for name, x in whole.items():
            np.testing.assert_allclose(parts[name], x, rtol=0, atol=1e-5)


ACCUMULATE = {
    n: jax.jit(lambda batch, weights_B, n=n: optim.accumulate(token_means, batch, weights_B, n)) for n in (1, 2, 3, 6)
}


def test_every_row_is_in_one_slice():
    """Dealt out in turn: slices 0 and 1 of four rows are rows 0, 2 and 1, 3."""
    batch = jnp.arange(4.0)

    def seen(rows_B):
        return jnp.zeros(4).at[rows_B.astype(int)].set(rows_B.shape[0] * jnp.arange(1, 3))

    # each slice has half of the weight: its rows are marked 1 and 2, in order
    np.testing.assert_array_equal(optim.accumulate(seen, batch, jnp.ones(4), 2), [1, 1, 2, 2])


def test_an_update_counts_as_one_step():
    """invariant 10: microbatches are one step of the schedule."""
    tx = optim.adamw(optim.Config(), updates=10)
    assert optax.tree.get(tx.init(jnp.zeros(2)), "count", filtering=adam) == 0
    ((state, _),) = taken(tx, jnp.zeros(2), jnp.ones(2))
    assert optax.tree.get(state.optimizer["policy"], "count", filtering=adam) == 1
    assert state.step == 1


def adam(path, _):
    return any("AdamState" in str(getattr(part, "tuple_name", "")) for part in path)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_optaxs(decay):
    """Bit for bit, where all updates are taken."""
    config = optim.Config(lr=0.01, weight_decay=decay, max_grad_norm=0)
    grads = list(jax.random.normal(jax.random.key(0), (5, 7)))
    theirs = optax.adamw(optim.schedule(config, 10), b2=config.adam_b2, eps=config.adam_eps, weight_decay=decay)
    ours, theirs = (list(taken(tx, jnp.ones(7), *grads)) for tx in (optim.adamw(config, 10), theirs))
    for (state, _), (expected, _) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(state.policy, expected.policy)


# An update: begin, step, end. The optimizer subtracts the gradient and counts its steps.

FINE, NAN = [0.5, 0.5], [np.nan, 0.5]
COUNTS = optax.chain(optax.sgd(1.0), optax.scale_by_schedule(lambda count: 1.0))
ADAM = optim.adamw(optim.Config(lr=0.1, schedule="constant"), updates=10)


def begin(tx=COUNTS):
    policy, reference = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
    return TrainState.create(
        jax.random.key(3), policy=policy, reference=reference, optimizer={"policy": tx.init(policy)}
    )


def count(state):
    return int(optax.tree.get(state.optimizer, "count"))


@cache
def updater(guard, tx=COUNTS):
    """Compiled and donated, as a stage does it: an update of one optimizer step for each gradient [steps, 2]."""

    def update(state, grads, loss=0.0, given=()):
        def step(carry, grad):
            return optim.step(carry, state, {"policy": grad}, {"loss": loss}, tx=tx, guard=guard)

        carry, norms = jax.lax.scan(step, optim.begin(state, ("policy",), given, guard=guard), grads)
        state, numbers = optim.end(state, carry, guard=guard)
        return state, norms | numbers

    return jax.jit(update, donate_argnums=0)


def run(guard, *updates, state=None):
    """The state and the numbers after the last update; each is a list of gradients."""
    state, numbers = state or begin(), {}
    for grads in updates:
        state, numbers = updater(guard)(state, jnp.array(grads, jnp.float32))
    return state, numbers


def test_what_is_finite_passes():
    now, numbers = run("stop", [[0.5, 0.5]], [[0.5, 1.5]])
    assert now.policy.tolist() == [0, 0]
    assert (now.step, count(now), now.skipped, now.applied) == (2, 2, 0, 0)
    assert numbers["skipped"] == 0
    np.testing.assert_allclose(numbers["policy_grad_norm"], [2.5**0.5], rtol=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_the_first_that_is_not_finite_is_the_last(wrong):
    """All stays as it was before it, bit for bit, though the next ones were dispatched and are finite."""
    now, numbers = run("stop", [FINE], [[wrong, 0.5]], [[1, 1]], [[1, 1]])
    assert now.policy.tolist() == [0.5, 1.5] and now.reference.tolist() == [1, 2]
    assert (now.step, count(now), now.skipped, now.applied) == (1, 1, 3, 0)
    assert numbers["skipped"] == 3 and jax.random.key_data(now.key).tolist() == [0, 3]


def test_one_that_may_be_skipped_counts_as_a_step_and_changes_nothing_else():
    now, numbers = run("skip", [FINE], [NAN], [FINE])
    assert now.policy.tolist() == [0, 1]
    assert (now.step, count(now), now.skipped, now.applied) == (3, 2, 1, 0)
    assert numbers["skipped"] == 1


def test_without_a_guard_nothing_is_looked_at():
    now, numbers = run("off", [FINE], [NAN])
    np.testing.assert_array_equal(now.policy, [np.nan, 1])
    assert (now.step, count(now), now.skipped, numbers["skipped"]) == (2, 2, 0, 0)


@pytest.mark.parametrize("guard", ["stop", "skip"])
def test_an_update_ends_at_its_first_step_that_is_not_finite(guard):
    """Of five optimizer steps two are taken; those after the third are not, finite as they are."""
    now, _ = run(guard, [FINE, FINE, NAN, FINE, FINE])
    assert now.policy.tolist() == [0, 1] and count(now) == 2
    assert (now.step, now.skipped, now.applied) == ((0, 1, 2) if guard == "stop" else (1, 1, 0))


def test_an_update_that_was_begun_is_finished():
    """`applied` steps are not taken again, whatever their gradients are now; the others follow."""
    stopped, _ = run("stop", [FINE, FINE, NAN, FINE])
    later, _ = run("stop", [FINE] * 4, state=copy(stopped))  # dispatched before the host knew: nothing moves any more
    assert later.policy.tolist() == [0, 1] and (later.step, later.skipped, later.applied) == (0, 2, 2)
    stopped = stopped.replace(skipped=jnp.int32(0))
    again, _ = run("stop", [FINE, FINE, NAN, FINE], state=copy(stopped))
    assert again.policy.tolist() == [0, 1] and (again.step, again.skipped, again.applied) == (0, 1, 2)
    resumed, _ = run("stop", [[9, 9], [9, 9], FINE, FINE], [FINE], state=stopped)
    assert resumed.policy.tolist() == [-1.5, -0.5]
    assert (resumed.step, count(resumed), resumed.skipped, resumed.applied) == (2, 5, 0, 0)


def copy(state):
    """One that may be donated."""
    return jax.tree.map(jnp.copy, state)


@pytest.mark.parametrize("tx", [COUNTS, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("where", ["given", "loss", "gradient"])
def test_where_it_looks(where, tx):
    bad = {name: jnp.float32(np.inf if name == where else 0) for name in ("given", "loss", "gradient")}
    given = {"scores": bad["given"][None], "ids": jnp.arange(3), "mask": None}
    now, _ = updater("stop", tx)(begin(tx), jnp.ones((1, 2)) + bad["gradient"], bad["loss"], given)
    assert now.skipped == 1 and now.policy.tolist() == [1, 2]
    assert_trees_equal(now.optimizer, begin(tx).optimizer)


def test_what_passes_through_is_not_looked_at():
    """It was finite when it came, and reading all of a reference each step would cost."""
    now = begin().replace(reference=jnp.array([np.inf, 1.0]))
    now, _ = run("stop", [[1, 1]], state=now)
    assert now.skipped == 0 and now.policy.tolist() == [0, 1]


def test_the_program_grows_with_the_leaves_and_not_with_their_square():
    """What XLA on a CPU compiles where every leaf is written or not by whether all are finite."""

    def ands(leaves):
        policy = {f"w{i}": jnp.ones(8 + i) for i in range(leaves)}
        state = TrainState.create(jax.random.key(0), policy=policy, optimizer={"policy": COUNTS.init(policy)})

        def update(state, grad):
            begun = optim.begin(state, ("policy",), grad, guard="stop")
            grads = jax.tree.map(lambda leaf: leaf * grad, state.policy)
            stepped, _ = optim.step(begun, state, {"policy": grads}, {"loss": grad}, tx=COUNTS, guard="stop")
            return optim.end(state, stepped, guard="stop")

        return jax.jit(update, donate_argnums=0).lower(state, jnp.float32(1)).compile().as_text().count(" and(")

    assert 0 < ands(32) < 2.5 * ands(16)  # 3.5 times, were all of it in every kernel


@given(st.lists(st.sampled_from([0.25, np.nan, np.inf]), max_size=6))
def test_skipping_is_as_if_the_bad_ones_had_not_been(grads):
    fine = [grad for grad in grads if np.isfinite(grad)]
    ours, theirs = (run("skip", *([[grad, grad]] for grad in some))[0] for some in (grads, fine))
    np.testing.assert_array_equal(ours.policy, theirs.policy)
    assert ours.skipped == len(grads) - len(fine) and ours.step == len(grads)


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_the_rates_are_the_schedule_at_each_step(schedule):
    config = optim.Config(lr=0.8, schedule=schedule, warmup=2, end_lr=0.1)
    lr = optim.schedule(config, 5)
    np.testing.assert_allclose(optim.rates(config, 5), [lr(i) for i in range(5)], rtol=1e-6)
    assert optim.rates(dataclasses.replace(config, warmup=0), 3).shape == (3,)  # a constant schedule is a number
