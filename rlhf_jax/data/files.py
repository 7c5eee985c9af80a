"""Rows of text from a local file: JSONL, CSV or Parquet, checked before anything is computed with them."""

import csv
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from rlhf_jax.errors import InputError


class Row(dict):
    """The texts of a row by column, and `where` in the file it is: "pairs.jsonl:17"."""

    def __init__(self, texts: dict[str, str], where: str):
        super().__init__(texts)
        self.where = where


Cells = Iterator[tuple[str, dict]]  # ("pairs.jsonl:17", values by column), the values of any type yet


def read(path: str | os.PathLike, columns: tuple[str, ...], skipped: list[str] | None = None) -> list[Row]:
    """The rows of the file, with these columns and no other, as `rows` has them."""
    return rows(cells(path, columns), path, skipped)


def rows(
    cells: Cells,
    source: str | os.PathLike,
    skipped: list[str] | None = None,
    *,
    convert: Callable[[dict], dict] = lambda values: values,
) -> list[Row]:
    """The cells as rows of text, converted first; every value has something to read in it.

    An InputError starts with where the row at fault is, or with the source. Where a list `skipped` is given, a bad row
    is left out and what is wrong with it is added to the list.
    """
    kept = []
    for where, values in cells:
        try:
            kept.append(Row(_checked(convert(values)), where))
        except InputError as error:
            if skipped is None:
                raise InputError(f"{where}: {error}") from None
            skipped.append(f"{where}: {error}")
    if not kept:
        raise InputError(f"{source}: expected at least one row, got none")
    return kept


def cells(path: str | os.PathLike, *choices: tuple[str, ...]) -> Cells:
    """Each row of the file with its columns of one of the `choices`, the first that are all there.

    An InputError starts with the path and, where one row is at fault, its line (in a Parquet file, its row) from 1.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    try:
        yield from reader(path, choices)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _jsonl(path: Path, choices: tuple[tuple[str, ...], ...]) -> Cells:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected a JSON object ({getattr(error, 'msg', error)})") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, {column: record[column] for column in _chosen(choices, record, where)}


def _csv(path: Path, choices: tuple[tuple[str, ...], ...]) -> Cells:
    reader = csv.reader(_lines(path), strict=True)
    where = f"{path}:1"
    try:
        header = next(reader, None)
        if header is None:
            return
        columns = _chosen(choices, header, where)
        where = f"{path}:{reader.line_num + 1}"
        for cells in reader:
            if cells:  # a blank line has none
                if len(cells) != len(header):
                    raise InputError(f"{where}: expected {len(header)} values, got {len(cells)}")
                yield where, {column: cells[header.index(column)] for column in columns}
            where = f"{path}:{reader.line_num + 1}"  # a quoted value can span lines: name the row's first
    except csv.Error as error:
        raise InputError(f"{where}: expected CSV ({error})") from None


def _parquet(path: Path, choices: tuple[tuple[str, ...], ...]) -> Cells:
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = _chosen(choices, table.schema_arrow.names, path)
            batches = [batch.select(columns) for batch in table.iter_batches(columns=list(columns))]
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: expected Parquet ({error})") from None
    rows = (scalars for batch in batches for scalars in zip(*batch.columns, strict=True))
    for number, scalars in enumerate(rows, start=1):
        where = f"{path}:{number}"
        try:
            yield where, {column: scalar.as_py() for column, scalar in zip(columns, scalars, strict=True)}
        except UnicodeDecodeError:
            raise InputError(f"{where}: expected UTF-8") from None


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. Only a line feed ends a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: expected UTF-8 (byte {error.start} of the line is not)") from None


def _chosen(choices: tuple[tuple[str, ...], ...], there: Collection[str], where: str | Path) -> tuple[str, ...]:
    for columns in choices:
        if all(column in there for column in columns):
            return columns
    wanted = "columns " + ", or ".join(" and ".join(map(repr, columns)) for columns in choices)
    if len(choices) == 1:
        wanted = f"a column {next(column for column in choices[0] if column not in there)!r}"
    raise InputError(f"{where}: expected {wanted}, there is {', '.join(map(repr, there)) or 'none'}")


def _checked(row: dict) -> dict[str, str]:
    for column, value in row.items():
        if not isinstance(value, str):
            raise InputError(f"{column}: expected text, got {type(value).__name__}")
        if not value.strip():
            raise InputError(f"{column}: expected text, got an empty one")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{column}: expected text, got half of a surrogate pair") from None
    return row
