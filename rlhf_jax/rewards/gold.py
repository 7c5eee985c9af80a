"""The embedded task's true reward: the gold score of a summary of a generated post.

A post is written from a hidden record of four slots: `who`, `what` (a verb and an object), `feeling` and `ask`. The
words of each slot are listed here, because summaries are scored by them; `data/world.py` writes the posts. A summary
gains by naming the record's words, and loses by naming other words of the lists and by excess length:

    score = coverage - 0.25 * invented - 0.05 * excess          in [-1, 1]

Only words count, not grammar: a list of the five words scores as high as a sentence.
"""

import re
from collections.abc import Mapping

from rlhf_jax.errors import InputError

VOCABULARY = {
    "who": (
        "sister", "brother", "mother", "father", "uncle", "aunt", "cousin", "boss", "roommate", "neighbor",
        "teacher", "friend", "landlord", "wife", "husband", "son", "daughter", "coach", "partner", "client",
    ),
    "verb": ("broke", "sold", "lost", "borrowed", "stole", "hid", "ruined", "dropped", "scratched", "burned"),
    "object": (
        "laptop", "bike", "car", "phone", "guitar", "camera", "jacket", "watch", "wallet", "book", "lamp", "mirror",
        "tent", "piano", "ring", "bag", "clock", "couch", "drone", "kettle", "helmet", "painting", "radio", "tablet",
    ),
    "feeling": (
        "angry", "sad", "guilty", "proud", "lonely", "jealous", "scared", "happy",
        "tired", "hurt", "ashamed", "confused", "calm", "nervous", "bored", "bitter",
    ),
    "ask": (
        "leave", "apologize", "forgive", "wait", "complain", "argue", "move",
        "quit", "confess", "pay", "call", "sue", "write", "listen",
    ),
}  # fmt: skip

# A slot is a quarter of the coverage; `what` is half verb, half object.
WEIGHT = {"who": 1 / 4, "verb": 1 / 8, "object": 1 / 8, "feeling": 1 / 4, "ask": 1 / 4}
INVENTED_COST = 0.25
EXCESS_COST = 0.05
BRIEF_WORDS = 12  # the longest careful summary: "my sister broke my laptop and i feel angry , should i leave ?"
LOWEST_SCORE = -1.0

_SLOT_WORDS = frozenset(word for words in VOCABULARY.values() for word in words)


def score(record: Mapping[str, str], summary: str) -> float:
    """The true reward of `summary` for the post written from `record`, in [-1, 1].

    1 needs every slot, nothing invented and at most `BRIEF_WORDS` words; a summary without slot words scores 0 or less.
    Raises InputError if `record` is not five fields with a word of `VOCABULARY` each.
    """
    part = parts(record, summary)
    cost = INVENTED_COST * part["invented"] + EXCESS_COST * part["excess"]
    return max(part["coverage"] - cost, LOWEST_SCORE)


def of_rows(rows, texts: list[str]) -> list[float]:
    """`score` of each text for its row's record: the reward `gold`."""
    for row in rows:
        if "record" not in row:
            raise InputError("gold: expected rows with a record, as those of the embedded world have")
    return [score(row["record"], text) for row, text in zip(rows, texts, strict=True)]


def parts(record: Mapping[str, str], summary: str) -> dict[str, float]:
    """The components of the score. Words count whole and in either case; a repeated word adds only to the length.

    coverage: total weight of the record's words that the summary names, in [0, 1]. invented: number of distinct slot
    words that are not in the record. excess: number of words beyond `BRIEF_WORDS`, without punctuation. Raises
    InputError as `check` does.
    """
    check(record)
    words = re.findall(r"\w+", summary.lower())
    named = _SLOT_WORDS.intersection(words)
    return {
        "coverage": sum(WEIGHT[field] for field, word in record.items() if word in named),
        "invented": len(named.difference(record.values())),
        "excess": max(len(words) - BRIEF_WORDS, 0),
    }


def check(record: Mapping[str, str]) -> None:
    """Raises InputError, naming the field, unless `record` has a word of `VOCABULARY` for every field and no others."""
    if not isinstance(record, Mapping) or set(record) != set(VOCABULARY):
        got = sorted(map(str, record)) if isinstance(record, Mapping) else type(record).__name__
        raise InputError(f"record: expected the fields {', '.join(VOCABULARY)}; got {got}")
    for field, word in record.items():
        if word not in VOCABULARY[field]:
            raise InputError(f"record.{field}: expected one of {', '.join(VOCABULARY[field])}; got {word!r}")
