import csv
import datetime
import json
import os

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
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(params=[".jsonl", ".json", ".csv", ".parquet"])
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
    for suffix in files.READERS:
        assert files.read(write(folder / f"rows{suffix}", rows), COLUMNS) == rows


def test_a_missing_file(path):
    assert error(path) == ": No such file or directory"


def test_a_folder(path):
    path.mkdir()
    assert error(path) == ": expected a file, got a folder"


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.arrow"])
def test_an_unknown_suffix(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert error(tmp_path / name) == ": expected a file that ends in .jsonl, .json, .csv, .parquet"


def test_the_suffix_may_be_in_capitals(tmp_path):
    write(tmp_path / "rows.csv", ROWS).rename(tmp_path / "rows.CSV")
    assert files.read(tmp_path / "rows.CSV", COLUMNS) == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", " []\n"), ("a.csv", ""), ("a.csv", "prompt,label\n")],
)
def test_an_empty_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert error(tmp_path / name) == ": expected at least one row, got none"


def test_an_empty_parquet_file(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert error(tmp_path / "a.parquet") == ": expected at least one row, got none"


def test_a_missing_column(path):
    where = {".jsonl": ":1", ".json": ": row 1", ".csv": ":1", ".parquet": ""}[path.suffix]
    expected = f"{where}: expected a column 'chosen', there is 'id', 'prompt', 'label'"
    assert error(write(path, ROWS), ("prompt", "chosen")) == expected


def test_a_column_missing_further_down(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{}\n')
    assert error(tmp_path / "a.jsonl", ("prompt",)) == ":2: expected a column 'prompt', there is none"


# In CSV the header is line 1, and the label of the first row has two lines, so the second row is on line 4.
SECOND_ROW = {".jsonl": ":2", ".json": ": row 2", ".csv": ":4", ".parquet": ":2"}


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text(path, text):
    write(path, [ROWS[0], {"prompt": "a", "label": text}])
    assert error(path) == f"{SECOND_ROW[path.suffix]}: label: expected text, got an empty one"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_value_that_is_not_text(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [ROWS[0], {"prompt": "a", "label": None}])
    assert error(path) == f"{SECOND_ROW[suffix]}: label: expected text, got NoneType"
    assert error(path, ("prompt", "id")) == f"{SECOND_ROW[suffix].replace('2', '1')}: id: expected text, got int"


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
    ("content", "message"),
    [
        ('{"prompt": "a"}\n', ": expected a list of JSON objects, got dict"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', ": expected a list of JSON objects (Extra data, line 2)"),
        ('[\n{"prompt": "a"},\n{"prompt"}]', ": expected a list of JSON objects (Expecting ':' delimiter, line 3)"),
        ("", ": expected a list of JSON objects (Expecting value)"),
        ('[{"prompt": "a"}, ["prompt"]]', ": row 2: expected a JSON object, got list"),
        ('[{"prompt": "a"}, {}]', ": row 2: expected a column 'prompt', there is none"),
    ],
)
def test_bad_json_of_a_whole_file(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    assert error(tmp_path / "a.json", ("prompt",)) == message


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


@pytest.mark.parametrize(
    ("name", "first"), [("a.jsonl", b'{"prompt": "a"}\n'), ("a.json", b"[\n"), ("a.csv", b"prompt\n")]
)
def test_bad_utf8(tmp_path, name, first):
    (tmp_path / name).write_bytes(first + b"caf\xe9\n")
    assert error(tmp_path / name, ("prompt",)) == ":2: expected UTF-8 (byte 3 of the line is not)"


def test_bad_utf8_in_parquet(tmp_path):
    column = pyarrow.array([b"ok", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "a.parquet")
    assert error(tmp_path / "a.parquet", ("prompt",)) == ":2: prompt: expected UTF-8"


def test_bad_parquet(tmp_path):
    (tmp_path / "a.parquet").write_text("prompt\n")
    assert error(tmp_path / "a.parquet").startswith(": expected Parquet (")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "label": ["b"]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:4] + b"\xff" * 8 + content[12:])  # Arrow says what in several lines
    assert error(tmp_path / "a.parquet").startswith(": expected Parquet (")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n'),
        ("a.json", '\ufeff[{"prompt": "a"},\r\n{"prompt": "b"}]\r\n'),
        ("a.csv", "\ufeffprompt\r\na\r\nb\r\n"),
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert files.read(tmp_path / name, ("prompt",)) == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', ":2: expected one key 'prompt', got 2"),
        ("a.jsonl", '{"prompt": "a", "x": [{"y": 1, "y": 1, "y": 1}]}', ":1: expected one key 'y', got 3"),
        ("a.json", '[{"prompt": "a", "label": "b", "label": "c"}]', ": expected one key 'label', got 2"),
        ("a.csv", "prompt,label,label\na,b,c\n", ":1: expected one column 'label', got 2"),
    ],
)
def test_a_name_that_stands_twice(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert error(tmp_path / name, ("prompt",)) == message


def test_a_name_that_stands_twice_in_parquet(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert error(tmp_path / "a.parquet", ("prompt",)) == ": expected one column 'label', got 2"


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "{}\n"), ("a.json", "[{}]")])
@pytest.mark.parametrize("depth", [99, 101, 100_000])
def test_json_has_levels_that_can_be_walked_through(depth, name, content, tmp_path):
    """A parser that calls itself would end in a RecursionError, and so would what reads the value later."""
    nested = "[" * (depth - 1 - name.endswith("json")) + "]" * (depth - 1 - name.endswith("json"))
    (tmp_path / name).write_text(content.replace("{}", f'{{"prompt": "a", "x": {nested}}}'))
    if depth == 99:
        assert files.read(tmp_path / name, ("prompt",)) == [{"prompt": "a"}]
    else:
        assert error(tmp_path / name, ("prompt",)).endswith(" (more than 100 levels deep)")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"label": "b"}\n{"prompt": \n[]\n{"prompt": "b", "prompt": "c"}\n{"prompt": "d"}\n',
        ),
        ("a.json", '[{"prompt": "a"}, {"label": "b"}, 3, [], null, {"prompt": "d"}]'),
        ("a.csv", 'prompt,label\na,b\n1\n"1\n2",\n,\n1,2,3\nd,e\n'),
    ],
)
def test_bad_rows_of_every_kind_can_be_skipped(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    skipped = []
    prompts = [row["prompt"] for row in files.read(tmp_path / name, ("prompt",), skipped)]
    assert [prompt for prompt in prompts if prompt != "1\n2"] == ["a", "d"] and 3 <= len(skipped) <= 4
    error(tmp_path / name, ("prompt",))


def test_where_all_rows_are_skipped_the_first_reason_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError) as caught:
        files.read(tmp_path / "a.jsonl", ("label",), [])
    why = f"the first of 2 that were left out: {tmp_path}/a.jsonl:1: expected a column 'label', there is 'prompt'"
    assert str(caught.value) == f"{tmp_path}/a.jsonl: expected at least one row, got none; {why}"


