"""Docstrings, comments and strings use the field's words: message, requested, tripped; not told, asked, rung."""

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("rlhf_jax", "experiments", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]
WORDS = re.compile(r"\b(told|asked|rung|heard|spoken)\b", re.IGNORECASE)

# Temporary exceptions, to be emptied after the merge.
EXCEPTED = set()


def name(path):
    return path.relative_to(ROOT).as_posix()


def texts(path):
    """(line, text) of every comment and every string: docstrings too, and f-strings without their expressions."""
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def problems(path):
    return [f"{line}: {word}" for line, text in texts(path) for word in WORDS.findall(text)]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_words_are_those_of_the_field(path):
    assert name(path) in EXCEPTED or problems(path) == []


def test_every_kind_of_text_is_searched(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""It is told."""\n'
        "asked = 1  # Asked for\n"
        'x = f"rung {asked} twice"\n'
        "y = 'unheard, untold'\n"
        'z = "heard and SPOKEN"\n'
    )
    assert sorted(problems(path)) == ["1: told", "2: Asked", "3: rung", "5: SPOKEN", "5: heard"]
