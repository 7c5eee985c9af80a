"""JSON that others may have written, or damaged: read as a value, or refused in one line."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from rlhf_jax.errors import InputError

# Lists and objects within one another. A parser that calls itself ends in a RecursionError at some hundreds, or what
# walks through the value later does.
DEEPEST = 100


def read(path: str | os.PathLike, expected: str = "a JSON object", remedy: str = "") -> dict:
    """The object in a file. An InputError names the file and what was expected there, and ends with the remedy."""
    try:
        value = parse(text(path))
        reason = f"got {type(value).__name__}"
    except (OSError, ValueError) as error:
        value, reason = None, why(error)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {expected} ({reason}){remedy}")
    return value


def text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. OSError or UnicodeDecodeError where there is none.

    A pipe or a device is refused: reading it might never end.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "expected a file, got a pipe or a device", str(path))
    return path.read_text(encoding="utf-8-sig")


def parse(text: str, **options: Any) -> Any:
    """As json.loads. What is no JSON, or has more than DEEPEST levels, is a ValueError; `why` says it in one line."""
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels deep") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return value
    raise ValueError(f"more than {DEEPEST} levels deep")


def why(error: Exception) -> str:
    """The reason of an error of `text` or `parse`, in a few words: "Expecting value, line 3"."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg + (f", line {error.lineno}" if error.lineno > 1 else "")
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte {error.start}"
    return getattr(error, "strerror", None) or str(error)


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
