"""Tokenizer files. Ours is one JSON object, `tokenizer.json`, whose field `kind` is the kind of tokenizer."""

import hashlib
import json
import os
from pathlib import Path

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError

FILE = "tokenizer.json"


def write(directory: str | os.PathLike, record: dict, name: str = FILE) -> None:
    """Writes `record` whole or not at all: a process killed here leaves the old file or the new one."""
    path = Path(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(_canonical(record), encoding="utf-8")
    os.replace(unfinished, path)


def fingerprint(record: dict) -> str:
    return hashlib.sha256(_canonical(record).encode()).hexdigest()


def read_json(path: Path):
    """The JSON value in the file. InputError names the file if it is missing or not JSON."""
    text = read_text(path)
    try:
        return jsonfile.parse(text)
    except ValueError as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: expected JSON ({jsonfile.why(error)})") from None


def read_text(path: Path) -> str:
    """The text in the file. InputError names the file if it is missing or not UTF-8."""
    try:
        return jsonfile.text(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8, but byte {error.start} is not") from None


def _canonical(record: dict) -> str:
    return json.dumps(record, sort_keys=True)
