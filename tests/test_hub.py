import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from rlhf_jax import hub
from rlhf_jax.errors import InputError

FILES = {"tokenizer.json": "{}", "vocab.json": "{1}", "merges.txt": "a b", "model.bin": "pickled"}
NEW, OLD = ("tokenizer.json",), ("vocab.json", "merges.txt")


def error(name, *choices, **options):
    with pytest.raises(InputError) as caught:
        hub.folder(name, *choices, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Local


def test_a_local_folder_or_file_comes_first_and_asks_nobody(tmp_path, hub_server):
    (tmp_path / "merges.txt").touch()
    (tmp_path / "vocab.json").touch()
    assert hub.folder(tmp_path, NEW, OLD) == tmp_path
    assert hub.folder(str(tmp_path / "vocab.json"), NEW) == tmp_path / "vocab.json"
    assert hub_server.asked == []


def test_a_local_name_beats_the_same_name_on_the_hub(tmp_path, monkeypatch, hub_server):
    hub_server.add("who/what", FILES)
    (tmp_path / "who" / "what").mkdir(parents=True)
    (tmp_path / "who" / "what" / "tokenizer.json").touch()
    monkeypatch.chdir(tmp_path)
    assert hub.folder("who/what", NEW) == Path("who/what")
    assert hub_server.asked == []


def test_a_local_folder_without_the_files_is_named(tmp_path, hub_server):
    (tmp_path / "merges.txt").touch()
    expected = f"{tmp_path}: expected a folder with tokenizer.json, or vocab.json and merges.txt"
    assert error(tmp_path, NEW, OLD) == expected


@pytest.mark.parametrize("name", ["/no/such/folder", "./what", "a/b/c", "who/what@", "who//what", "@main", "a b"])
def test_what_can_be_no_name_on_the_hub_is_not_asked_for(name, hub_server):
    assert not hub.is_name(name)
    assert error(name, NEW).startswith(f"{name}: no such file or folder") and hub_server.asked == []


# On the hub


def test_only_the_first_choice_that_is_there_is_downloaded(hub_server):
    hub_server.add("who/what", FILES)
    assert names(hub.folder("who/what", ("a.json",), OLD, NEW)) == ["merges.txt", "vocab.json"]
    assert names(hub.folder("who/what@main", ("mod*",))) == ["merges.txt", "model.bin", "vocab.json"]


def test_other_files_come_with_a_choice_where_they_exist(hub_server):
    hub_server.add("who/what", FILES)
    assert names(hub.folder("who/what", OLD, also=("model.bin", "none.json"))) == [
        "merges.txt",
        "model.bin",
        "vocab.json",
    ]


def test_all_files_of_a_pattern_are_downloaded(hub_server):
    shards = {f"model-{i}.safetensors": str(i) for i in range(3)} | {"config.json": "{}", "model.bin": ""}
    hub_server.add("who/what", shards)
    folder = hub.folder("who/what", ("config.json", "model.safetensors"), ("config.json", "model-*.safetensors"))
    assert names(folder) == ["config.json", *(f"model-{i}.safetensors" for i in range(3))]
    assert [(folder / f"model-{i}.safetensors").read_text() for i in range(3)] == ["0", "1", "2"]


def test_a_star_stands_for_no_slash(hub_server):
    hub_server.add("who/what", {"a/b/c.txt": "", "b/c.txt": ""})
    assert error("who/what", ("a*.txt",)).startswith("who/what: expected a*.txt on the hub, ")
    assert names(hub.folder("who/what", ("*/c.txt",))) == ["b/c.txt"]


def test_a_second_time_nobody_is_asked(hub_server):
    hub_server.add("who/what", FILES)
    first = hub.folder("who/what", NEW)
    hub_server.asked.clear()
    hub_server.add("who/what", FILES | {"tokenizer.json": "newer"})
    assert hub.folder("who/what", NEW) == first and (first / "tokenizer.json").read_text() == "{}"
    assert hub_server.asked == []


def test_half_a_download_is_completed(hub_server):
    hub_server.add("who/what", FILES)
    assert names(hub.folder("who/what", ("vocab.json",))) == ["vocab.json"]
    assert names(hub.folder("who/what", ("nothing",), OLD)) == ["merges.txt", "vocab.json"]


def test_a_revision_is_pinned(hub_server):
    old = hub_server.add("who/what", {"tokenizer.json": "old"})
    hub_server.add("who/what", {"tokenizer.json": "new"})
    hub_server.add("who/what", {"tokenizer.json": "other"}, revision="refs/pr/1")
    for revision, text in [(f"@{old}", "old"), ("", "new"), ("@refs/pr/1", "other")]:
        assert (hub.folder(f"who/what{revision}", NEW) / "tokenizer.json").read_text() == text


def test_the_first_revision_with_the_files_is_taken(hub_server):
    hub_server.add("who/what", {"README.md": ""}, kind="dataset")
    hub_server.add("who/what", {"rows.parquet": "converted"}, kind="dataset", revision="refs/convert/parquet")
    revisions = ("gone", "main", "refs/convert/parquet")
    folder = hub.folder("who/what", ("*.parquet",), kind="dataset", revisions=revisions)
    assert names(folder) == ["rows.parquet"]
    hub_server.down = httpx2.ConnectError("no network")
    assert hub.folder("who/what", ("*.parquet",), kind="dataset", revisions=revisions) == folder


def test_a_model_is_no_data_set(hub_server):
    hub_server.add("who/what", FILES)
    assert "no such dataset on the hub" in error("who/what", NEW, kind="dataset")


def test_what_the_hub_lacks_is_one_line(hub_server):
    hub_server.add("who/what", FILES)
    assert error("who/where", NEW).startswith("who/where: no such file or folder, and no such model on the hub")
    assert error("who/what@v2", NEW) == "who/what@v2: no revision v2 on the hub"
    there = "there is tokenizer.json, vocab.json, merges.txt, model.bin"
    assert error("who/what", ("a",), ("b", "c")) == f"who/what: expected a, or b and c on the hub, {there}"


def test_a_gated_one_says_where_to_ask(hub_server):
    hub_server.add("who/what", FILES)
    hub_server.gated.add("who/what")
    assert error("who/what", NEW).startswith("who/what: request access at https://huggingface.co/who/what, then ")


# No network


def test_without_a_network_the_files_to_download_are_named(hub_server):
    hub_server.down = httpx2.ConnectError("Name or service\nnot known")
    message = error("who/what@v1", NEW, OLD, kind="dataset")
    assert "the hub cannot be read (ConnectError: Name or service not known); " in message
    files = "tokenizer.json, or vocab.json and merges.txt of https://huggingface.co/datasets/who/what (v1)"
    assert message.endswith(f"download {files} into a folder and give its path")
    assert hub_server.asked == []


def test_a_hub_that_does_not_answer_is_given_up(hub_server, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    hub_server.slow = lambda: time.sleep(1)
    start = time.monotonic()
    assert "TimeoutError: no answer in 0.1 seconds" in error("who/what", NEW)
    assert time.monotonic() - start < 0.9


def test_many_choices_are_told_in_short(hub_server):
    hub_server.down = httpx2.ConnectError("no")
    assert "download a, or b, or c, ... of " in error("who/what", ("a",), ("b",), ("c",), ("d",))


def test_offline_mode_asks_nobody_and_is_quick(tmp_path):
    code = "from rlhf_jax import hub; hub.folder('who/what', ('tokenizer.json',))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the hub cannot be read (OfflineModeIsEnabled: " in ran.stderr.splitlines()[-1]
    assert time.monotonic() - start < 10
