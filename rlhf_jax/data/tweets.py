"""Tweets and their sentiment: a CSV file, the set on the hub, or ones made here from a seed.

The made ones are short enough to be learned in a minute: a few hundred words of chat, a third of them of each mood.
No text is copied from anywhere.
"""

import os
from random import Random

from rlhf_jax.data import files, hub
from rlhf_jax.errors import InputError

SENTIMENTS = ("positive", "neutral", "negative")
HUB = "mteb/tweet_sentiment_extraction"

OPENINGS = ("", "", "", "ok ", "so ", "lol ", "wow ", "hey ", "well ", "btw ", "omg ", "haha ")
THINGS = (
    "movie", "song", "party", "class", "game", "weather", "coffee", "pizza", "show", "book", "trip", "concert",
    "work", "test", "phone", "train", "garden", "dinner", "weekend", "beach", "shift", "lesson", "photo", "call",
)  # fmt: skip
PEOPLE = ("mom", "dad", "sister", "boss", "team", "cat", "dog", "friend", "teacher", "roomie", "cousin", "neighbor")
TIMES = ("today", "tonight", "this week", "at noon", "on monday", "right now", "again", "this morning")
VERBS = {
    "positive": ("love", "enjoy", "adore", "like", "cherish", "admire"),
    "neutral": ("need", "saw", "have", "got", "found", "know"),
    "negative": ("hate", "dislike", "regret", "resent", "dread", "despise"),
}
MOODS = {
    "positive": ("happy", "great", "awesome", "lovely", "fun", "sweet", "amazing", "good", "nice", "cool"),
    "neutral": ("new", "early", "next", "long", "usual", "quick", "local", "big", "old", "other"),
    "negative": ("sad", "awful", "terrible", "boring", "bad", "horrible", "sick", "ugly", "annoying", "lame"),
}
TEMPLATES = (
    "i {verb} the {thing}", "i {verb} my {who}", "that {thing} was {mood}", "such a {mood} {thing}",
    "my {who} is so {mood}", "what a {mood} {thing}", "{mood} {thing} with my {who}", "i {verb} this {mood} {thing}",
    "the {thing} is {mood}", "we {verb} that {thing}", "feeling {mood} about the {thing}", "its a {mood} day",
)  # fmt: skip
ENDINGS = ("", "", "", "!", ".", "...", " {time}", " {time}!", " and my {who} too", " but still got {thing}")


def made(count: int, seed: int) -> list[dict]:
    """`count` rows {"text", "sentiment"} from the seed."""
    rng = Random(f"tweets/{seed}")
    return [_make(rng) for _ in range(count)]


def read(path: str | os.PathLike, skipped: list[str] | None = None) -> list[dict]:
    """The rows {"text", "sentiment"} of a CSV file (or JSONL, Parquet).

    A row without text, or with a sentiment that is not one of SENTIMENTS, raises InputError; or it is left out and
    what is wrong with it is added to `skipped`, where that is a list.
    """
    kept = []
    for row in files.read(path, ("text", "sentiment"), skipped):
        if row["sentiment"] in SENTIMENTS:
            kept.append(row)
            continue
        wrong = f"{row.where}: sentiment: expected {', '.join(SENTIMENTS)}; got {row['sentiment']!r}"
        if skipped is None:
            raise InputError(wrong)
        skipped.append(wrong)
    return kept


def download() -> list[dict]:
    """The rows of the hub's set."""
    rows = hub.read(HUB, "train", ("text", "label_text"))
    return [{"text": row["text"], "sentiment": row["label_text"]} for row in rows if row["text"].strip()]


def _make(rng: Random) -> dict:
    sentiment = rng.choice(SENTIMENTS)

    def fill(template):
        return template.format(
            verb=rng.choice(VERBS[sentiment]),
            mood=rng.choice(MOODS[sentiment]),
            thing=rng.choice(THINGS),
            who=rng.choice(PEOPLE),
            time=rng.choice(TIMES),
        )

    text = rng.choice(OPENINGS) + fill(rng.choice(TEMPLATES)) + fill(rng.choice(ENDINGS))
    return {"text": text, "sentiment": sentiment}
