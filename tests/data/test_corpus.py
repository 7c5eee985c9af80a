import dataclasses
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data import corpus
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
        (train, held_out), skipped = corpus.load(corpus.Config(kind=kind, made=400), seed=1)
        assert skipped == [] and len(train) + len(held_out) == 400 and 15 < len(held_out) < 80
        assert not {row["text"] for row in train} & {row["text"] for row in held_out}


def test_a_file_is_read_and_what_is_skipped_is_told(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,sentiment\n" + "".join(f"tweet {i},positive\n" for i in range(50)) + "x,odd\n")
    config = corpus.Config(source="file", path=str(path))
    with pytest.raises(InputError, match=r"data.path: .*t.csv:52: sentiment: expected positive"):
        corpus.load(config, seed=1)
    (train, held_out), skipped = corpus.load(dataclasses.replace(config, skip_bad=True), seed=1)
    assert len(train) + len(held_out) == 50 and len(skipped) == 1


def test_too_few_texts_to_hold_any_out_are_an_error(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One.<|endoftext|>Two.")
    with pytest.raises(InputError, match="data.held_out: .*expected at least one row on each side"):
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
    (train, held_out), skipped = corpus.load(published, seed=1)
    expected = [{"text": f"tweet {i}", "sentiment": MOODS[i % 3]} for i in range(60)]
    assert sorted(train + held_out, key=str) == sorted(expected, key=str) and skipped == []
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
    (train, held_out), skipped = corpus.load(dataclasses.replace(config, skip_bad=True), seed=1)
    assert (len(train + held_out), len(skipped)) == (45, 15)
