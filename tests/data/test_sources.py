"""Files and data sets of the hub (the world is in test_world.py), of the schemas of the sets whose names they have."""

import dataclasses
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax import fields
from rlhf_jax.data import sources
from rlhf_jax.data.tldr import format_query
from rlhf_jax.errors import InputError
from rlhf_jax.tasks.summarize import Summarize
from tests.support import write_rows


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def prompts(start, stop):
    return [format_query("s", "t", f"post {i}") for i in range(start, stop)]


TLDR = {
    split: [{"prompt": prompt, "completion": f" so {prompt[-9:-7]}"} for prompt in prompts(*ends)]
    for split, ends in {"train": (0, 20), "validation": (20, 23)}.items()
}
PAIRS = [{"prompt": prompt, "chosen": " good", "rejected": " bad"} for prompt in prompts(0, 20)]
COMPARISONS = [
    {
        "info": {"id": str(i), "post": f"post {i}", "title": "t", "subreddit": "s", "site": None, "article": None},
        "summaries": [{"text": " bad", "policy": "a", "note": None}, {"text": " good", "policy": "b", "note": None}],
        "choice": 1,
        "worker": "w",
        "split": "train",
    }
    for i in range(20)
]


@pytest.fixture
def config(hub_server, tmp_path):
    files = {f"data/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in TLDR.items()}
    hub_server.add("trl-lib/tldr", files, kind="dataset")
    hub_server.add("trl-lib/tldr-preference", {"data/train-00000-of-00001.parquet": parquet(PAIRS)}, kind="dataset")
    files = {"comparisons/train/0000.parquet": parquet(COMPARISONS), "axis/test/0000.parquet": b"other"}
    hub_server.add("openai/summarize_from_feedback", {"summarize_from_feedback.py": ""}, kind="dataset")
    hub_server.add("openai/summarize_from_feedback", files, kind="dataset", revision="refs/convert/parquet")
    return sources.Config(
        source="hub",
        sft="trl-lib/tldr",
        preferences="trl-lib/tldr-preference",
        columns=sources.Columns(label="completion"),
        held_out=0.3,
        cache=str(tmp_path / "cache"),
    )


def error(kind, config):
    with pytest.raises(InputError) as caught:
        sources.load(kind, config, seed=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_are_renamed_and_a_share_is_held_out(config):
    (train, held_out), notes = sources.load("sft", config, seed=1)
    wanted = [{"prompt": row["prompt"], "label": row["completion"]} for row in TLDR["train"]]
    assert sorted(train + held_out, key=str) == sorted(wanted, key=str)
    assert train and held_out and notes == []


def test_prompts_are_those_of_the_sft_rows_or_a_set_of_their_own(config):
    assert sources.load("prompts", config, seed=1) == sources.load("sft", config, seed=1)
    own = dataclasses.replace(config, prompts="trl-lib/tldr-preference")
    (train, held_out), _ = sources.load("prompts", own, seed=1)
    # They keep the other columns, for a reward that reads them.
    assert {frozenset(row) for row in train + held_out} == {frozenset(("prompt", "chosen", "rejected"))}
    assert len(train + held_out) == 20


def test_a_split_can_be_what_is_held_out(config):
    config = dataclasses.replace(config, held_out_split="validation")
    (train, held_out), _ = sources.load("sft", config, seed=1)
    assert [row["prompt"] for row in train] == prompts(0, 20)
    assert [row["prompt"] for row in held_out] == prompts(20, 23)
    (train, _), _ = sources.load("sft", dataclasses.replace(config, split="validation", held_out_split="train"), seed=1)
    assert [row["prompt"] for row in train] == prompts(20, 23)


def test_openais_comparisons_are_pairs_too(config):
    pairs, _ = sources.load("preferences", config, seed=1)
    openai = dataclasses.replace(config, preferences="openai/summarize_from_feedback/comparisons")
    assert sources.load("preferences", openai, seed=1)[0] == pairs
    assert {tuple(row) for row in pairs[0]} == {("prompt", "chosen", "rejected")} and len(pairs[0]) < 20


def test_files_can_have_other_columns_and_comparisons_too(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TLDR["train"]))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in COMPARISONS))
    files = dataclasses.replace(
        config, source="files", sft=str(tmp_path / "rows.jsonl"), preferences=str(tmp_path / "pairs.jsonl")
    )
    for kind in ("sft", "preferences"):
        assert sources.load(kind, files, seed=1)[0] == sources.load(kind, config, seed=1)[0]


