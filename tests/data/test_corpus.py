import dataclasses
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax import fields
from rlhf_jax.data import corpus, files
from rlhf_jax.errors import InputError
from rlhf_jax.text import char

TEXTS = [{"text": "abcd"}, {"text": "b"}, {"text": "cc"}]
TOKENIZER = char.train(row["text"] for row in TEXTS)  # a 0, b 1, c 2, d 3, UNK 4, EOS 5, PAD 6


def tokens(arrays):
    return np.concatenate([arrays["prompt_NP"], arrays["response_NR"]], axis=1).tolist()


def test_windows_cut_one_stream_with_eos_before_each_text():
    # 5 0 1 2 | 3 5 1 5 | 2 2 5: the last row would not be full
    arrays = corpus.windows(TEXTS, TOKENIZER, 4)
    assert tokens(arrays) == [[5, 0, 1, 2], [3, 5, 1, 5]]
    assert arrays["prompt_NP"].shape == (2, 1)
    assert arrays["prompt_mask_NP"].all() and arrays["response_mask_NR"].all()
    assert arrays["index_N"].tolist() == [0, 1]


def test_openings_are_texts_after_eos_that_end_where_they_end():
    arrays = corpus.openings(TEXTS, TOKENIZER, 4)
    assert tokens(arrays) == [[5, 0, 1, 2], [5, 1, 5, 6], [5, 2, 2, 5]]
    assert arrays["response_mask_NR"].tolist() == [[True] * 3, [True, True, False], [True] * 3]


def test_samples_start_from_eos_alone():
    arrays = corpus.starts(3, TOKENIZER)
    assert arrays["prompt_NP"].tolist() == [[5]] * 3 and arrays["prompt_mask_NP"].all()


def test_a_stream_too_short_for_one_window_is_an_error():
    with pytest.raises(InputError, match="data.length: expected at most 11, the tokens of all texts, got 12"):
        corpus.windows(TEXTS, TOKENIZER, 12)


def test_both_kinds_are_split_by_text(tmp_path):
    for kind in corpus.KINDS:
        (train, held_out), notes = corpus.load(corpus.Config(kind=kind, made=400), seed=1)
        assert notes == [] and len(train) + len(held_out) == 400 and 15 < len(held_out) < 80
        assert not {row["text"] for row in train} & {row["text"] for row in held_out}


