"""What the stages of a run have in common: keys, held-out questions, texts of responses, rows on the device."""

from unittest import mock

import jax
import numpy as np
import pytest

from rlhf_jax import hosts
from rlhf_jax.data import batches
from rlhf_jax.stages import PURPOSES
from tests.support import changed, smallest, stages


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return smallest(tmp_path_factory.mktemp("world"))


def test_every_purpose_has_a_key_of_its_own(config, tmp_path):
    setup = stages(config, tmp_path).setup
    keys = {tuple(jax.random.key_data(setup.key(purpose)).tolist()) for purpose in PURPOSES}
    assert len(keys) == len(PURPOSES)


def test_responses_as_texts(config, tmp_path):
    setup = stages(config, tmp_path).setup
    a, b, space = setup.tokenizer.encode("ab ")
    eos, pad = setup.tokenizer.eos_id, setup.tokenizer.pad_id
    response_BR = jax.numpy.array([[space, a, b, eos, pad], [a, space, b, b, b]])
    assert setup.decode(response_BR, jax.numpy.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])) == ["ab", "a b"]


def test_policies_are_compared_on_the_first_held_out_rows_that_could_be_encoded(config, tmp_path):
    setup = stages(changed(config, data={"response_length": 60}, evaluation={"prompts": 3}), tmp_path).setup
    held_out = setup.arrays("sft").held_out
    assert held_out["index_N"].tolist()[:3] != [0, 1, 2]
    arrays, questions = setup.questions("sft")
    assert len(questions) == 3 and arrays is held_out
    for i, row in enumerate(questions):
        ids = held_out["prompt_NP"][i][held_out["prompt_mask_NP"][i]]
        assert setup.tokenizer.decode(ids) == row["prompt"]
        texts = setup.decode(held_out["response_NR"][i : i + 1], held_out["response_mask_NR"][i : i + 1])
        assert texts == [row["label"]]


ARRAYS = {"x_NP": np.arange(30, dtype=np.float32).reshape(10, 3), "index_N": np.arange(10)}


@pytest.mark.parametrize(
    ("size", "rows", "shapes"), [(4, None, [4, 4, 4]), (4, 7, [4, 4]), (5, None, [5, 5]), (99, 7, [7])]
)
def test_a_device_batch_at_a_time_is_as_one_big_batch(size, rows, shapes, config, tmp_path):
    """The last batch is filled up, which compiles nothing new, and cut off."""
    setup = stages(changed(config, evaluation={"batch": size}), tmp_path).setup
    seen = []

    def function(batch):
        seen.append(len(batch["x_BP"]))
        return {"sum": batch["x_BP"].sum(axis=1), "pair": (batch["index_B"], 2 * batch["x_BP"])}

    with mock.patch.object(hosts, "pause", lambda: seen.append("pause")):
        ours = setup.over(ARRAYS, function, rows)
    expected = {"sum": ARRAYS["x_NP"].sum(axis=1), "pair": (ARRAYS["index_N"], 2 * ARRAYS["x_NP"])}
    jax.tree.map(np.testing.assert_array_equal, ours, jax.tree.map(lambda x: x[:rows], expected))
    assert seen[::2] == ["pause"] * len(shapes) and seen[1::2] == shapes
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(ours))


def test_the_order_of_the_rows_and_the_noise_of_the_steps_have_different_keys(config, tmp_path):
    """One key for both would reuse the bits of the first steps: split and fold_in of a key can be the same."""
    setup = stages(config, tmp_path).setup
    order = setup.key("sft order")
    steps = [setup.key("sft"), *(jax.random.fold_in(setup.key("sft"), i) for i in range(10))]
    bits = {tuple(jax.random.key_data(key).tolist()) for key in steps}
    assert {tuple(jax.random.key_data(key).tolist()) for key in (order, *jax.random.split(order))}.isdisjoint(bits)
    seed = int(jax.random.randint(order, (), 0, 2**31 - 1))
    expected = batches.batch_at(setup.arrays("sft").train, batch=4, seed=seed)(2)
    ours = setup.batch_at("sft", 4, "sft", "sft.batch")(2)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
