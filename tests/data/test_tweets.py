import csv

import pytest

from rlhf_jax.data import corpus, files, tweets
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import sentiment


def table(path, rows, header=("textID", "text", "sentiment")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_made_tweets_feel_as_they_are_labelled():
    rows = tweets.made(600, 0)
    scores = {name: [] for name in tweets.SENTIMENTS}
    for row in rows:
        scores[row["sentiment"]].append(sentiment.compound([row["text"]])[0])
    means = {name: sum(some) / len(some) for name, some in scores.items()}
    assert means["positive"] > 0.4 and abs(means["neutral"]) < 0.3 and means["negative"] < -0.2
    assert all(len(some) > 150 for some in scores.values())


def test_a_seed_makes_the_same_tweets_again_and_another_makes_others():
    assert tweets.made(50, 3) == tweets.made(50, 3)
    assert tweets.made(50, 3) != tweets.made(50, 4)
    assert tweets.made(60, 3)[:50] == tweets.made(50, 3)


def read(path, skipped=None, **columns):
    return files.rows(tweets.cells(path, corpus.Columns(**columns)), path, skipped, convert=tweets.row)


def test_other_columns_of_the_file_are_left_where_they_are(tmp_path):
    path = table(tmp_path / "t.csv", [("1", "so good", "positive"), ("2", "a, b\nc", "neutral")])
    assert read(path) == [
        {"text": "so good", "sentiment": "positive"},
        {"text": "a, b\nc", "sentiment": "neutral"},
    ]


SENTIMENTS = "expected positive, neutral, negative (0 negative, 1 neutral, 2 positive)"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (("2", " ", "neutral"), ":3: text: expected text, got an empty one"),
        (("2", "fine", "happy"), f":3: sentiment: {SENTIMENTS}; got 'happy'"),
        (("2", "fine", ""), f":3: sentiment: {SENTIMENTS}; got ''"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, bad, told):
    path = table(tmp_path / "t.csv", [("1", "so good", "positive"), bad, ("3", "bad", "negative")])
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}{told}"
    skipped = []
    assert [row["text"] for row in read(path, skipped)] == ["so good", "bad"]
    assert skipped == [f"{path}{told}"]


def test_a_file_without_the_columns_is_named(tmp_path):
    path = table(tmp_path / "t.csv", [("1", "so good", "positive")], header=("id", "tweet", "sentiment"))
    with pytest.raises(
        InputError, match="expected columns 'text' and 'sentiment', or .* there is 'id', 'tweet', 'sent"
    ):
        read(path, [])
    assert read(path, text="tweet") == [{"text": "so good", "sentiment": "positive"}]


def test_a_label_is_a_name_or_a_number(tmp_path):
    path = table(tmp_path / "t.csv", [("a", "2"), ("b", "0"), ("c", "1")], header=("text", "label"))
    assert [row["sentiment"] for row in read(path)] == ["positive", "negative", "neutral"]
    assert tweets.row({"text": "a", "label": 2}) == {"text": "a", "sentiment": "positive"}
    path = table(tmp_path / "both.csv", [("a", "9", "neutral")], header=("text", "label", "label_text"))
    assert read(path) == [{"text": "a", "sentiment": "neutral"}]


@pytest.mark.parametrize("label", [3, -1, "3", None, 1.0, True, [1]])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(InputError) as caught:
        tweets.row({"text": "a", "label": label})
    assert str(caught.value) == f"label: {SENTIMENTS}; got {label!r}"


def test_the_column_of_the_label_can_be_named(tmp_path):
    path = table(tmp_path / "t.csv", [("a", "positive", "negative")], header=("text", "sentiment", "mood"))
    assert read(path, sentiment="mood") == [{"text": "a", "sentiment": "negative"}]
