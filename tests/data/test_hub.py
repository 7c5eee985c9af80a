"""Sets of the layouts that are on the hub, written here; the hub's own client reads them through a false network."""

import datetime
import hashlib
import io
import json

import httpx2
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data import hub
from rlhf_jax.errors import InputError

ROWS = [{"id": i, "prompt": f"p{i}", "label": f"é {i}"} for i in range(5)]
COLUMNS = ("prompt", "label")
WANTED = [{column: row[column] for column in COLUMNS} for row in ROWS]


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def read(tmp_path):
    """The values of all rows: read(name, split="train", *choices, extra=False)."""

    def read(name, split="train", *choices, **options):
        cells = hub.cells(name, split, *(choices or [COLUMNS]), cache_folder=tmp_path / "cache", **options)
        return [values for _, values in cells]

    return read


def error(read, *args):
    with pytest.raises(InputError) as caught:
        read(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAYOUTS = {
    "train-00000-of-00002-1a2b.parquet": "train-00001-of-00002-3c4d.parquet",
    "data/train-00000-of-00002.parquet": "data/train-00001-of-00002.parquet",
    "default/train/0000.parquet": "default/train/0001.parquet",
}


@pytest.mark.parametrize(("first", "second"), LAYOUTS.items())
def test_the_parquet_files_of_a_split_are_read_in_order(first, second, hub_server, read):
    other = first.replace("train", "train_of_another_kind"), first.replace("train", "validation")
    files = {second: parquet(ROWS[3:]), first: parquet(ROWS[:3]), "README.md": "# Set", "train.jsonl": "wrong"}
    hub_server.add("who/what", files | dict.fromkeys(other, b"wrong"), kind="dataset")
    assert read("who/what") == WANTED


@pytest.mark.parametrize(("name", "write"), [("train.jsonl", jsonl), ("data/train.parquet", parquet)])
def test_one_file_a_split(name, write, hub_server, read):
    validation = {name.replace("train", "validation"): write(ROWS[:1])}
    hub_server.add("who/what", {name: write(ROWS)} | validation, kind="dataset")
    assert read("who/what") == WANTED
    assert read("who/what", "validation") == WANTED[:1]


def test_csv_values_are_text(hub_server, read):
    hub_server.add("who/what", {"train.csv": "prompt,label\na,1\n"}, kind="dataset")
    assert read("who/what") == [{"prompt": "a", "label": "1"}]


def test_a_set_of_another_format_is_read_as_the_hub_converted_it(hub_server, read):
    files = {f"{subset}/{split}/0000.parquet": parquet(ROWS[:i]) for i, (subset, split) in enumerate(SUBSETS, start=1)}
    hub_server.add("who/what", {"what.py": "script", "a/train.txt": ""}, kind="dataset")
    hub_server.add("who/what", files, kind="dataset", revision="refs/convert/parquet")
    for i, (subset, split) in enumerate(SUBSETS, start=1):
        assert read(f"who/what/{subset}", split) == WANTED[:i]
    message = error(read, "who/what")
    assert message.startswith(
        "who/what: expected train/*.parquet, or train-*.parquet, or train.parquet, ... on the hub, "
    )
    assert message.endswith("there is a/train/0000.parquet, a/test/0000.parquet, b/train/0000.parquet")


SUBSETS = [("a", "train"), ("a", "test"), ("b", "train")]


def test_a_revision_is_pinned_and_kept_apart(hub_server, read):
    old = hub_server.add("who/what", {"train.jsonl": jsonl(ROWS[:1])}, kind="dataset")
    hub_server.add("who/what", {"train.jsonl": jsonl(ROWS[:2])}, kind="dataset")
    assert (read("who/what"), read(f"who/what@{old}")) == (WANTED[:2], WANTED[:1])


def test_a_second_read_asks_nobody(hub_server, read, tmp_path):
    hub_server.add("who/what", {"train.parquet": parquet(ROWS)}, kind="dataset")
    read("who/what")
    hub_server.down = httpx2.ConnectError("no network")
    (cached,) = (tmp_path / "cache" / "hub").iterdir()
    assert cached.name.startswith("who_what_train_") and cached.suffix == ".array_record"
    before = cached.stat().st_mtime_ns
    assert read("who/what") == WANTED
    assert read("who/what", "train", ("id",)) == [{"id": i} for i in range(5)]  # of the files that are here now
    assert cached.stat().st_mtime_ns == before
    assert "the hub cannot be read" in error(read, "who/what", "validation")


def test_values_keep_their_types_and_nesting(hub_server, read):
    row = {"prompt": None, "label": [{"text": "a", "score": 0.5}, {"text": "b", "score": 2.0}]}
    hub_server.add("who/what", {"train.parquet": parquet([row])}, kind="dataset")
    assert read("who/what") == [row]


def test_the_first_choice_of_columns_that_is_there(hub_server, read):
    hub_server.add("who/what", {"train.parquet": parquet(ROWS)}, kind="dataset")
    assert read("who/what", "train", ("chosen",), ("label",), COLUMNS)[0] == {"label": "é 0"}


def test_a_row_says_where_it_is(hub_server, tmp_path):
    hub_server.add("who/what", {"a/train.jsonl": jsonl(ROWS)}, kind="dataset")
    cells = hub.cells("who/what/a@main", "train", COLUMNS, cache_folder=tmp_path)
    assert [where for where, _ in cells] == [f"who/what/a@main/train:{i}" for i in range(1, 6)]


def test_a_local_folder_or_file_is_read_where_it_is(hub_server, read, tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / "0000.parquet").write_bytes(parquet(ROWS))
    assert read(str(tmp_path / "set")) == read(str(tmp_path / "set" / "train" / "0000.parquet")) == WANTED
    assert hub_server.asked == [] and not (tmp_path / "cache").exists()
    assert error(read, str(tmp_path / "set"), "test").startswith(
        f"{tmp_path}/set: expected a folder with test/*.parquet"
    )


def test_the_other_columns_are_kept_if_asked_for(hub_server, read, tmp_path):
    hub_server.add("who/what", {"train.parquet": parquet(ROWS)}, kind="dataset")
    for _ in range(2):  # from the hub, then from the cache, which has a file for each of the two ways
        assert read("who/what") == WANTED
        assert read("who/what", extra=True) == ROWS
        assert list(read("who/what", extra=True)[0]) == ["prompt", "label", "id"]
    assert len(list((tmp_path / "cache" / "hub").iterdir())) == 2
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(parquet(ROWS))
    assert read(str(tmp_path / "set"), extra=True) == read(str(tmp_path / "set" / "train.parquet"), extra=True) == ROWS


def test_what_is_cached_without_the_other_columns_has_the_name_it_always_had(hub_server, read, tmp_path):
    hub_server.add("who/what", {"train.jsonl": jsonl(ROWS)}, kind="dataset")
    read("who/what")
    (cached,) = (tmp_path / "cache" / "hub").iterdir()
    digest = hashlib.sha256(b'["who/what", "train", [["prompt", "label"]]]').hexdigest()[:16]
    assert cached.name == f"who_what_train_{digest}.array_record"


def test_what_json_does_not_have_is_text_in_the_other_columns(hub_server, read):
    rows = [ROWS[0] | {"days": [datetime.date(2020, 1, 2)], "none": None}]
    hub_server.add("who/what", {"train.parquet": parquet(rows)}, kind="dataset")
    assert read("who/what", extra=True) == [ROWS[0] | {"days": ["2020-01-02"], "none": None}]
    message = error(lambda: read("who/what", "train", ("days",), extra=True))
    assert message.endswith("expected text, numbers, lists and objects (Object of type date is not JSON serializable)")


# What is not there


def test_a_missing_column_is_named_and_nothing_kept(hub_server, read, tmp_path):
    hub_server.add("who/what", {"train.parquet": parquet(ROWS)}, kind="dataset")
    message = error(read, "who/what", "train", ("prompt", "completion"))
    assert message.endswith("train.parquet: expected a column 'completion', there is 'id', 'prompt', 'label'")
    message = error(read, "who/what", "train", ("prompt", "completion"), ("query",))
    assert "expected columns 'prompt' and 'completion', or 'query', there is 'id', " in message
    assert list((tmp_path / "cache" / "hub").iterdir()) == []


def test_an_unknown_split_is_named_with_what_is_there(hub_server, read):
    hub_server.add("who/what", {"train.parquet": parquet(ROWS), "README.md": ""}, kind="dataset")
    expected = (
        "expected dev/*.parquet, or dev-*.parquet, or dev.parquet, ... on the hub, there is train.parquet, README.md"
    )
    assert error(read, "who/what", "dev") == f"who/what: {expected}"


def test_an_empty_set_is_named(hub_server, read, tmp_path):
    hub_server.add("who/what", {"train.jsonl": "\n"}, kind="dataset")
    assert error(read, "who/what") == "who/what/train: expected at least one row, got none"
    assert list((tmp_path / "cache" / "hub").iterdir()) == []


def test_a_value_that_json_has_no_word_for_is_named(hub_server, read):
    rows = [ROWS[0], ROWS[1] | {"label": datetime.date(2020, 1, 1)}]
    rows[0] = rows[0] | {"label": datetime.date(2020, 1, 2)}
    hub_server.add("who/what", {"train.parquet": parquet(rows)}, kind="dataset")
    expected = (
        "train.parquet:1: expected text, numbers, lists and objects (Object of type date is not JSON serializable)"
    )
    assert error(read, "who/what").endswith(expected)


@pytest.mark.parametrize("name", ["/no/such/folder", "./what", "who/what@", "a b/c"])
def test_a_name_that_no_set_could_have_is_not_asked_for(name, hub_server, read):
    assert error(read, name).startswith(f"{name}: no such folder, and not of the form ") and hub_server.asked == []


def test_without_a_network_the_files_to_download_are_named(hub_server, read):
    hub_server.down = httpx2.ConnectError("no network")
    message = error(read, "who/what/pairs", "dev")
    assert "download pairs/dev/*.parquet, or pairs/dev-*.parquet, " in message
    assert "of https://huggingface.co/datasets/who/what (main or refs/convert/parquet) into a folder" in message
