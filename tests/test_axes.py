"""Every letter in the name of an array is in the key of array axes, and the key has no other."""

import re
from pathlib import Path

import pytest

import rlhf_jax

FILES = sorted(Path(rlhf_jax.__file__).parent.rglob("*.py"))
KEY = re.findall(r"^    ([A-Z])  \S", rlhf_jax.__doc__, flags=re.MULTILINE)

SUFFIX = re.compile(r"(?<!\w)[a-z]\w*_([A-Z0-9]*[A-Z][A-Z0-9]*)(?!\w)")  # of hidden_B1D: B1D
SHAPE = re.compile(r"\[([^\[\]\n]*)\]")  # [B, T, ...]


def letters(source):
    """The axes that a text of Python names, in code, strings and comments alike."""
    suffixes = "".join(SUFFIX.findall(source))
    shapes = ", ".join(SHAPE.findall(source)).split(", ")
    return {*re.findall("[A-Z]", suffixes), *(axis for axis in shapes if re.fullmatch("[A-Z]", axis))}


def test_letters_are_found():
    assert letters("hidden_B1D = x_TK[:, 0]  # [B, U, ...]\nMAX_TOKENS, _SLOT = h_0, adam") == {*"BDTKU"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_every_axis_is_in_the_key(file):
    assert letters(file.read_text(encoding="utf-8")) <= {*KEY}


def test_every_letter_of_the_key_is_an_axis_and_has_one_meaning():
    sources = [
        file.read_text(encoding="utf-8")
        for file in FILES
        if file.parent != FILES[0].parent or file.name != "__init__.py"
    ]
    assert sorted(KEY) == sorted(set().union(*map(letters, sources)))
