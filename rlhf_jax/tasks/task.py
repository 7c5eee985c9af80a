"""What every task has: rows, their arrays, and the held-out questions that policies are compared on."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from rlhf_jax.text import Tokenizer

Arrays = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Rows of one kind, on both sides of the split."""

    train: list[dict]
    held_out: list[dict]
    notes: tuple[str, ...] = ()  # what was left out


class Encoded(NamedTuple):
    """The arrays of such rows, as data/batches.py makes them; `index_N` is each one's place in the rows."""

    train: Arrays
    held_out: Arrays
    notes: tuple[str, ...] = ()  # what was read, cut or skipped


def stamp(files: dict[str, str]) -> tuple:
    """A key that changes with the files of `Task.files`, so that a long-lived process reads changed rows again."""
    paths = sorted(map(Path, files.values()))
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path in paths if path.exists() and (stat := path.stat()))


class Task(Protocol):
    """A task's values and functions. Each raises InputError, naming the field, file and row at fault."""

    @property
    def name(self) -> str:
        """What plots call it."""

    @property
    def response_length(self) -> int:
        """R, tokens, EOS included."""

    @property
    def prompt_length(self) -> int:
        """P, tokens."""

    @property
    def same_prompt(self) -> bool:
        """Every question is the same: samples are of one distribution."""

    @property
    def questions(self) -> dict[str, str]:
        """{kind that a stage trains on: kind whose held-out prompts its policy is sampled on}"""

    def files(self) -> dict[str, str]:
        """{field of the config: path} of the local files that the rows are read from."""

    def texts(self) -> list[str]:
        """The texts that a tokenizer is trained on."""

    def rows(self, kind: str) -> Rows:
        """The rows of a kind."""

    def arrays(self, kind: str, tokenizer: Tokenizer) -> Encoded:
        """The arrays of these rows."""

    def judge(self, rows: list[dict], texts: list[str]) -> dict[str, np.ndarray]:
        """{name: [N]}: numbers of the completions that need no model; may be empty."""
