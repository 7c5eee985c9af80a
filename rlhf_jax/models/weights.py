"""The arrays of a safetensors checkpoint: one file, or a folder with one file or with shards and their index."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, listed, short

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GGUF = ".gguf"

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "BOOL": "?"}
TYPES |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1"}


class Place(NamedTuple):
    """Where an array is stored."""

    file: Path
    dtype: np.dtype
    shape: tuple
    offset: int  # in bytes, from the beginning of the file


class Arrays(Mapping):
    """name -> read-only array, mapped from its file at each access.

    It takes no memory once nothing refers to it, so reading all arrays in turn needs the memory of the largest.
    """

    def __init__(self, places):
        self._places = places

    def __getitem__(self, name):
        file, dtype, shape, offset = self._places[name]
        return np.memmap(file, dtype, mode="r", offset=offset, shape=shape)

    def __iter__(self):
        return iter(self._places)

    def __len__(self):
        return len(self._places)


def read(path):
    """The Arrays of a safetensors file, or of a folder that transformers saved.

    InputError names the file that is missing, damaged or not safetensors, and what was expected.
    """
    path = Path(path)
    if not path.is_dir():
        return Arrays(_places(path))
    if (path / FILE).exists():
        return Arrays(_places(path / FILE))
    if (path / INDEX).exists():
        return Arrays(_shards(path / INDEX))
    if others := sorted(file for file in path.iterdir() if file.suffix in (*PICKLES, GGUF)):
        _places(others[0])
    raise InputError(f"{path}: expected {FILE} or {INDEX} in this folder")


def _places(file):
    """{name: Place} of one file."""
    if file.suffix in PICKLES:
        raise InputError(
            f"{file}: expected safetensors; loading a pickle can run any code, so it is refused: "
            "if you trust the file, convert it (save_pretrained of transformers writes safetensors)"
        )
    if file.suffix == GGUF:
        raise InputError(
            f"{file}: expected safetensors; GGUF holds quantized weights for inference, which are not read"
        )
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: expected a readable safetensors file, got something else")
    try:
        with safe_open(file, framework="np"):  # checks the header, and that the arrays do not overlap
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = jsonfile.parse(opened.read(length).decode())
    except (OSError, SafetensorError, ValueError) as error:
        reason = short(" ".join(str(error).split()))
        raise InputError(f"{file}: expected a readable safetensors file: {reason}") from error
    header.pop("__metadata__", None)
    if unknown := [f"{name} of {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in TYPES]:
        raise InputError(f"{file}: expected arrays of {', '.join(TYPES)}, got {listed(unknown)}")
    return {
        name: Place(file, np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _shards(index):
    """{name: Place} of the shards in an index. Each shard must hold exactly the arrays that the index lists for it."""
    try:
        file_of = jsonfile.read(index)["weight_map"]
        files = {name: index.with_name(name) for name in sorted(set(file_of.values()))}
        absent = [short(name) for name, file in files.items() if not file.is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: expected JSON with weight_map, an object of array -> file name") from error
    if absent:
        raise InputError(f"{index}: expected these files beside it: {listed(absent)}")
    shards = {name: _places(file) for name, file in files.items()}
    problems = [f"{array} is not in {file}" for array, file in file_of.items() if array not in shards[file]]
    problems += [
        f"{array} of {file} is not in the index"
        for file, places in shards.items()
        for array in places
        if file_of.get(array) != file
    ]
    if problems:
        raise InputError(f"{index}: expected an index that matches the files: {listed(problems, '; ')}")
    return {array: shards[file][array] for array, file in file_of.items()}
