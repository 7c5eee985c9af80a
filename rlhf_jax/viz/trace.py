"""The files of a trace: JSON under gzip, arrays as base64 of little-endian float32, int32 or uint8.

manifest.json lists the files with their sha256. docs/trace.md describes every field.
"""

import base64
import binascii
import dataclasses
import gzip
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError

SCHEMA = 1
FOLDER = "trace"  # in the workdir
MANIFEST = "manifest.json"
KINDS = ("iter", "eval", "end")  # a training step; an evaluation; the end of a stage
DTYPES = ("float32", "int32", "uint8")
HOW = "--config.trace.every=10 records one"


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a trace. Arrays are named PART.NAME, as rollout.logp_BR."""

    name: str
    stage: str
    kind: str  # one of KINDS
    step: int
    numbers: dict[str, float]  # logged scalars, with the stage's name: ppo/kl
    arrays: dict[str, np.ndarray]
    strings: dict[int, str]  # the text of each id that occurs; a byte that is no UTF-8 is a lone surrogate
    samples: list[dict]
    more: dict[str, Any]  # further fields

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise InputError(f"{self.name}: expected the array {name}, which this run did not record")
        return self.arrays[name]

    def part(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one part, without its name."""
        return {key.split(".", 1)[1]: array for key, array in self.arrays.items() if key.startswith(f"{name}.")}


class Trace:
    """The trace in a folder, or in the folder `trace` of a workdir. InputError says which command makes one."""

    def __init__(self, folder):
        folder = Path(folder).expanduser()
        inside = folder / FOLDER
        self.folder = inside if (inside / MANIFEST).exists() or not (folder / MANIFEST).exists() else folder
        path = self.folder / MANIFEST
        if not path.exists():
            raise InputError(f"{folder}: expected a trace in {inside}; {HOW}")
        self.manifest = _read_json(path, path.read_bytes())
        schema = self.manifest.get("schema")
        if schema != SCHEMA:
            raise InputError(f"{path}: expected a trace of schema version {SCHEMA}, got {schema!r}")
        for field in ("files", "config", "tokenizer", "stages"):
            if not isinstance(self.manifest.get(field), dict):
                raise InputError(f"{path}: expected the field {field}")

    def names(self, stage=None, kind=None) -> list[str]:
        """The names of the files of a stage and a kind, by stage, kind and step."""
        files = self.manifest["files"]
        found = [name for name, about in files.items() if stage in (None, about["stage"])]
        found = [name for name in found if kind in (None, files[name]["kind"])]
        stages = list(self.manifest["stages"])
        return sorted(
            found, key=lambda name: (stages.index(files[name]["stage"]), files[name]["kind"], files[name]["step"])
        )

    def read(self, name: str) -> File:
        """A file, whose sha256 must be the manifest's. InputError names the file."""
        path, about = self.folder / name, self.manifest["files"].get(name)
        if about is None:
            raise InputError(f"{path}: expected a file that {MANIFEST} lists")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: expected a file of the trace ({error.strerror})") from None
        if (digest := hashlib.sha256(data).hexdigest()) != about["sha256"]:
            raise InputError(f"{path}: damaged: sha256 {digest[:12]}..., {MANIFEST} has {about['sha256'][:12]}...")
        try:
            return decode(name, gzip.decompress(data))
        except (OSError, EOFError, ValueError, KeyError, TypeError, binascii.Error) as error:
            raise InputError(f"{path}: damaged ({error})") from None


def decode(name: str, data: bytes) -> File:
    """A file from its JSON."""
    record = _read_json(name, data)
    arrays = {key: _array(value) for key, value in record.pop("arrays").items()}
    strings = {int(key): value for key, value in record.pop("strings").items()}
    fields = {field: record.pop(field) for field in ("stage", "kind", "step", "numbers", "samples")}
    numbers = {key: math.nan if value is None else value for key, value in fields.pop("numbers").items()}
    return File(name, arrays=arrays, strings=strings, numbers=numbers, more=record, **fields)


def encode(file: File) -> bytes:
    """The gzipped JSON of a file; equal files have equal bytes."""
    record = {"schema": SCHEMA, "stage": file.stage, "kind": file.kind, "step": file.step}
    record |= {"numbers": {name: plain(value) for name, value in file.numbers.items()}, **file.more}
    record["strings"] = {str(i): file.strings[i] for i in sorted(file.strings)}
    record["samples"] = plain(file.samples)
    record["arrays"] = {name: _record(array) for name, array in file.arrays.items()}
    return gzip.compress(json.dumps(record, allow_nan=False).encode(), mtime=0)


def write(folder: Path, files: dict[str, bytes], manifest: dict) -> None:
    """Writes files and then the manifest, each completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        _replace(folder / name, data)
    _replace(folder / MANIFEST, (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode())


def about(file: File, data: bytes) -> dict:
    """The manifest's entry of a file."""
    digest = hashlib.sha256(data).hexdigest()
    return {"stage": file.stage, "kind": file.kind, "step": file.step, "bytes": len(data), "sha256": digest}


def _replace(path, data):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _read_json(name, data):
    try:
        record = jsonfile.parse(data.decode())
    except ValueError as error:
        raise InputError(f"{name}: expected JSON ({jsonfile.why(error)})") from None
    if not isinstance(record, dict):
        raise InputError(f"{name}: expected an object in JSON, got {type(record).__name__}")
    return record


def _array(record):
    if record["dtype"] not in DTYPES:
        raise ValueError(f"dtype {record['dtype']!r}")
    data = base64.b64decode(record["b64"], validate=True)
    return np.frombuffer(data, np.dtype(record["dtype"]).newbyteorder("<")).reshape(record["shape"])


def _record(array):
    array = np.asarray(array)
    kind = "float32" if array.dtype.kind == "f" else "uint8" if array.dtype.kind == "b" else "int32"
    if array.dtype == np.uint8:
        kind = "uint8"
    data = np.ascontiguousarray(array.astype(np.dtype(kind).newbyteorder("<"))).tobytes()
    return {"dtype": kind, "shape": list(array.shape), "b64": base64.b64encode(data).decode()}


def plain(value):
    """JSON has no NaN and no infinity: they are null."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return value if not isinstance(value, float) or math.isfinite(value) else None