def test_rows_without_text_are_named_or_skipped_and_told(config, hub_server):
    bad = [*TLDR["train"], {"prompt": "p", "completion": " "}, {"prompt": "p", "completion": None}]
    hub_server.add("who/what", {"train.parquet": parquet(bad)}, kind="dataset")
    config = dataclasses.replace(config, sft="who/what")
    expected = "who/what/train:21: label: expected text, got an empty one"
    assert error("sft", config) == f"data.sft: {expected}"
    sides, notes = sources.load("sft", dataclasses.replace(config, skip_bad=True), seed=1)
    assert notes == [f"data.sft: 2 rows skipped; the first: {expected}"]
    assert sum(map(len, sides)) == 20


NAMED = ["two<|endoftext|>", " two <|endoftext|>\n", "two<|endoftext|>[PAD][PAD]", "two[PAD]"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", "hub"])
def test_the_name_of_a_special_token_at_the_end_of_an_answer_is_taken_off_and_counted(
    suffix, config, hub_server, tmp_path
):
    """The published rows of TL;DR that are preprocessed end so. In a prompt, and within a text, it is text."""
    rows = [
        {"query": f"one {i}<|endoftext|>", "a": f"{i} {text}", "b": f"{i} [PAD]?"} for i, text in enumerate(NAMED * 5)
    ]
    place = str(tmp_path / f"rows{suffix}")
    if suffix == "hub":
        place = "who/what"
        hub_server.add(place, {"train.parquet": parquet(rows)}, kind="dataset")
    elif suffix == ".json":
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    else:
        write_rows(tmp_path / f"rows{suffix}", rows)
    columns = sources.Columns(prompt="query", label="a", chosen="a", rejected="b")
    config = dataclasses.replace(
        config, source="hub" if suffix == "hub" else "files", sft=place, preferences=place, columns=columns
    )
    for kind, answer in (("sft", "label"), ("preferences", "chosen"), ("prompts", "label")):
        (train, held_out), notes = sources.load(kind, config, seed=1)
        found = {row["prompt"]: row[answer].split() for row in train + held_out}
        assert found == {f"one {i}<|endoftext|>": [str(i), "two"] for i in range(20)}
        assert kind != "preferences" or all(row["rejected"].endswith(" [PAD]?") for row in train)
        field = kind.replace("prompts", "sft")
        names = "the name of a special token (<|endoftext|>, [PAD])"
        assert notes == [f"data.{field}: 20 texts ended with {names}; it was taken off"]


def test_an_answer_that_is_nothing_else_is_no_text(config, tmp_path):
    rows = [{"prompt": f"{i}", "label": "a" if i else "<|endoftext|>"} for i in range(20)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = sources.Config(source="files", sft=path, held_out=0.3)
    assert error("sft", config) == f"data.sft: {path}:1: label: expected text, got an empty one"
    sides, _ = sources.load("sft", dataclasses.replace(config, skip_bad=True), seed=1)
    assert sum(map(len, sides)) == 19


@pytest.mark.parametrize(
    ("kind", "row", "columns"),
    [
        ("sft", {"prompt": "a {}", "label": " a {}\n"}, "prompt and label"),
        ("preferences", {"prompt": "a {}", "chosen": "{}", "rejected": "{}<|endoftext|>"}, "chosen and rejected"),
        ("preferences", {"prompt": "{}", "chosen": "{}", "rejected": "b"}, "prompt and chosen"),
    ],
)
def test_columns_that_hold_the_same_are_refused(kind, row, columns, tmp_path):
    """If one row differs, they are not the same."""
    rows = [{name: text.format(i) for name, text in row.items()} for i in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = sources.Config(source="files", held_out=0.3, **{kind: path})
    expected = f"data.{kind}: {path}: expected {columns} that differ, got the same text in all 9 rows"
    assert error(kind, config) == expected
    write_rows(tmp_path / "rows.jsonl", [*rows, {name: name for name in row}])
    sources.load(kind, config, seed=1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": "prompt"}, "label: expected another column than that of data.columns.prompt, got 'prompt'"),
        ({"rejected": "text", "chosen": "text"}, "rejected: expected another column than that of data.columns.chosen"),
        ({"chosen": "label"}, ""),  # of other rows: chosen texts can be learned from, too
    ],
)
def test_a_column_is_not_named_twice(columns, message):
    config = sources.Config(columns=sources.Columns(**columns))
    if message:
        with pytest.raises(InputError, match=f"^columns.{message}"):
            fields.check(config)
    else:
        fields.check(config)


def test_a_choice_out_of_range_is_named(config, hub_server):
    bad = [COMPARISONS[0], COMPARISONS[1] | {"choice": 2}]
    hub_server.add("who/what", {"train.parquet": parquet(bad)}, kind="dataset")
    message = error("preferences", dataclasses.replace(config, preferences="who/what"))
    assert message == "data.preferences: who/what/train:2: choice: expected 0 or 1 and two summaries, got 2 and 2"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sft", {"sft": ""}, "data.sft: expected a data set (--config.data.sft=NAME), got none"),
        ("sft", {"sft": "trl-lib/no"}, "data.sft: trl-lib/no: no such file or folder, and no such dataset on the hub"),
        ("sft", {"split": "dev"}, "data.sft: trl-lib/tldr: expected dev/*.parquet, or "),
        ("sft", {"held_out_split": "dev"}, "data.sft: trl-lib/tldr: expected dev/*.parquet, or "),
        ("preferences", {"preferences": "openai/summarize_from_feedback"}, "data.preferences: openai/summarize_from"),
    ],
)
def test_what_is_not_there_is_named_with_its_field(kind, change, message, config):
    assert error(kind, dataclasses.replace(config, **change)).startswith(message)


