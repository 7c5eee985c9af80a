"""What the families have in common: how transformers writes an architecture's config.json and names its arrays."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from rlhf_jax.errors import InputError, short
from rlhf_jax.fields import LARGEST
from rlhf_jax.models.decoder import Config

HEADS = ("unembed", "score")  # arrays outside the trunk
ANY = ()  # of a field: the architecture has a field of its own for it
# Fields in which architectures differ: each fixes some and leaves others open. All other fields are sizes and numbers
# that every architecture has.
LAYOUT = ["norm", "qk_norm", "feed_forward", "feed_forward_size", "kv_heads", "biases", "parallel_residual"]
LAYOUT += ["window", "rotary_share", "rotary_factor"]


class Family:
    """An architecture of transformers: config.json <-> Config, names and layouts of its arrays <-> our tree.

    A subclass has its own values of these, and `read` and `write`; the table is in __init__.py.
    """

    TYPE: ClassVar[str]  # model_type
    CLASSES: ClassVar[str]  # the beginning of its classes' names
    SETTINGS: ClassVar[dict[str, Any]] = {}  # where presets differ from the defaults of Config
    CHOICES: ClassVar[dict[str, tuple]] = {}  # values that fields of LAYOUT may have; of others, Config's default
    HEAD_SIZE: ClassVar[bool] = False  # whether head_size is a field of its own; else it is width / heads
    PRESETS: ClassVar[dict[str, Config]] = {}
    PREFIX: ClassVar[str]  # of the trunk's names in a model with a head
    WORDS: ClassVar[dict[str, str]]  # our names of parts -> theirs
    NORM_BIAS: ClassVar[bool] = True  # the last norm has a bias
    ROWS: ClassVar[bool] = True  # kernels are [out, in] (PyTorch's Linear)

    def read(self, fields: "Fields") -> Config:
        """The Config of a config.json; what is wrong is added to fields.problems."""
        raise NotImplementedError

    def write(self, config: Config) -> dict[str, Any]:
        """The fields of config.json that are this architecture's own."""
        raise NotImplementedError

    @property
    def architectures(self) -> dict[str, str]:
        """Names of the classes of a language model, a scalar model and a trunk."""
        names = {"language_model": "ForCausalLM", "scalar_model": "ForSequenceClassification", "trunk": "Model"}
        return {what: self.CLASSES + end for what, end in names.items()}

    def refuses(self, config: Config) -> Iterator[tuple[str, str]]:
        """(field, what is expected of it) of each field that this architecture cannot have."""
        canonical = dataclasses.replace(config, kv_heads=0) if config.cached_heads == config.heads else config
        for name in LAYOUT:
            allowed = self.CHOICES.get(name, (getattr(Config(), name),))
            if allowed is not ANY and getattr(canonical, name) not in allowed:
                yield name, f"{' or '.join(str(value) for value in allowed)} ({self.TYPE} of transformers)"
        if not self.HEAD_SIZE and config.heads * config.head_size != config.width:
            yield "head_size", f"model.width / model.heads = {config.width} / {config.heads}, as in transformers"

    def name(self, path: tuple[str, ...]) -> str:
        """("h_0", "attn", "out", "kernel") -> transformers' name, such as "transformer.h.0.attn.c_proj.weight"."""
        words = self.WORDS | dict.fromkeys(("kernel", "scale", "embedding"), "weight")
        layer, *number = path[0].split("_") if path[0].startswith("h_") else [path[0]]
        prefix = "" if path[0] in HEADS else self.PREFIX
        return prefix + ".".join(words.get(word, word) for word in (layer, *number, *path[1:]))

    def parts(self, path: tuple[str, ...], config: Config) -> dict[str, slice]:
        """{transformers' name: its columns, entries of the last axis of our array} of one of our arrays."""
        return {self.name(path): slice(None)}

    def to_ours(self, path: tuple[str, ...], array: Any, config: Config) -> Any:
        """An array of transformers in our layout; a view where possible."""
        return self.turned(path, array)

    def to_theirs(self, path: tuple[str, ...], array: Any, config: Config) -> Any:
        """Our array in the layout of transformers: the inverse of to_ours."""
        return np.ascontiguousarray(self.turned(path, array))  # safetensors writes the memory and ignores strides

    def turned(self, path: tuple[str, ...], array: Any) -> Any:
        """A view of an array with the axes of the other side."""
        return array.T if path[-1] == "kernel" and self.ROWS else array

    def config(self, fields: "Fields", names: dict[str, str], eps: float, **rest: Any) -> Config:
        """The Config of what every architecture has under some name ({our field: theirs}), and of `rest`."""
        fields.fixed("architectures", *([name] for name in self.architectures.values()))
        sizes = {ours: fields.size(names[ours]) for ours in ("layers", "heads", "width", "context", "vocab_size")}
        if "head_size" not in rest:
            fields.expect(sizes["width"] % sizes["heads"] == 0, names["heads"], f"a divisor of {names['width']}")
            rest["head_size"] = sizes["width"] // sizes["heads"]
        numbers = {"norm_eps": fields.number(names["norm_eps"], eps)}
        numbers["init_std"] = fields.number(names["init_std"], 0.02)
        return Config(**sizes, **numbers, **rest)


class Fields:
    """Reads and checks the fields of a config.json one by one; `problems` collects what is wrong with them."""

    def __init__(self, record, problems=None):
        self.record = record
        self.problems = [] if problems is None else problems

    def expect(self, fine, name, expected):
        """Notes a problem unless it is fine; returns whether it is."""
        if not fine:
            self.problems.append(f"{name}: expected {expected}, got {short(json.dumps(self.record.get(name)))}")
        return fine

    def fixed(self, name, *values):
        """Expects the field to be absent or one of the values."""
        expected = short(" or ".join(json.dumps(value) for value in values), most=200)
        self.expect(name not in self.record or self.record[name] in values, name, expected)

    def one_of(self, name, *choices, default=None):
        """A text that is one of the choices."""
        value = self.record.get(name, default)
        fine = self.expect(isinstance(value, str) and value in choices, name, " or ".join(choices))
        return value if fine else choices[0]

    def flag(self, name, default):
        """True or False."""
        value = self.record.get(name, default)
        self.expect(isinstance(value, bool), name, "true or false")
        return value

    def size(self, name, default=None):
        """A whole number above 0; null is like an absent field where there is a default."""
        value = self.record.get(name)
        value = default if value is None else value
        return value if self.expect(type(value) is int and 0 < value < LARGEST, name, "a whole number above 0") else 1

    def number(self, name, default=None):
        """A number above 0."""
        value = self.record.get(name, default)
        fine = self.expect(type(value) in (int, float) and 0 < value < LARGEST, name, "a number above 0")
        return float(value) if fine else 1.0

    def rope(self, **old):
        """The fields of rotary positions; `old` has those that transformers 4 wrote apart from their object."""
        new = self.record.get("rope_parameters") or self.record.get("rope_scaling") or {}
        if not isinstance(new, dict):
            self.problems.append("rope_parameters: expected an object")
            new = {}
        return Fields(old | new, self.problems)


def refuse(family, config):
    """Raises InputError for the first field of a Config that the architecture cannot have."""
    for name, expected in family.refuses(config):
        raise InputError(f"model.{name}: expected {expected}, got {getattr(config, name)!r}")
