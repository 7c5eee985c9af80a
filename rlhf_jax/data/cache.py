"""A cache of what is slow to make: records of bytes in array_record files, in the user's cache folder."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rlhf_jax.errors import InputError

OPTIONS = "group_size:256"  # records compressed together: they are always read in order
CHUNK = 1_000  # records read at once


def folder() -> Path:
    """The folder of data that runs share, unless a config names another."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rlhf_jax", "data")


def records(path: Path, make: Callable[[], Iterable[bytes]]) -> Iterator[bytes]:
    """Yields the records of the file. If it does not exist, it is first written with the records of make().

    A temporary file is renamed at the end of writing, so a killed process leaves no partial file. Raises InputError if
    the file is damaged or cannot be written.
    """
    if not path.exists():
        _write(path, make())
    try:
        reader = ArrayRecordReader(str(path))
        for start in range(0, reader.num_records(), CHUNK):
            yield from reader.read(start, min(start + CHUNK, reader.num_records()))
        reader.close()
    except RuntimeError as error:
        raise InputError(f"{path}: expected a whole array_record file ({error}); remove it") from None


def _write(path: Path, made: Iterable[bytes]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(unfinished), OPTIONS)
        try:
            for record in made:
                writer.write(record)
        finally:
            writer.close()
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"data.cache: cannot write {path} ({getattr(error, 'strerror', error)})") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
