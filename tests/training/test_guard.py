import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.training import guard
from rlhf_jax.training.state import TrainState


def state():
    policy, reference = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 2.0])}
    return TrainState.create(jax.random.key(3), policy=policy, reference=reference, optimizer={"policy": jnp.int32(7)})


def update(state, grad):
    """w <- w - grad."""
    policy = {"w": state.policy["w"] - grad}
    new = state.replace(step=state.step + 1, policy=policy, optimizer={"policy": state.optimizer["policy"] + 1})
    return new, {"a/loss": jnp.sum(grad), "a/sum": jnp.float32(0)}


# Compiled and donated, as a stage does it.
STEPS = {
    action: jax.jit(guard.guarded(update, guard.Config(action=action)), donate_argnums=0) for action in ("stop", "skip")
}


def run(action, *grads):
    """The state and the numbers after the last of the gradients."""
    now, numbers = state(), {}
    for grad in grads:
        now, numbers = STEPS[action](now, jnp.broadcast_to(jnp.asarray(grad, jnp.float32), 2))
    return now, numbers


def test_what_is_finite_passes():
    now, numbers = run("stop", [0.5, 0.5], [0.5, 1.5])
    assert now.policy["w"].tolist() == [0, 0]
    assert (now.step, now.optimizer["policy"], now.skipped) == (2, 9, 0)
    assert (numbers["a/loss"], numbers["a/skipped"]) == (2, 0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_the_first_that_is_not_finite_is_the_last(wrong):
    """All stays as it was before it, bit for bit, though the next one was dispatched and is finite."""
    now, numbers = run("stop", [0.5, 0.5], [wrong, 0.5], [1, 1])
    assert now.policy["w"].tolist() == [0.5, 1.5]
    assert (now.step, now.optimizer["policy"], now.skipped) == (1, 8, 2)
    assert numbers["a/skipped"] == 2 and jax.random.key_data(now.key).tolist() == [0, 3]


def test_one_that_may_be_skipped_counts_as_a_step_and_changes_nothing_else():
    now, _ = run("skip", [0.5, 0.5], [np.nan, 0.5], [0.5, 0.5])
    assert now.policy["w"].tolist() == [0, 1]
    assert (now.step, now.optimizer["policy"], now.skipped) == (3, 9, 1)


@pytest.mark.parametrize("where", ["arguments", "numbers", "parameters"])
def test_where_it_looks(where):
    def add(state, batch):
        bad = {name: jnp.float32(np.inf if name == where else 0) for name in ("numbers", "parameters")}
        return state.replace(policy={"w": state.policy["w"] + bad["parameters"]}), {"a/x": bad["numbers"]}

    batch = {"scores": jnp.array([np.nan if where == "arguments" else 1.0]), "ids": jnp.arange(3)}
    now, _ = guard.guarded(add, guard.Config())(state(), batch)
    assert now.skipped == 1 and now.policy["w"].tolist() == [1, 2]


def test_what_passes_through_is_not_looked_at():
    """It was finite when it came, and reading all of a reference each step would cost."""
    now = state().replace(reference={"w": jnp.array([np.inf, 1.0])})
    now, _ = STEPS["stop"](now, jnp.ones(2))
    assert now.skipped == 0 and now.policy["w"].tolist() == [0, 1]


def test_the_program_grows_with_the_leaves_and_not_with_their_square():
    """What XLA on a CPU compiles where every leaf is written or not by whether all are finite."""

    def ands(leaves):
        policy = {f"w{i}": jnp.ones(8 + i) for i in range(leaves)}
        step = jax.jit(guard.guarded(shrink, guard.Config()), donate_argnums=0)
        program = step.lower(TrainState.create(jax.random.key(0), policy=policy), jnp.float32(1)).compile()
        return program.as_text().count(" and(")

    def shrink(state, grad):
        return state.replace(policy={name: leaf - grad for name, leaf in state.policy.items()}), {"a/loss": grad}

    assert 0 < ands(32) < 2.5 * ands(16)  # 3.5 times, were all of it in every kernel


@given(st.lists(st.sampled_from([0.25, np.nan, np.inf]), max_size=6))
def test_skipping_is_as_if_the_bad_ones_had_not_been(grads):
    fine = [grad for grad in grads if np.isfinite(grad)]
    ours, theirs = run("skip", *grads)[0], run("skip", *fine)[0]
    np.testing.assert_array_equal(ours.policy["w"], theirs.policy["w"])
    assert ours.skipped == len(grads) - len(fine) and ours.step == len(grads)


def test_an_incident_is_read_as_it_was_written(tmp_path):
    batch = {"tokens": np.arange(6).reshape(2, 3), "mask": np.ones((2, 3), bool)}
    incident = guard.Incident(
        stage="sft", step=4, names=("sft/loss",), kind="Writing", config={"seed": 1}, state=state(), batch=batch
    )
    folder = guard.write(tmp_path, incident)
    assert folder == tmp_path / "incident" / "sft-4"
    told = guard.read(folder)
    assert {"stage": "sft", "step": 4, "names": ["sft/loss"], "kind": "Writing", "config": {"seed": 1}}.items() <= (
        told.items()
    )
    assert told["key"] == [0, 3] and "jax" in told["versions"]
    again, arrays = guard.read_arrays(folder, state().replace(policy={"w": jnp.zeros(2)}))
    assert again.policy["w"].tolist() == [1, 2] and again.optimizer["policy"] == 7
    assert jax.random.key_data(again.key).tolist() == [0, 3]
    assert arrays.keys() == batch.keys() and all((arrays[name] == batch[name]).all() for name in batch)


def test_a_folder_without_an_incident(tmp_path):
    with pytest.raises(InputError, match="incident.json: expected the record of an incident"):
        guard.read(tmp_path)