def test_a_missing_column_is_named_with_those_that_are_there(config):
    message = error("sft", dataclasses.replace(config, columns=sources.Columns()))
    assert message.endswith("expected a column 'label', there is 'prompt', 'completion'")
    message = error("preferences", dataclasses.replace(config, preferences="trl-lib/tldr"))
    wanted = "'prompt' and 'chosen' and 'rejected', or 'info' and 'summaries' and 'choice'"
    assert message.endswith(f"expected columns {wanted}, there is 'prompt', 'completion'")


def test_votes_replace_the_worlds_training_pairs(tmp_path):
    """They are files of pairs; the world's own held-out pairs, whose truth is known, evaluate."""
    sizes = {"world_sft": 12, "world_preferences": 8, "world_prompts": 8, "world_held_out": 12}
    world = sources.Config(cache=str(tmp_path), **sizes)
    votes = dataclasses.replace(world, preferences=write_rows(tmp_path / "votes.jsonl", PAIRS))
    (train, held_out), notes = sources.load("preferences", votes, seed=1)
    assert ([dict(row) for row in train], notes) == (PAIRS, [])
    assert held_out == sources.load("preferences", world, seed=1)[0][1] and len(held_out) == 12
    assert sources.load("sft", votes, seed=1) == sources.load("sft", world, seed=1)
    given = dict(votes.unused())
    assert "preferences" not in given and given["world_preferences"] == "preferences is given"
    assert "world_preferences" not in dict(world.unused())
    assert Summarize(votes, 1).files() == {"data.preferences": votes.preferences}  # a changed file is another run


def test_pairs_can_be_labelled_by_chance_or_by_length():
    """Half of the random ones are swapped, and the longer text is never rejected."""
    rows = [
        {"prompt": f"{i}", "chosen": "one two", "rejected": "one two three" if i % 2 else "one"} for i in range(400)
    ]
    longer = list(sources.labelled(rows, "longer", seed=0))
    assert all(len(row["chosen"].split()) > len(row["rejected"].split()) for row in longer)
    chance = list(sources.labelled(rows, "random", seed=0))
    assert 0.4 < sum(a != b for a, b in zip(chance, rows, strict=True)) / 400 < 0.6
    assert chance == list(sources.labelled(rows, "random", seed=0)) != list(sources.labelled(rows, "random", seed=1))
    assert [row["prompt"] for row in chance] == [row["prompt"] for row in rows]
