"""Tweets and their sentiment: from a file, from a data set of the hub, or generated here from a seed.

Generated tweets are short and have a small vocabulary, so a model learns them in a minute; each sentiment has a third
of them. No text is copied from anywhere.
"""

from random import Random

from rlhf_jax.data import files
from rlhf_jax.errors import InputError, short

SENTIMENTS = ("positive", "neutral", "negative")
NUMBERS = ("negative", "neutral", "positive")  # the meaning of the labels 0, 1 and 2 in data sets with numbers
SENTIMENT_COLUMNS = ("sentiment", "label_text", "label")  # the first one that exists is used
HUB = "mteb/tweet_sentiment_extraction"  # has label and label_text

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


def choices(columns) -> list[tuple[str, str]]:
    """Pairs of columns of a file or a data set that may have text and sentiment; the first that exists is used."""
    return [(columns.text, name) for name in ([columns.sentiment] if columns.sentiment else SENTIMENT_COLUMNS)]


def cells(path: str, columns) -> files.Cells:
    """The cells of a CSV, JSONL or Parquet file."""
    return files.cells(path, *choices(columns))


def row(values: dict) -> dict[str, str]:
    """{"text", "sentiment"} of the two cells. InputError unless the sentiment is in SENTIMENTS, by name or number."""
    (_, text), (column, label) = values.items()
    known = {name: name for name in SENTIMENTS} | {str(number): name for number, name in enumerate(NUMBERS)}
    if str(label) not in known:
        numbers = ", ".join(f"{number} {name}" for number, name in enumerate(NUMBERS))
        raise InputError(f"{column}: expected {', '.join(SENTIMENTS)} ({numbers}); got {short(repr(label))}")
    return {"text": text, "sentiment": known[str(label)]}


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
