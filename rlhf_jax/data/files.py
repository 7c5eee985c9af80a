"""Rows of text from a local file: JSONL, CSV or Parquet, checked before anything is computed with them."""

import csv
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rlhf_jax.errors import InputError


class Row(dict):
    """The texts of a row by column, and `where` in the file it is: "pairs.jsonl:17"."""

    def __init__(self, texts: dict[str, str], where: str):
        super().__init__(texts)
        self.where = where


def read(path: str | os.PathLike, columns: tuple[str, ...], skipped: list[str] | None = None) -> list[dict[str, str]]:
    """The rows of the file, with these columns and no other; every value has something to read in it.

    An InputError starts with the path and, where one row is at fault, its line (in a Parquet file, its row) from 1.
    Where a list `skipped` is given, a row without text is left out and what is wrong with it is added to the list.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        rows = [row for where, cells in reader(path, columns) for row in _row(cells, where, skipped)]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, got none")
    return rows


# Each reader yields ("path:line", row) with the columns asked for, their values of any type yet.


def _jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
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
        _require(columns, record, where)
        yield where, {column: record[column] for column in columns}


def _csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    reader = csv.reader(_lines(path), strict=True)
    where = f"{path}:1"
    try:
        header = next(reader, None)
        if header is None:
            return
        _require(columns, header, where)
        where = f"{path}:{reader.line_num + 1}"
        for cells in reader:
            if cells:  # a blank line has none
                if len(cells) != len(header):
                    raise InputError(f"{where}: expected {len(header)} values, got {len(cells)}")
                yield where, {column: cells[header.index(column)] for column in columns}
            where = f"{path}:{reader.line_num + 1}"  # a quoted value can span lines: name the row's first
    except csv.Error as error:
        raise InputError(f"{where}: expected CSV ({error})") from None


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _require(columns, table.schema_arrow.names, path)
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


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. Only a line feed ends a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: expected UTF-8 (byte {error.start} of the line is not)") from None


def _require(columns: tuple[str, ...], there: Collection[str], where: str | Path) -> None:
    missing = [column for column in columns if column not in there]
    if missing:
        raise InputError(f"{where}: expected a column {missing[0]!r}, there is {', '.join(map(repr, there)) or 'none'}")


def _row(cells: dict, where: str, skipped: list[str] | None) -> list[Row]:
    """The row, or none if it is to be skipped."""
    try:
        return [Row(_checked(cells, where), where)]
    except InputError as error:
        if skipped is None:
            raise
        skipped.append(str(error))
        return []


def _checked(row: dict, where: str) -> dict[str, str]:
    for column, value in row.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: {column}: expected text, got {type(value).__name__}")
        if not value.strip():
            raise InputError(f"{where}: {column}: expected text, got an empty one")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: {column}: expected text, got half of a surrogate pair") from None
    return row
