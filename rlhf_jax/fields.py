"""Fields of config dataclasses that carry their own checks: the range of a number, the choices of a text, a path.

    @dataclasses.dataclass(frozen=True)
    class Config:
        clip: float = number(0.2, above=0, most=10)
        schedule: str = choice("linear", "linear", "cosine", "constant")
        remat: bool = neutral(False)
        init: str = path()

        def problems(self):
            if self.batch % self.microbatches:
                yield "batch", f"a multiple of microbatches = {self.microbatches}"

        def unused(self):
            if self.schedule == "constant":
                yield "end_lr", "schedule is constant"

`check` refuses a config by the first field that is wrong, in one line that names the field. A field declared
`neutral=True` changes no number of a run: a workdir may be continued with another value of it. `expanded` puts the home
folder in the place of ~ in paths, `unused` finds the fields that have no effect with the values of the others, and
`comments` reads what the source says of each field.
"""

import ast
import dataclasses
import functools
import inspect
import io
import math
import os
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from rlhf_jax.errors import InputError, short

LARGEST = 1e9  # default upper limit: a larger number is a typing error, and float32 would overflow


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may have; both ends included, `above` and `below` excluded."""

    least: float = -math.inf
    most: float = LARGEST
    above: float = -math.inf
    below: float = math.inf
    or_zero: bool = False  # 0 is allowed too: it switches something off

    def __contains__(self, value: float) -> bool:
        inside = self.least <= value <= self.most and self.above < value < self.below  # False for NaN
        return inside or (self.or_zero and value == 0)

    def expected(self, value: float) -> str:
        """The range in words. The upper limit that all numbers have is left out where the value is within it."""
        low = f"more than {self.above:g}" if self.above > self.least else f"at least {self.least:g}"
        high = f"less than {self.below:g}" if self.below <= self.most else f"at most {self.most:g}"
        high = "" if self.most == LARGEST < self.below and value <= LARGEST else high
        low = low if max(self.least, self.above) > -math.inf else ""
        text = " and ".join(filter(None, (low, high)))
        return f"0, or {text}" if self.or_zero else text


def number(default: Any, *, neutral: bool = False, **limits: Any) -> Any:
    """A numeric field within Range(**limits)."""
    return dataclasses.field(default=default, metadata={"range": Range(**limits), "neutral": neutral})


def choice(default: str, *choices: str, neutral: bool = False) -> Any:
    """A text field that is one of the choices."""
    return dataclasses.field(default=default, metadata={"choices": choices, "neutral": neutral})


def neutral(default: Any) -> Any:
    """A field that changes no number of a run."""
    return dataclasses.field(default=default, metadata={"neutral": True})


def path(default: str = "", *, neutral: bool = False) -> Any:
    """A text field that is, or may be, a path on this machine, or empty; `expanded` reads ~ at its beginning."""
    return dataclasses.field(default=default, metadata={"path": True, "neutral": neutral})


def expanded(config: Any) -> Any:
    """The dataclass, and the dataclasses in it, with the home folder in the place of ~ in every path field."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = expanded(value)
        elif field.metadata.get("path"):
            changes[field.name] = os.path.expanduser(value)
    return dataclasses.replace(config, **changes)


def check(config: Any, path: str = "") -> None:
    """Raises InputError for the first field of a dataclass, or of the dataclasses in it, that is out of its range.

    `problems(self)`, where a dataclass has it, yields (field, what was expected) of checks that concern several fields.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{path}{field.name}.")
        elif "range" in field.metadata and value not in field.metadata["range"]:
            _refuse(f"{path}{field.name}", field.metadata["range"].expected(value), value)
        elif "choices" in field.metadata and value not in field.metadata["choices"]:
            _refuse(f"{path}{field.name}", " or ".join(field.metadata["choices"]), value)
    for name, expected in getattr(config, "problems", tuple)():
        _refuse(f"{path}{name}", expected, getattr(config, name))


def numbers(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("ppo.clip", its dataclass field) of every numeric field of a dataclass and of the dataclasses in it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{path}{field.name}.")
        elif type(value) in (int, float):
            yield f"{path}{field.name}", field


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(path, dataclass field, value) of every field that is no dataclass itself. A path has the names of the flags."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{path}{field.name.rstrip('_')}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name, field, value


def unused(config: Any, path: str = "") -> dict[str, str]:
    """{path: reason} of every field that has no effect with the values of the others.

    `unused(self)`, where a dataclass has it, yields (field, reason); a section stands for all of its fields.
    """
    found: dict[str, str] = {}
    for name, reason in getattr(config, "unused", tuple)():
        value = functools.reduce(getattr, name.split("."), config)
        named = f"{path}{name.rstrip('_')}"
        inner = [each for each, *_ in leaves(value, f"{named}.")] if dataclasses.is_dataclass(value) else [named]
        found = dict.fromkeys(inner, reason) | found
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found = unused(value, f"{path}{field.name}.") | found
    return found


@functools.cache
def comments(kind: type) -> dict[str, str]:
    """{field: what the source says of it} of a dataclass: the comment in its line, or in the lines above it.

    A field that is declared again without a comment keeps that of the class that it comes from.
    """
    found: dict[str, str] = {}
    for each in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        source = textwrap.dedent(inspect.getsource(each))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        in_line = {t.start[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign):
                first = node.lineno
                while lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                texts = [in_line[line] for line in range(first, (node.end_lineno or first) + 1) if line in in_line]
                if texts:
                    found[ast.unparse(node.target)] = " ".join(texts)
    return found


def significant(config: Any) -> dict[str, Any]:
    """The config as nested dicts without its neutral fields: what the numbers of a run depend on."""
    kept = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get("neutral"):
            kept[field.name] = significant(value) if dataclasses.is_dataclass(value) else value
    return kept


def _refuse(name: str, expected: Any, value: Any) -> None:
    raise InputError(f"{name}: expected {expected}, got {short(repr(value))}")
