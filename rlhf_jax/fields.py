"""Fields of config dataclasses that carry their own checks: the range of a number, the choices of a text, a path.

    @dataclasses.dataclass(frozen=True)
    class Config:
        clip: float = number(0.2, above=0, most=10)
        schedule: str = choice("linear", "linear", "cosine", "constant")
        remat: bool = neutral(False)
        init: str = path()

        def problems(self):
            if self.warmup > self.steps:
                yield "warmup", f"at most steps = {self.steps}"

`check` refuses a config by the first field that is wrong, in one line that names the field. A field declared
`neutral=True` changes no number of a run: a workdir may be continued with another value of it. `expanded` puts the home
folder in the place of ~ in paths.
"""

import dataclasses
import math
import os
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
    """A text field that is, or may be, a path on this machine; `expanded` reads ~ at its beginning."""
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
