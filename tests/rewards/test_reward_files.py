"""Reward files of all kinds: each behaves as a plain import, and what is no reward is refused in one line."""

import sys

import numpy as np
import pytest

from rlhf_jax.rewards import function
from tests.support import error

# Files that went wrong once.
RULES = """\
from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Rule:
    word: str
    weight: float


RULES = [Rule("good", 1.0), Rule("bad", -1.0)]


def score(texts):
    return [sum(rule.weight * text.count(rule.word) for rule in RULES) for text in texts]
"""
POOL = """\
from concurrent.futures import ProcessPoolExecutor


def one(text):
    return float(len(text))


def score(texts):
    with ProcessPoolExecutor(1) as pool:
        return list(pool.map(one, texts))
"""
SIBLING = """\
from words import GOOD


def score(texts):
    return [float(GOOD in text) for text in texts]
"""
KINDS = """\
import numpy as np
def ints(texts): return [len(t) for t in texts]
def bools(texts): return [len(t) > 3 for t in texts]
def gen(texts): return (float(len(t)) for t in texts)
def col(texts): return np.array([[len(t)] for t in texts])
def strs(texts): return [str(len(t)) for t in texts]
def none(texts): return None
def nones(texts): return [None for t in texts]
def big(texts): return [1e39 for t in texts]
def same(texts): return [1.0 for t in texts]
def mutate(texts):
    n = len(texts); texts.clear(); return [0.0] * n
def exits(texts): raise SystemExit(3)
"""
TEXTS = ["good", "so good", "bad"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files; what they import is forgotten afterwards."""
    files = {"rules": RULES, "pool": POOL, "sibling": SIBLING, "kinds": KINDS, "words": 'GOOD = "good"\n'}
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in files:
        sys.modules.pop(name, None)


def scores(folder, spec):
    """What the function of a file gives the texts, of which it may do anything with its own copy."""
    texts = list(TEXTS)
    (values_N,) = function.load(f"{folder}/{spec}").scores([], texts).values()
    assert texts == TEXTS
    return values_N.tolist()


def test_a_file_with_a_dataclass(folder):
    assert scores(folder, "rules.py:score") == [1, 1, -1]


def test_a_file_with_a_pool_of_processes(folder):
    assert scores(folder, "pool.py:score") == [4, 7, 3]


def test_a_file_that_imports_its_neighbour(folder):
    assert scores(folder, "sibling.py:score") == [1, 1, 0]


def test_files_of_one_name_are_two(folder):
    """As `a/score.py` and `b/score.py` of two runs in one process."""
    first, other = folder / "rules.py", folder / "other" / "rules.py"
    other.parent.mkdir()
    other.write_text("def score(texts):\n    return [7.0 for text in texts]\n")
    assert scores(folder, "rules.py:score") == [1, 1, -1]
    assert scores(folder, "other/rules.py:score") == [7, 7, 7]
    assert sys.modules["rules"].__file__ == str(first)
    assert scores(folder, "rules.py:score") == [1, 1, -1]


def test_a_file_is_run_once_until_it_changes(folder):
    """It may load a model, or count."""
    path = folder / "rules.py"
    code = "from pathlib import Path\nwith open(Path(__file__).with_name('runs'), 'a') as file:\n    file.write('x')\n"
    path.write_text(RULES + code)
    assert scores(folder, "rules.py:score") == scores(folder, "rules.py:score") == [1, 1, -1]
    assert (folder / "runs").read_text() == "x"
    path.write_text(RULES.replace("1.0", "2.00") + code)
    assert scores(folder, "rules.py:score") == [2, 2, -2]
    assert (folder / "runs").read_text() == "xx"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ints", [4, 7, 3]),
        ("bools", [1, 1, 0]),
        ("same", [1, 1, 1]),
        ("mutate", [0, 0, 0]),
    ],
)
def test_results_that_are_a_reward(name, expected, folder):
    assert scores(folder, f"kinds.py:{name}") == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gen", "expected 3 numbers, got generator"),
        ("col", "expected 3 numbers, one a text; got shape (3, 1)"),
        ("none", "expected 3 numbers"),
        ("nones", "expected "),
        ("big", "expected finite numbers, got inf for text 1 of 3"),
        ("exits", "SystemExit: 3 (kinds.py:13)"),
    ],
)
def test_results_that_are_none(name, words, folder):
    assert error(scores, folder, f"kinds.py:{name}").startswith(f"reward {folder}/kinds.py:{name}: {words}")


def test_texts_of_numbers_are_numbers(folder):
    """NumPy reads them."""
    assert scores(folder, "kinds.py:strs") == [4, 7, 3]


def test_the_values_are_float32(folder):
    assert function.load(f"{folder}/kinds.py:ints").scores([], TEXTS)["reward"].dtype == np.float32
