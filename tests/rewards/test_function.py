import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import function, sentiment
from rlhf_jax.rewards.function import Reward


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_numbers_are_the_reward():
    rewards_N, parts = Reward(lambda texts: [len(text) for text in texts], "length")(["a", "bcd"])
    np.testing.assert_array_equal(rewards_N, [1, 3])
    assert rewards_N.dtype == np.float32 and parts == {}


def test_components_are_summed_and_kept_apart():
    reward = Reward(lambda texts: {"one": [1] * len(texts), "length": [len(text) for text in texts]}, "both")
    rewards_N, parts = reward(["a", "bcd"])
    np.testing.assert_array_equal(rewards_N, [2, 4])
    np.testing.assert_array_equal(parts["length"], [1, 3])


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([1.0], "reward mine: expected 2 numbers, one a text; got shape (1,)"),
        (3.0, "reward mine: expected 2 numbers, one a text; got shape ()"),
        (["x", "y"], "reward mine: expected 2 numbers, got list"),
        (None, "reward mine: expected 2 numbers, one a text; got shape ()"),
        ([1.0, float("nan")], "reward mine: expected finite numbers, got nan for text 2 of 2"),
        ([float("inf"), 0.0], "reward mine: expected finite numbers, got inf for text 1 of 2"),
        ({}, "reward mine: expected at least one component, got none"),
        ({"tone": [1.0]}, "reward mine, tone: expected 2 numbers, one a text; got shape (1,)"),
    ],
)
def test_what_is_no_reward_is_one_line(result, told):
    assert message(lambda: Reward(lambda texts: result, "mine")(["a", "b"])) == told


def test_a_function_that_raises_is_named():
    def broken(texts):
        return {}[texts[0]]

    assert message(lambda: Reward(broken, "mine.py:broken")(["a"])) == "reward mine.py:broken: KeyError: 'a'"


def test_a_file_and_a_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def polite(texts):\n    return [float('please' in text) for text in texts]\n")
    rewards_N, _ = function.load(f"{path}:polite")(["yes please", "no"])
    np.testing.assert_array_equal(rewards_N, [1, 0])


def test_what_cannot_be_loaded_is_named(tmp_path):
    path, broken = tmp_path / "mine.py", tmp_path / "broken.py"
    path.write_text("polite = 3\n")
    broken.write_text("import no_such_module_here\n")
    assert message(lambda: function.load("happiness")).startswith("reward: expected sentiment, or path/to/file.py:func")
    assert message(lambda: function.load(f"{tmp_path}/none.py:f")) == f"reward: {tmp_path}/none.py: no such file"
    assert (
        message(lambda: function.load(f"{path}:polite")) == f"reward: {path}: expected a function 'polite', found none"
    )
    assert message(lambda: function.load(f"{broken}:f")).startswith(f"reward: {broken}: ModuleNotFoundError: No module")


def test_sentiment_is_vaders_compound():
    """The example of VADER's own documentation, and its mirror image."""
    good, bad, none = sentiment.compound(["VADER is smart, handsome, and funny.", "A horrible, ugly book", "the of"])
    assert good == 0.8316 and bad < -0.5 and none == 0
    np.testing.assert_allclose(function.load("sentiment")(["VADER is smart, handsome, and funny."])[0], [0.8316])
