import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import files
from rlhf_jax.errors import InputError

ROWS = [{"prompt": 'a "b", c', "label": "one\ntwo"}, {"prompt": "é 你\u2028", "label": " x "}]
COLUMNS = ("prompt", "label")


def write(path, rows):
    """With a column nobody asked for, first."""
    rows = [{"id": 7} | row for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(params=[".jsonl", ".csv", ".parquet"])
def path(tmp_path, request):
    return tmp_path / f"rows{request.param}"


def error(path, columns=COLUMNS):
    """The message, after the path that it starts with."""
    with pytest.raises(InputError) as caught:
        files.read(path, columns)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def test_each_format_gives_the_columns_asked_for(path):
    assert files.read(write(path, ROWS), COLUMNS) == ROWS
    assert files.read(path, ("label", "prompt")) == ROWS  # not the order in the file
    assert files.read(str(path), ("label",)) == [{"label": row["label"]} for row in ROWS]


# CSV cannot tell a carriage return from a line end, so it is left out; the space in front keeps the text visible.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r")).map(" x".__add__)


@given(rows=st.lists(st.fixed_dictionaries({"prompt": TEXT, "label": TEXT}), min_size=1))
def test_what_was_written_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for suffix in (".jsonl", ".csv", ".parquet"):
        assert files.read(write(folder / f"rows{suffix}", rows), COLUMNS) == rows


def test_a_missing_file(path):
    assert error(path) == ": No such file or directory"


def test_a_folder(path):
    path.mkdir()
    assert error(path) == ": Is a directory"


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.json"])
def test_an_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert error(tmp_path / name) == ": expected a file that ends in .jsonl, .csv, .parquet"


def test_the_suffix_may_be_in_capitals(tmp_path):
    write(tmp_path / "rows.csv", ROWS).rename(tmp_path / "rows.CSV")
    assert files.read(tmp_path / "rows.CSV", COLUMNS) == ROWS


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "prompt,label\n")]
)
def test_an_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert error(tmp_path / name) == ": expected at least one row, got none"


def test_an_empty_parquet_file(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert error(tmp_path / "a.parquet") == ": expected at least one row, got none"


def test_a_missing_column(path):
    where = {".jsonl": ":1", ".csv": ":1", ".parquet": ""}[path.suffix]
    expected = f"{where}: expected a column 'chosen', there is 'id', 'prompt', 'label'"
    assert error(write(path, ROWS), ("prompt", "chosen")) == expected


def test_a_column_missing_further_down(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{}\n')
    assert error(tmp_path / "a.jsonl", ("prompt",)) == ":2: expected a column 'prompt', there is none"


# In CSV the header is line 1, and the label of the first row has two lines, so the second row is on line 4.
SECOND_ROW = {".jsonl": 2, ".csv": 4, ".parquet": 2}


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text(path, text):
    write(path, [ROWS[0], {"prompt": "a", "label": text}])
    assert error(path) == f":{SECOND_ROW[path.suffix]}: label: expected text, got an empty one"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_value_that_is_not_text(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [ROWS[0], {"prompt": "a", "label": None}])
    assert error(path) == ":2: label: expected text, got NoneType"
    assert error(path, ("prompt", "id")) == ":1: id: expected text, got int"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "expected a JSON object (Expecting property name enclosed in double quotes)"),
        ('["prompt"]', "expected a JSON object, got list"),
        ('{"prompt": "\\ud83d"}', "prompt: expected text, got half of a surrogate pair"),
    ],
)
def test_bad_json(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    assert error(tmp_path / "a.jsonl", ("prompt",)) == f":3: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,b", "expected 1 values, got 2"),
        ('"a\nb\nc', "expected CSV (unexpected end of data)"),
        ('"a"b', "expected CSV (',' expected after '\"')"),
    ],
)
def test_bad_csv(tmp_path, line, message):
    (tmp_path / "a.csv").write_text(f'prompt\n"x\ny"\n\n{line}\n')
    assert error(tmp_path / "a.csv", ("prompt",)) == f":5: {message}"


@pytest.mark.parametrize(("name", "first"), [("a.jsonl", b'{"prompt": "a"}\n'), ("a.csv", b"prompt\n")])
def test_bad_utf8(tmp_path, name, first):
    (tmp_path / name).write_bytes(first + b"caf\xe9\n")
    assert error(tmp_path / name, ("prompt",)) == ":2: expected UTF-8 (byte 3 of the line is not)"


def test_bad_utf8_in_parquet(tmp_path):
    column = pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    assert error(tmp_path / "a.parquet", ("prompt",)) == ":2: expected UTF-8"


def test_bad_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("prompt\n")
    assert error(tmp_path / "a.parquet").startswith(": expected Parquet (")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path, name):
    content = {"a.jsonl": '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n', "a.csv": "\ufeffprompt\r\na\r\nb\r\n"}[name]
    (tmp_path / name).write_bytes(content.encode())
    assert files.read(tmp_path / name, ("prompt",)) == [{"prompt": "a"}, {"prompt": "b"}]
