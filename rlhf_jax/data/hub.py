"""Data sets of the Hugging Face hub, from their own files: neither TensorFlow nor the package `datasets` is needed.

A name is OWNER/NAME or OWNER/NAME/SUBSET, with or without @REVISION, or a local folder of the same files. Those of a
split, as train, are Parquet (or JSONL, or CSV) in a folder SUBSET: train.parquet, train-*.parquet or train/*.parquet.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax import hub
from rlhf_jax.data import cache, files
from rlhf_jax.errors import InputError

REVISIONS = ("main", "refs/convert/parquet")  # the hub keeps the second itself: what main has in other formats
SUFFIXES = (".parquet", ".jsonl", ".csv")  # the best first
PLACES = ("", "data/", "default/")  # where the files of a set without subsets are


def cells(name: str, split: str, *choices: tuple[str, ...], cache_folder: Path, extra: bool = False) -> files.Cells:
    """Each row of the split with its columns of one of the `choices`, and with all others if `extra`, as `files.cells`.

    What comes from the hub is converted once and then read from `cache_folder`, without a look at the network: a name
    without a revision stands for what the hub had then. InputError, in one line, for a set, a split, columns or rows
    that are not there, and for a hub that is not: the files to download by hand.
    """
    if Path(name).is_file():
        yield from files.cells(name, *choices, extra=extra)
    elif Path(name).exists():
        yield from _cells(name, "", split, choices, extra)
    else:
        base, at, revision = name.partition("@")
        owner, *rest = base.split("/")
        repo, subset = "/".join([owner, *rest[:1]]) + at + revision, "/".join(rest[1:])
        if not hub.is_name(repo):
            raise InputError(
                f"{name}: no such folder, and not of the form OWNER/NAME, OWNER/NAME/SUBSET or NAME@REVISION"
            )
        digest = hashlib.sha256(json.dumps([name, split, choices] + [extra] * extra).encode()).hexdigest()[:16]
        path = cache_folder / "hub" / f"{re.sub('[^A-Za-z0-9.-]+', '_', f'{name} {split}')}_{digest}.array_record"
        made = cache.records(path, lambda: _json(_cells(repo, subset, split, choices, extra), name, split, choices))
        for number, record in enumerate(made, start=1):
            values = json.loads(record)
            yield f"{name}/{split}:{number}", InputError(values) if isinstance(values, str) else values


def _cells(repo: str, subset: str, split: str, choices: files.Choices, extra: bool) -> files.Cells:
    places = (f"{subset}/",) if subset else PLACES
    names = (f"{split}/*", f"{split}-*", split)
    patterns = [f"{place}{name}{suffix}" for suffix in SUFFIXES for place in places for name in names]
    folder = hub.folder(repo, *((pattern,) for pattern in patterns), kind="dataset", revisions=REVISIONS)
    found = next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)))
    for file in found:
        yield from files.cells(file, *choices, extra=extra)


def _json(cells: files.Cells, name: str, split: str, choices: files.Choices) -> Iterator[bytes]:
    """The values of each row as JSON. A date, or what else JSON does not have, is text in a column of no choice.

    A row without values is the reason for that, a text. InputError if all rows are so.
    """
    chosen, first, good = set().union(*choices), None, False
    for where, values in cells:
        if isinstance(values, InputError):
            first = first or InputError(f"{where}: {values}")
            yield json.dumps(str(values)).encode()
            continue
        good = True
        values = {
            column: value if column in chosen else json.loads(json.dumps(value, default=str))
            for column, value in values.items()
        }
        try:
            yield json.dumps(values).encode()
        except TypeError as error:
            raise InputError(f"{where}: expected text, numbers, lists and objects ({error})") from None
    if not good:
        raise first or InputError(f"{name}/{split}: expected at least one row, got none")
