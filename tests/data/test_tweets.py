import csv

import pytest

from rlhf_jax.data import hub, tweets
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


def test_other_columns_of_the_file_are_left_where_they_are(tmp_path):
    path = table(tmp_path / "t.csv", [("1", "so good", "positive"), ("2", "a, b\nc", "neutral")])
    assert tweets.read(path) == [
        {"text": "so good", "sentiment": "positive"},
        {"text": "a, b\nc", "sentiment": "neutral"},
    ]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (("2", " ", "neutral"), ":3: text: expected text, got an empty one"),
        (("2", "fine", "happy"), ":3: sentiment: expected positive, neutral, negative; got 'happy'"),
        (("2", "fine", ""), ":3: sentiment: expected text, got an empty one"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, bad, told):
    path = table(tmp_path / "t.csv", [("1", "so good", "positive"), bad, ("3", "bad", "negative")])
    with pytest.raises(InputError) as caught:
        tweets.read(path)
    assert str(caught.value) == f"{path}{told}"
    skipped = []
    assert [row["text"] for row in tweets.read(path, skipped)] == ["so good", "bad"]
    assert skipped == [f"{path}{told}"]


def test_a_file_without_the_columns_is_named(tmp_path):
    path = table(tmp_path / "t.csv", [("1", "so good", "positive")], header=("id", "tweet", "sentiment"))
    with pytest.raises(InputError, match="expected a column 'text', there is 'id', 'tweet', 'sentiment'"):
        tweets.read(path, [])


def test_the_hubs_rows_have_our_columns(monkeypatch):
    rows = [{"text": b"so good", "label": 2, "label_text": b"positive"}, {"text": b" ", "label_text": b"neutral"}]
    monkeypatch.setattr(hub.tfds, "data_source", lambda name, split: rows)
    assert tweets.download() == [{"text": "so good", "sentiment": "positive"}]
