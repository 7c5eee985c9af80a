"""Rows from a local file, JSONL, JSON, CSV or Parquet: its texts are checked before anything is computed with them."""

import csv
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.text import SPECIAL

csv.field_size_limit(sys.maxsize)  # for all of the process: the module has no other way; its default is 131,072


class Row(dict):
    """The values of a row by column, and `where` in the file it is: "pairs.jsonl:17"."""

    def __init__(self, values: dict, where: str):
        super().__init__(values)
        self.where = where


# ("pairs.jsonl:17", values by column), the values of any type yet; or why there are none.
Cells = Iterator[tuple[str, dict | InputError]]
Choices = tuple[tuple[str, ...], ...]


class Also(tuple):
    """A choice of columns that errors do not name."""


def read(
    path: str | os.PathLike, columns: tuple[str, ...], skipped: list[str] | None = None, *, extra: bool = False
) -> list[Row]:
    """The rows of the file with these columns, which hold text. `extra` keeps the others too, with values of any type.

    InputError as in `cells` and `rows`; `skipped` as in `rows`.
    """
    return rows(cells(path, columns, extra=extra), path, skipped, texts=columns)


def rows(
    cells: Cells,
    source: str | os.PathLike,
    skipped: list[str] | None = None,
    *,
    convert: Callable[[dict], dict] = lambda values: values,
    texts: Collection[str] | None = None,
) -> list[Row]:
    """The cells as rows, converted first. The columns `texts` (None: all columns) hold text, and never an empty one.

    An InputError starts with where the row at fault is, or with the source. Where a list `skipped` is given, a bad row
    is left out and what is wrong with it is added to the list.
    """
    kept = []
    for where, values in cells:
        try:
            if isinstance(values, InputError):
                raise values
            row = Row(convert(values), where)
            for column in row if texts is None else texts:
                _check_text(column, row[column])
        except InputError as error:
            if skipped is None:
                raise InputError(f"{where}: {error}") from None
            skipped.append(f"{where}: {error}")
        else:
            kept.append(row)
    if not kept:
        why = f"; the first of {len(skipped)} that were left out: {skipped[0]}" if skipped else ""
        raise InputError(f"{source}: expected at least one row, got none{why}")
    return kept


def without_special(text: Any, found: list[str]) -> Any:
    """The text without the names of special tokens at its end, which a model would learn to write as characters.

    The one that the text ended with is added to `found`. What is no text is returned as it is.
    """
    if not isinstance(text, str):
        return text
    first, rest = None, text.rstrip()
    while name := next((name for name in SPECIAL if rest.endswith(name)), None):
        first, rest = first or name, rest.removesuffix(name).rstrip()
    if first is None:
        return text
    found.append(first)
    return rest


def notes(field: str, skipped: list[str], found: list[str]) -> list[str]:
    """What is said of rows that were left out, and of the names that `without_special` took off."""
    said = [f"{field}: {len(skipped)} rows skipped; the first: {skipped[0]}"] if skipped else []
    if found:
        names = listed(sorted(set(found)))
        said.append(f"{field}: {len(found)} texts ended with the name of a special token ({names}); it was taken off")
    return said


