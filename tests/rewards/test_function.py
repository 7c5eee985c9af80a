import contextlib
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import rewards
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import Completions, function, sentiment
from rlhf_jax.rewards.function import Function
from rlhf_jax.training import loop
from tests.support import error

CASES = Path(__file__).parent / "files"  # reward files as users write them


def scores(reward, texts, rows=()):
    return Function(reward, "mine").scores(rows, texts)


def test_numbers_are_the_reward():
    components = scores(lambda texts: [len(text) for text in texts], ["a", "bcd"])
    np.testing.assert_array_equal(components["reward"], [1, 3])
    assert components.keys() == {"reward"} and components["reward"].dtype == np.float32
    np.testing.assert_array_equal(rewards.total(components), [1, 3])


def test_components_are_summed_and_kept_apart():
    components = scores(lambda texts: {"one": [1] * len(texts), "length": [len(text) for text in texts]}, ["a", "bcd"])
    assert components.keys() == {"reward_one", "reward_length"}
    np.testing.assert_array_equal(rewards.total(components), [2, 4])
    np.testing.assert_array_equal(components["reward_length"], [1, 3])


def test_a_function_of_rows_and_texts():
    """It sees all columns of the rows; a third parameter has a default and is none of the two."""
    rows = [{"answer": "4"}, {"answer": "5"}]

    def correct(rows, texts, *, partly=0.5):
        return [float(text == row["answer"]) or partly for row, text in zip(rows, texts, strict=True)]

    reward = Function(correct, "mine")
    assert reward.takes_rows and not Function(lambda texts, weight=2: texts, "mine").takes_rows
    np.testing.assert_array_equal(reward.scores(rows, ["4", "4"])["reward"], [1, 0.5])


@pytest.mark.parametrize("parameters", ["", "a, b, c", "texts, *, key", "**texts"])
def test_a_function_of_other_parameters_is_refused_before_it_is_called(parameters):
    function = eval(f"lambda {parameters}: []")
    expected = f"reward mine: expected a function of texts, or of rows and texts, got one of ({parameters})"
    assert error(Function, function, "mine") == expected


def test_an_async_function_is_refused():
    async def score(texts):
        return []

    assert error(Function, score, "mine").endswith("got one of (texts), async")


def test_a_function_is_given_copies():
    """What it does to its lists is not done to ours."""

    def empties(rows, texts):
        count = len(texts)
        rows.clear(), texts.clear()
        return [0.0] * count

    rows, texts = [{"answer": "4"}], ["4"]
    np.testing.assert_array_equal(scores(empties, texts, rows)["reward"], [0])
    assert rows == [{"answer": "4"}] and texts == ["4"]


class Drawn:
    """What a reward sees of a Rollout here."""

    response_BR, mask_BR = [[3, 4], [5, 0]], [[1, 1], [1, 0]]


def test_a_reward_of_completions():
    """As training calls it: rows and tokens, which are decoded once, when first asked for."""
    decoded = []

    def decode(response_BR, mask_BR):
        decoded.append((response_BR, mask_BR))
        return ["4", "x"]

    reward = Function(lambda rows, texts: [float(r["answer"] == t) for r, t in zip(rows, texts, strict=True)], "mine")
    completions = Completions([{"answer": "4"}, {"answer": "4"}], Drawn, decode)
    assert not decoded
    for _ in range(2):
        np.testing.assert_array_equal(reward(None, completions)["reward"], [1, 0])
    assert decoded == [(Drawn.response_BR, Drawn.mask_BR)]
    assert (reward.name, reward.metric, reward.on_host, reward.params) == ("mine", "reward", True, None)


@pytest.mark.parametrize(
    ("result", "expected"),
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
def test_what_is_no_reward_is_one_line(result, expected):
    assert error(scores, lambda texts: result, ["a", "b"]) == expected


def test_a_function_that_raises_is_named_with_its_line():
    def broken(texts):
        return {}[texts[0]]

    line = broken.__code__.co_firstlineno + 1
    expected = f"reward mine.py:broken: KeyError: 'a' (test_function.py:{line})"
    assert error(Function(broken, "mine.py:broken").scores, (), ["a"]) == expected


class Boom(BaseException):
    """No Exception, as SystemExit and a library's own."""


def test_whatever_a_function_raises_is_one_line_with_its_own_line():
    """Not the line of the library that it calls; text over several lines is one."""

    def library(texts):
        return json.loads("{")

    def boom(texts):
        raise Boom("two\n  lines")

    def silent(texts):
        raise ValueError

    for raises, words in (library, "JSONDecodeError: Expecting"), (boom, "Boom: two lines"), (silent, "ValueError"):
        line = raises.__code__.co_firstlineno + 1
        message = error(Function(raises, "mine").scores, (), ["a"])
        assert message.startswith(f"reward mine: {words}") and message.endswith(f" (test_function.py:{line})")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, loop.Stopped])
def test_a_signal_is_no_fault_of_the_function(signal):
    def interrupted(texts):
        raise signal

    with pytest.raises(signal):
        scores(interrupted, ["a"])


def test_what_is_waited_for_is_said():
    waited = []

    @contextlib.contextmanager
    def waiting(text):
        waited.append(text)
        yield
        waited.append("done")

    Function(lambda texts: [len(waited)] * len(texts), "mine", waiting).scores((), ["a", "b"])
    assert waited == ["the reward of 2 texts", "done"]


# Files


def test_a_file_and_a_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def polite(texts):\n    return [float('please' in text) for text in texts]\n")
    reward = function.load(f"{path}:polite")
    np.testing.assert_array_equal(reward.scores((), ["yes please", "no"])["reward"], [1, 0])
    assert reward.name == f"{path}:polite"