def test_a_file_is_read_and_what_is_skipped_is_told(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,sentiment\n" + "".join(f"tweet {i},positive\n" for i in range(50)) + "x,odd\n")
    config = corpus.Config(source="file", path=str(path))
    with pytest.raises(InputError, match=r"data.path: .*t.csv:52: sentiment: expected positive"):
        corpus.load(config, seed=1)
    (train, held_out), notes = corpus.load(dataclasses.replace(config, skip_bad=True), seed=1)
    assert len(train) + len(held_out) == 50 and len(notes) == 1
    assert notes[0].startswith(f"data.path: 1 rows skipped; the first: {path}:52: sentiment: expected positive")


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_eos_is_not_written_as_text(kind, tmp_path):
    """It cannot be distinguished from a story that begins with it."""
    rows = [{"text": f"<|endoftext|> {i} <|endoftext|>", "label": 1} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (train, held_out), notes = corpus.load(
        corpus.Config(kind=kind, source="file", path=str(tmp_path / "rows.jsonl")), 1
    )
    assert sorted(row["text"] for row in train + held_out) == sorted(f"<|endoftext|> {i}" for i in range(50))
    assert notes == ["data.path: 50 texts ended with the name of a special token (<|endoftext|>); it was taken off"]


def test_a_tweet_is_not_its_sentiment():
    with pytest.raises(InputError, match="^columns.sentiment: expected another column than that of data.columns.text"):
        fields.check(corpus.Config(columns=corpus.Columns(text="label", sentiment="label")))


PLACED = [files.Row({"text": text}, f"t.csv:{i}") for i, text in enumerate(("abcd", "❤❤", "b", "cc"), start=2)]


@pytest.mark.parametrize("make", [corpus.windows, corpus.openings])
def test_a_text_without_known_characters_is_named_or_left_out_and_noted(make):
    expected = "t.csv:3: text: text with no known characters: it begins with '❤'; all its characters are new"
    with pytest.raises(InputError) as caught:
        make(PLACED, TOKENIZER, 4)
    assert str(caught.value) == f"data.path: {expected}"
    notes = []
    assert tokens(make(PLACED, TOKENIZER, 4, skip_bad=True, notes=notes)) == tokens(make(TEXTS, TOKENIZER, 4))
    assert notes == [f"data.path: 1 rows skipped; the first: {expected}"]
    with pytest.raises(InputError, match="^data.path: t.csv:3: .*; and no other of the 1 texts can be encoded$"):
        make(PLACED[1:2], TOKENIZER, 4, skip_bad=True)


def test_a_row_is_found_by_its_index_where_others_are_left_out():
    assert corpus.openings(PLACED, TOKENIZER, 4, skip_bad=True)["index_N"].tolist() == [0, 2, 3]


def test_pairs_that_are_cut_to_the_same_are_left_out_and_noted():
    texts = [("abcd", "abcc"), ("b", "cc"), ("a", "❤"), ("cc", "cc")]
    rows, notes = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in texts], []
    arrays = corpus.pairs(rows, TOKENIZER, 4, skip_bad=True, notes=notes)
    assert arrays["index_N"].tolist() == [1]
    assert (arrays["chosen_NR"].tolist(), arrays["rejected_NR"].tolist()) == ([[1, 5, 6]], [[2, 2, 5]])
    assert [note.split(";")[0] for note in notes] == [
        "data.path: 1 rows skipped",
        "preferences: 2 pairs skipped, whose first 3 tokens are the same",
    ]
    with pytest.raises(InputError, match="^data.length: expected chosen and rejected that differ"):
        corpus.pairs(rows[:1], TOKENIZER, 4)


def test_too_few_texts_to_hold_any_out_are_an_error(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One.<|endoftext|>Two.")
    with pytest.raises(InputError, match="data.held_out: .*expected rows to train on and rows to hold out"):
        corpus.load(corpus.Config(kind="stories", source="file", path=str(path), held_out=1e-6), seed=1)


MOODS = ["negative", "neutral", "positive"]


@pytest.fixture
def published(hub_server, tmp_path):
    """The sets that are read where none is named, in the files and columns that they have."""
    labels = [{"id": str(i), "text": f"tweet {i}", "label": i % 3, "label_text": MOODS[i % 3]} for i in range(60)]
    tweet_files = {"train.jsonl": labels, "test.jsonl": labels[:2]}
    files = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in tweet_files.items()}
    hub_server.add(corpus.tweets.HUB, files, kind="dataset")
    files = {}
    for split, count in [("train", 4), ("validation", 3)]:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": [f" Story {i}. \n" for i in range(count)]}), file)
        files[f"data/{split}-00000-of-00001-abc.parquet"] = file.getvalue()
    hub_server.add(corpus.stories.HUB, files | {"TinyStories-train.txt": "no"}, kind="dataset")
    return corpus.Config(source="hub", cache=str(tmp_path / "cache"))


def test_the_published_tweets(published):
    (train, held_out), notes = corpus.load(published, seed=1)
    expected = [{"text": f"tweet {i}", "sentiment": MOODS[i % 3]} for i in range(60)]
    assert sorted(train + held_out, key=str) == sorted(expected, key=str) and notes == []
    numbers = dataclasses.replace(published, columns=corpus.Columns(sentiment="label"))
    assert corpus.load(numbers, seed=1) == ((train, held_out), [])


def test_the_published_stories_and_a_split_to_hold_out(published):
    config = dataclasses.replace(published, kind="stories", split="validation", held_out_split="train")
    (train, held_out), _ = corpus.load(config, seed=1)
    assert [row["text"] for row in train] == ["Story 0.", "Story 1.", "Story 2."]
    assert [row["text"] for row in held_out] == ["Story 0.", "Story 1.", "Story 2.", "Story 3."]


def test_another_set_is_named_in_the_path_and_its_errors_name_it(published, hub_server):
    rows = [{"tweet": f"tweet {i}", "label": i % 4} for i in range(60)]
    hub_server.add("who/what", {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}, kind="dataset")
    config = dataclasses.replace(published, path="who/what")
    with pytest.raises(
        InputError, match="^data.path: .*: expected columns 'text' and 'sentiment', or .* there is 'tweet'"
    ):
        corpus.load(config, seed=1)
    config = dataclasses.replace(config, columns=corpus.Columns(text="tweet"))
    with pytest.raises(InputError, match=r"^data.path: who/what/train:4: label: expected positive, .*; got 3$"):
        corpus.load(config, seed=1)
    (train, held_out), notes = corpus.load(dataclasses.replace(config, skip_bad=True), seed=1)
    assert len(train + held_out) == 45 and notes[0].startswith(
        "data.path: 15 rows skipped; the first: who/what/train:4"
    )
