"""Rows of files: what is read, what is left out and noted, and what is refused."""

import json
from pathlib import Path

import pytest

from rlhf_jax.data.tldr import format_query
from rlhf_jax.tasks.prompts import Given
from tests.support import Recorder, changed, error, smallest, stages, write_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return smallest(tmp_path_factory.mktemp("world"))


def row(i):
    post = "x" * 400 if i % 5 == 0 else "one\ntwo"
    return {"prompt": format_query("s", f"title {i}", post), "label": f"ends , {i}", "chosen": "ends", "rejected": "or"}


ROWS = [row(i) for i in range(20)]
NAMES = {"sft": ("prompt", "label"), "preferences": ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("task", ["summarize", "prompts"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_of_files(suffix, task, config, tmp_path):
    path = write_rows(tmp_path / f"rows{suffix}", ROWS)
    data = {"source": "files", "sft": path, "preferences": path, "held_out": 0.3}
    given = stages(changed(config, task=task, data=data), tmp_path / "run").task
    for kind, columns in NAMES.items():
        train, held_out, _ = given.rows(kind)
        expected = [{column: row[column] for column in columns} for row in ROWS]
        assert sorted(train + held_out, key=str) == sorted(expected, key=str) and train and held_out
    # The prompts of the SFT rows, where no others are given; with all columns, for a reward of rows.
    train, held_out, _ = given.rows("prompts")
    for prompts, labelled in zip((train, held_out), given.rows("sft")[:2], strict=True):
        assert [{name: row[name] for name in ("prompt", "label")} for row in prompts] == labelled
    assert sorted(train + held_out, key=str) == sorted(ROWS, key=str)
    own = stages(changed(config, task=task, data=data | {"prompts": path}), tmp_path / "other").task
    assert {tuple(sorted(row)) for row in own.rows("prompts").train} == {tuple(sorted(ROWS[0]))}


@pytest.mark.parametrize("kind", NAMES)
def test_a_file_that_is_not_given_is_named(kind, config, tmp_path):
    steps = stages(changed(config, data={"source": "files"}), tmp_path)
    message = error(steps.task.rows, kind)
    assert message.startswith(f"data.{kind}: expected a .jsonl, ") and ".csv" in message and ".parquet" in message
    assert message.endswith(f" file (--config.data.{kind}=FILE), got none")


def test_what_had_to_be_cut_or_skipped_is_noted(config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = {"source": "files", "sft": path, "held_out": 0.3, "response_length": 10}  # " ends , 9" and EOS
    reporter = Recorder()
    steps = stages(changed(config, data=data, sft={"batch": 2}), tmp_path / "run", reporter)
    steps._check_data("sft")
    notes, kept = [], []
    for side, rows in zip(("train", "held out"), steps.task.rows("sft")[:2], strict=True):
        cut = sum(len(row["prompt"]) > 300 for row in rows)
        skipped = sum(len(row["label"]) > len("ends , 9") for row in rows)
        notes.append(f"data.sft, {side}: {len(rows)} rows, {cut} cut prompts, {skipped} skipped labels")
        kept.append(len(rows) - skipped)
    assert reporter.notes == notes and sum(kept) == 10
    assert [len(side["index_N"]) for side in steps.setup.arrays("sft")[:2]] == kept


def test_bad_rows_are_named_or_skipped_and_noted(config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"label": " "}])
    data = {"source": "files", "sft": path, "held_out": 0.3}
    reason = f"{path}:21: label: expected text, got an empty one"
    steps = stages(changed(config, data=data), tmp_path / "run")
    assert error(steps.task.rows, "sft") == f"data.sft: {reason}"
    reporter = Recorder()
    steps = stages(changed(config, data=data | {"skip_bad": True}, sft={"batch": 2}), tmp_path / "other", reporter)
    assert sum(map(len, steps.task.rows("sft")[:2])) == 20
    steps._check_data("sft")
    assert reporter.notes[0] == f"data.sft: 1 rows skipped; the first: {reason}"
    assert len([note for note in reporter.notes if "skipped; the first" in note]) == 1


def test_a_row_without_known_characters_is_named_as_it_is_in_its_file(config, tmp_path):
    sft, preferences = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "pairs.jsonl"
    pairs = [row | {"rejected": "\u4e2d"} if i == 16 else row for i, row in enumerate(ROWS)]
    preferences.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = {"source": "files", "sft": sft, "preferences": str(preferences), "held_out": 0.3}
    steps = stages(changed(config, data=data), tmp_path / "run")
    message = error(steps.setup.arrays, "preferences")
    assert f"{preferences}:17: rejected: " in message and "no known characters" in message


def test_a_row_without_known_characters_can_be_skipped(config, tmp_path):
    sft = write_rows(tmp_path / "rows.jsonl", ROWS)
    pairs = [row | {"prompt": "\u4e2d\u6587"} if i in (3, 16) else row for i, row in enumerate(ROWS)]
    preferences = write_rows(tmp_path / "pairs.jsonl", pairs)
    data = {"source": "files", "sft": sft, "preferences": preferences, "held_out": 0.3, "skip_bad": True}
    arrays = stages(changed(config, data=data), tmp_path / "run").setup.arrays("preferences")
    assert sum(len(side["index_N"]) for side in arrays[:2]) == 18
    assert sum("1 rows skipped" in note or "2 rows skipped" in note for note in arrays.notes) in (1, 2)
    assert any(f"{preferences}:4: prompt: text with no known characters" in note for note in arrays.notes)


def test_what_is_said_of_rows_that_are_read_twice_is_said_once(config, tmp_path):
    """Prompts are those of the SFT rows; their rewards read the labels as they are learned."""
    rows = [row | {"label": f"ends , {i}<|endoftext|>"} for i, row in enumerate(ROWS)]
    data = {"source": "files", "sft": write_rows(tmp_path / "rows.jsonl", rows), "held_out": 0.3}
    reporter = Recorder()
    one = {name: {"batch": 1} for name in ("sft", "ppo")} | {"reward": {"kind": "sentiment"}}
    steps = stages(changed(config, task="prompts", data=data, **one), tmp_path / "run", reporter)
    for name in "sft", "ppo":
        steps._check_data(name)
    expected = "data.sft: 20 texts ended with the name of a special token (<|endoftext|>); it was taken off"
    assert reporter.notes.count(expected) == 1 and len(reporter.notes) == 5
    assert all(
        row["label"].startswith("ends , ") and "<" not in row["label"] for row in steps.task.rows("prompts").train
    )


def given(rows, **changes):
    return Given({"sft": rows, "prompts": rows}, prompt_length=9, response_length=4, held_out=0.5, **changes)


def test_rows_of_a_notebook_are_checked_as_those_of_files():
    rows = [{"prompt": f"a{i}", "label": f"b{i} <|endoftext|>", "more": [i]} for i in range(9)]
    for kind, label in (("sft", "b{}"), ("prompts", "b{} <|endoftext|>")):
        found = sorted((row for side in given(rows).rows(kind)[:2] for row in side), key=str)
        assert found == [row | {"label": label.format(i)} for i, row in enumerate(rows)]
    for bad, message in (
        ({"prompt": "a"}, "expected a column 'label', there is 'prompt'"),
        ({"prompt": "a", "label": None}, "label: expected text, got NoneType"),
        ({"prompt": "a", "label": "<|endoftext|>"}, "label: expected text, got an empty one"),
        (3, "expected a JSON object, got int"),
    ):
        assert error(given([*rows, bad]).rows, "sft") == f"rows[9]: {message}"
    same = [{"prompt": "a", "label": str(i)} for i in range(9)]
    expected = "expected rows to train on and rows to hold out (0.5 of all), got 9 rows with 1 different prompt: none"
    assert error(given(same).rows, "sft").startswith(expected)


def test_a_file_that_changes_in_the_same_process_is_read_again(config, tmp_path):
    """As in a notebook."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    own = changed(config, task="prompts", data={"source": "files", "prompts": path, "held_out": 0.3})
    before = stages(own, tmp_path / "run")
    assert sum(map(len, before.task.rows("prompts")[:2])) == 20
    digests = before.depends("ppo")["sha256"]
    write_rows(Path(path), ROWS[:10])
    after = stages(own, tmp_path / "other")
    assert sum(map(len, after.task.rows("prompts")[:2])) == 10
    assert digests and digests.keys() == after.depends("ppo")["sha256"].keys()
    assert digests != after.depends("ppo")["sha256"]


@pytest.mark.parametrize(
    ("cut", "kept"), [("left", lambda text: text[-300:]), ("right", lambda text: text[:300]), ("skip", None)]
)
def test_prompts_that_are_too_long(cut, kept, config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = {"source": "files", "prompts": path, "held_out": 0.3, "cut": cut}
    steps = stages(changed(config, task="prompts", data=data), tmp_path / "run")
    arrays = steps.setup.arrays("prompts")
    texts = [
        steps.setup.tokenizer.decode(ids[mask])
        for side in arrays[:2]
        for ids, mask in zip(side["prompt_NP"], side["prompt_mask_NP"], strict=True)
    ]
    expected = [row["prompt"] for row in ROWS]
    expected = [kept(text) for text in expected] if kept else [text for text in expected if len(text) <= 300]
    assert sorted(texts) == sorted(expected) and len(texts) == (20 if kept else 16)
    word = "cut prompts" if kept else "skipped prompts"
    assert sum(int(note.split(f" {word}")[0].split(", ")[-1]) for note in arrays.notes if word in note) == 4


def test_a_prompt_that_is_too_long_may_be_an_error(config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = {"source": "files", "prompts": path, "held_out": 0.3, "cut": "error"}
    steps = stages(changed(config, task="prompts", data=data), tmp_path / "run")
    assert error(steps.setup.arrays, "prompts").startswith("data.prompts, ")


def test_the_world_has_no_prompts_of_ones_own(config, tmp_path):
    expected = "data.source: expected files or hub where task is prompts, got 'world'"
    assert error(stages, changed(config, task="prompts"), tmp_path) == expected


def test_there_are_no_plain_texts_to_pretrain_on(config, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    data = {"source": "files", "prompts": path, "held_out": 0.3}
    steps = stages(changed(config, task="prompts", data=data, pretrain={"steps": 3}, sft={"steps": 0}), tmp_path / "a")
    assert error(steps.all).startswith("pretrain.steps: expected 0")
    assert not (tmp_path / "a").exists()
