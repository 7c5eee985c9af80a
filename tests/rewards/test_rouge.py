"""ROUGE-L of completions with the references of their rows."""

import pytest

from rlhf_jax.data.files import Row
from rlhf_jax.rewards import function
from tests.support import error

ROW = {"prompt": "p", "label": "the cat sat on the mat"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat on a mat.", 8 / 11),  # the cat on mat: p = 4/5, r = 4/6, F = 2 (4/5) (4/6) / (4/5 + 4/6)
        ("mat the on sat cat the", 3 / 6),  # the order counts: the cat the, p = r = 3/6
        ("the cat sat on the mat", 1),
        ("cats", 0),  # no stemming
        ("", 0),
    ],
)
def test_by_hand(text, expected):
    scores = function.load("rouge").scores([ROW], [text])
    assert scores == {"reward": pytest.approx([expected])}


def test_each_text_has_its_own_reference():
    rows = [ROW, {"label": "a dog"}]
    assert function.load("rouge").scores(rows, ["a dog", "a dog"])["reward"].tolist() == [0, 1]


def test_a_row_without_a_reference_is_named():
    found = error(function.load("rouge").scores, [ROW, Row({"prompt": "p"}, "rows.jsonl:2")], ["a", "b"])
    assert found.startswith("reward rouge: ") and "rows.jsonl:2: expected a text 'label' to compare" in found