@pytest.fixture(autouse=True)
def imports(monkeypatch):
    """What a file imports is forgotten again."""
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    function._module.cache_clear()
    yield
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ints", [3, 4]), ("bools", [0, 1]), ("strs", [3, 4]), ("same", [1, 1]), ("mutate", [0, 0]),
        ("gen", "expected 2 numbers, got generator"),
        ("col", "expected 2 numbers, one a text; got shape (2, 1)"),
        ("none", "expected 2 numbers, one a text; got shape ()"),
        ("nones", "expected finite numbers, got nan for text 1 of 2"),
        ("big", "expected finite numbers, got inf for text 1 of 2"),
        ("exits", "SystemExit: 3 (kinds.py:49)"),
    ],
)  # fmt: skip
def test_kinds_of_results(name, expected):
    """Numbers of any kind are taken; all else, SystemExit in a user's code too, is one line."""
    reward = function.load(f"{CASES}/kinds.py:{name}")
    if isinstance(expected, str):
        assert error(reward.scores, (), ["bad", "good"]) == f"reward {CASES}/kinds.py:{name}: {expected}"
    else:
        np.testing.assert_array_equal(reward.scores((), ["bad", "good"])["reward"], expected)


def test_a_file_may_have_dataclasses_with_annotations_as_texts():
    """They look up their module by its name: `rules`, or a longer one where another file has taken that."""
    reward = function.load(f"{CASES}/rules.py:score")
    np.testing.assert_array_equal(reward.scores((), ["good good", "bad"])["reward"], [2, -1])
    assert sys.modules[reward._function.__module__].score is reward._function


def test_a_file_may_import_its_neighbours():
    reward = function.load(f"{CASES}/sibling.py:score")
    np.testing.assert_array_equal(reward.scores((), ["bad", "good"])["reward"], [0, 1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_a_file_may_use_a_process_pool():
    """Its functions are pickled by the name of their module."""
    reward = function.load(f"{CASES}/pool.py:score")
    np.testing.assert_array_equal(reward.scores((), ["bad", "good"])["reward"], [3, 4])


@pytest.mark.parametrize("name", ["json", "pyclbr", "mine"])
def test_files_with_the_name_of_another_module(name, tmp_path):
    """json.py of a user, or one of a name that nobody has imported yet, is not the one that others import; and two
    files of one name are two."""
    there = sys.modules.get(name)
    folders = [tmp_path / folder for folder in ("one", "two")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / f"{name}.py").write_text(f"def score(texts):\n    return [{number}.0 for _ in texts]\n")
    loaded = [function.load(f"{folder}/{name}.py:score") for folder in folders]
    assert [float(reward.scores((), ["a"])["reward"][0]) for reward in loaded] == [0, 1]
    names = {reward._function.__module__ for reward in loaded}
    assert len(names) == 2 and all(sys.modules[name].score for name in names)
    if name != "mine":
        assert sys.modules.get(name) is there and not hasattr(importlib.import_module(name), "score")


def test_a_file_is_imported_once_as_long_as_it_stays_the_same(tmp_path):
    """A process pool needs the very function that the module has, and a file may load a model."""
    path = tmp_path / "imported_once.py"
    path.write_text("def f(texts):\n    return [0] * len(texts)\n")
    first, second = (function.load(f"{path}:f") for _ in range(2))
    assert first._function is second._function is sys.modules["imported_once"].f
    path.write_text("def f(texts):\n    return [1, 1][: len(texts)]\n")
    assert function.load(f"{path}:f").scores((), ["a"])["reward"] == [1]


def test_what_cannot_be_loaded_is_named(tmp_path):
    path, broken, ends = tmp_path / "mine.py", tmp_path / "broken.py", tmp_path / "ends.py"
    path.write_text("polite = 3\n")
    broken.write_text("import no_such_module_here\n")
    ends.write_text("import sys\nsys.exit('no key')\n")
    message = error(function.load, "happiness")
    known = "learned, sentiment, gold, rouge, exact, partial or path/to/file.py:function"
    assert message == f"reward: expected {known}; got 'happiness'"
    assert error(function.load, f"{tmp_path}/none.py:f") == f"reward: {tmp_path}/none.py: no such file"
    assert error(function.load, f"{path}:polite") == f"reward: {path}: expected a function 'polite', found none"
    message = error(function.load, f"{broken}:f")
    assert message == f"reward: {broken}: ModuleNotFoundError: No module named 'no_such_module_here' (broken.py:1)"
    assert error(function.load, f"{ends}:f") == f"reward: {ends}: SystemExit: no key (ends.py:2)"
    assert "broken" not in sys.modules and "ends" not in sys.modules


def test_a_file_is_known_by_its_hash(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(texts):\n    return [0] * len(texts)\n")
    before = function.fingerprint(f"{path}:f")
    path.write_text("def f(texts):\n    return [1] * len(texts)\n")
    assert len(before) == 64 and before != function.fingerprint(f"{path}:f")
    assert function.fingerprint("sentiment") == ""
    with pytest.raises(InputError, match="no such file"):
        function.fingerprint(f"{tmp_path}/none.py:f")


def test_sentiment_is_vaders_compound():
    """The example of VADER's own documentation, and its mirror image."""
    good, bad, none = sentiment.compound(["VADER is smart, handsome, and funny.", "A horrible, ugly book", "the of"])
    assert good == 0.8316 and bad < -0.5 and none == 0
    components = function.load("sentiment").scores((), ["VADER is smart, handsome, and funny."])
    np.testing.assert_allclose(components["reward"], [0.8316])
