import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.training import guard
from rlhf_jax.training.state import TrainState
from tests.support import assert_trees_equal


def state():
    policy, reference = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 2.0])}
    return TrainState.create(jax.random.key(3), policy=policy, reference=reference, optimizer={"policy": jnp.int32(7)})


def incident(**more):
    batch = {"tokens": np.arange(6).reshape(2, 3), "mask": np.ones((2, 3), bool)}
    return guard.Incident(
        stage="sft", step=4, names=("sft/loss",), config={"seed": 1}, state=state(), batch=batch, **more
    )


def test_an_incident_is_read_as_it_was_written(tmp_path):
    made = incident()
    folder = guard.write(tmp_path, made)
    assert folder == tmp_path / "incident" / "sft-4"
    record = guard.read(folder)
    assert {"stage": "sft", "step": 4, "names": ["sft/loss"], "config": {"seed": 1}}.items() <= record.items()
    assert record["key"] == [0, 3] and "jax" in record["versions"]
    again, arrays, rollout = guard.read_arrays(folder, state().replace(policy={"w": jnp.zeros(2)}))
    assert again.policy["w"].tolist() == [1, 2] and again.optimizer["policy"] == 7
    assert jax.random.key_data(again.key).tolist() == [0, 3]
    assert arrays.keys() == made.batch.keys() and rollout is None
    assert all((arrays[name] == made.batch[name]).all() for name in made.batch)


def test_what_a_policy_algorithm_was_given_is_kept_too(tmp_path):
    rollout = {"score_B": jnp.array([np.nan, 1.0]), "values_BR": None}
    folder = guard.write(tmp_path, incident(rollout=rollout))
    assert_trees_equal(guard.read_arrays(folder, state())[2], {"score_B": np.array([np.nan, 1.0]), "values_BR": None})


@pytest.mark.parametrize(
    ("names", "expected"), [(("sft/loss", "sft/grad_norm"), "sft/loss, sft/grad_norm"), ((), "the gradients")]
)
def test_what_was_not_finite_in_a_line(names, expected):
    assert guard.message(names) == expected


def test_a_folder_without_an_incident(tmp_path):
    with pytest.raises(InputError, match="incident.json: expected the record of an incident"):
        guard.read(tmp_path)