def test_of_many_columns_the_first_are_named(path):
    write(path, [{f"c{i}": "a" for i in range(40)}])
    assert error(path, ("prompt",)).endswith("there is 'id', 'c0', 'c1', 'c2', 'c3' and 36 more")


def test_a_file_without_a_header_is_not_printed(tmp_path):
    """Its first row is a text."""
    (tmp_path / "a.csv").write_text(f"{'a word ' * 500},positive\n")
    assert error(tmp_path / "a.csv").endswith(f"there is '{'a word ' * 10}a word..., 'positive'")


def test_a_long_text_is_read(path):
    rows = [{"prompt": "x" * 200_000, "label": "y"}]
    assert files.read(write(path, rows), COLUMNS) == rows


def test_a_pipe_is_refused_rather_than_waited_for(path):
    os.mkfifo(path)
    assert error(path) == ": expected a file, got a pipe or a device"


# The other columns


def test_the_other_columns_are_kept_if_asked_for(path):
    given = [row | {"empty": ""} for row in ROWS]
    rows = files.read(write(path, given), ("label",), extra=True)
    assert rows == [{"id": "7" if path.suffix == ".csv" else 7} | row for row in given]
    assert [list(row) for row in rows] == [["label", "id", "prompt", "empty"]] * 2  # those asked for come first
    assert rows[1].where == f"{path}{SECOND_ROW[path.suffix]}"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_other_columns_keep_their_types(tmp_path, suffix):
    others = {"none": None, "number": 0.5, "yes": True, "tests": [{"in": [1, 2], "out": "3"}], "about": {"by": "x"}}
    path = write(tmp_path / f"a{suffix}", [{"prompt": "a"} | others])
    assert files.read(path, ("prompt",), extra=True) == [{"prompt": "a", "id": 7} | others]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_json_need_not_have_the_same_other_columns(tmp_path, suffix):
    rows = [{"prompt": "a", "answer": 4}, {"prompt": "b", "hint": "c"}]
    assert files.read(write(tmp_path / f"a{suffix}", rows), ("prompt",), extra=True) == [
        {"id": 7} | row for row in rows
    ]


def test_dates_of_parquet_are_dates(tmp_path):
    rows = [{"prompt": "a", "day": datetime.date(2020, 1, 2)}]
    assert files.read(write(tmp_path / "a.parquet", rows), ("prompt",), extra=True) == [{"id": 7} | rows[0]]


@pytest.mark.parametrize(("unit", "value"), [("ns", 1), ("ms", 10**15)])  # a nanosecond; the year 33658
def test_a_time_that_python_has_no_value_for_is_named(tmp_path, unit, value):
    times = pyarrow.array([0, value], pyarrow.timestamp(unit))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "when": times}), tmp_path / "a.parquet")
    assert files.read(tmp_path / "a.parquet", ("prompt",)) == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(InputError, match=rf"a.parquet:2: when: expected a timestamp\[{unit}\] that Python can hold$"):
        files.read(tmp_path / "a.parquet", ("prompt",), extra=True)


def test_the_columns_asked_for_are_text_and_the_others_anything(path):
    write(path, [ROWS[0] | {"answer": "4"}, {"prompt": "a", "label": " ", "answer": " "}])
    with pytest.raises(InputError, match="label: expected text, got an empty one$"):
        files.read(path, COLUMNS, extra=True)
    skipped = []
    assert len(files.read(path, COLUMNS, skipped, extra=True)) == len(skipped) == 1
    assert len(files.read(path, ("prompt",), extra=True)) == 2


def test_converted_rows_are_checked_in_the_columns_that_hold_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": 4}])

    def convert(values):
        return values | {"prompt": values["question"]}

    cells = files.cells(path, ("question",), extra=True)
    expected = {"question": "a", "answer": 4, "id": 7, "prompt": "a"}
    assert files.rows(cells, path, convert=convert, texts=("prompt",)) == [expected]
    with pytest.raises(InputError, match="a.jsonl:1: answer: expected text, got int"):
        files.rows(files.cells(path, ("answer",)), path)