def cells(path: str | os.PathLike, *choices: tuple[str, ...], extra: bool = False) -> Cells:
    """Each row of the file with its columns of one of the `choices`, the first that are all there, in that order.

    With `extra`, every other column of the row comes after them. Values are what the file has: text in CSV, any JSON
    value in JSONL and JSON, what `as_py` makes of them in Parquet. A row is where it is: the path and its line (in
    Parquet and JSON its row) from 1; one without such values has an InputError in their place. Raises InputError,
    beginning with the path, where the file cannot be read.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: expected a file, got {'a folder' if path.is_dir() else 'a pipe or a device'}")
        yield from reader(path, choices, extra)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _jsonl(path: Path, choices: Choices, extra: bool) -> Cells:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield f"{path}:{number}", _tried(_of_line, line.rstrip("\r\n"), choices, extra)


def _json(path: Path, choices: Choices, extra: bool) -> Cells:
    expected = "a list of JSON objects"
    records = _tried(_parsed, "".join(_lines(path)), expected)
    if isinstance(records, InputError):
        raise InputError(f"{path}: {records}")
    if not isinstance(records, list):
        raise InputError(f"{path}: expected {expected}, got {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", _tried(of_record, record, choices, extra)


def _csv(path: Path, choices: Choices, extra: bool) -> Cells:
    reader = csv.reader(_lines(path), strict=True)
    where = f"{path}:1"
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_unique(header, f"{where}: expected one column")
        columns = _tried(_chosen, choices, header)
        if isinstance(columns, InputError):
            raise InputError(f"{where}: {columns}")
        where = f"{path}:{reader.line_num + 1}"
        for cells in reader:
            if len(cells) == len(header):
                yield where, _selected(dict(zip(header, cells, strict=True)), columns, extra)
            elif cells:  # a blank line has none
                yield where, InputError(f"expected {len(header)} values, got {len(cells)}")
            where = f"{path}:{reader.line_num + 1}"  # a quoted value can span lines: name the row's first
    except csv.Error as error:
        raise InputError(f"{where}: expected CSV ({error})") from None


def _parquet(path: Path, choices: Choices, extra: bool) -> Cells:
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            _check_unique(names, f"{path}: expected one column")
            chosen = _tried(_chosen, choices, names)
            if isinstance(chosen, InputError):
                raise InputError(f"{path}: {chosen}")
            columns = list(_selected(dict.fromkeys(names), chosen, extra))
            batches = [batch.select(columns) for batch in table.iter_batches(columns=columns)]
        except InputError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}: expected Parquet ({short(' '.join(str(error).split()))})") from None
    rows = (scalars for batch in batches for scalars in zip(*batch.columns, strict=True))
    for number, scalars in enumerate(rows, start=1):
        yield f"{path}:{number}", _tried(_of_parquet, columns, scalars)


def _of_parquet(columns: list[str], scalars: tuple) -> dict:
    values = {}
    for column, scalar in zip(columns, scalars, strict=True):
        try:
            values[column] = scalar.as_py()
        except UnicodeDecodeError:
            raise InputError(f"{column}: expected UTF-8") from None
        except (ValueError, OverflowError):  # nanoseconds, or a year that Python's dates do not reach
            raise InputError(f"{column}: expected a {scalar.type} that Python can hold") from None
    return values


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark. Only a line feed ends a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: expected UTF-8 (byte {error.start} of the line is not)") from None


def _tried(function: Callable, *args) -> Any:
    """function(*args), or the InputError that it raises."""
    try:
        return function(*args)
    except InputError as error:
        return error


def _chosen(choices: Choices, there: Collection[str]) -> tuple[str, ...]:
    for columns in choices:
        if all(column in there for column in columns):
            return columns
    choices = tuple(columns for columns in choices if not isinstance(columns, Also))
    wanted = "columns " + ", or ".join(" and ".join(map(repr, columns)) for columns in choices)
    if len(choices) == 1:
        wanted = f"a column {next(column for column in choices[0] if column not in there)!r}"
    raise InputError(f"expected {wanted}, there is {listed(short(repr(name)) for name in there) or 'none'}")


def _of_line(line: str, choices: Choices, extra: bool) -> dict:
    return of_record(_parsed(line, "a JSON object"), choices, extra)


def of_record(record, choices: Choices, extra: bool) -> dict:
    """The values of a parsed record, as in `cells`."""
    if not isinstance(record, dict):
        raise InputError(f"expected a JSON object, got {type(record).__name__}")
    return _selected(record, _chosen(choices, record), extra)


def _selected(values: dict, columns: tuple[str, ...], extra: bool) -> dict:
    """The values of the columns, in their order; then, with `extra`, all other values."""
    selected = {column: values[column] for column in columns}
    return selected | values if extra else selected


def _parsed(text: str, expected: str) -> Any:
    try:
        return jsonfile.parse(text, object_pairs_hook=_object)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"expected {expected} ({jsonfile.why(error)})") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        _check_unique([name for name, _ in pairs], "expected one key")
    return values


def _check_unique(names: list[str], expected: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{expected} {short(repr(name))}, got {count}")


def _check_text(column: str, value) -> None:
    if not isinstance(value, str):
        raise InputError(f"{column}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{column}: expected text, got an empty one")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{column}: expected text, got half of a surrogate pair") from None
