"""Tiny stories: a text file with <|endoftext|> between them, the set on the hub, or ones made here from a seed.

The made ones are four sentences: who found what, what happened to it, how that felt, and an end, happy or not. No
text is copied from anywhere.
"""

import os
from pathlib import Path
from random import Random

from rlhf_jax.data import hub
from rlhf_jax.errors import InputError
from rlhf_jax.text import stored

SEPARATOR = "<|endoftext|>"
HUB = "roneneldan/TinyStories"

NAMES = (("Mia", "She"), ("Ben", "He"), ("Zoe", "She"), ("Tom", "He"), ("Ana", "She"), ("Leo", "He"))
THINGS = ("kite", "boat", "cake", "hat", "drum", "shell", "lamp", "ball", "toy", "pie", "map", "seed")
PLACES = ("park", "barn", "yard", "shop", "woods", "beach", "house", "school")
BEGINNINGS = (
    "One day , {name} found a {thing} in the {place} .", "{name} had a {thing} and took it to the {place} .",
    "In the {place} , {name} saw an old {thing} .", "{name} went to the {place} with a {thing} .",
)  # fmt: skip
MIDDLES = {
    True: ("A friend came to play with the {thing} .", "The {thing} was beautiful and {pronoun} smiled .",
           "{pronoun} gave the {thing} to a kind girl .", "It was the best {thing} of all ."),
    False: ("The {thing} broke and {pronoun} cried .", "A mean dog took the {thing} away .",
            "{pronoun} lost the {thing} in the rain .", "The {thing} was dirty and ugly ."),
}  # fmt: skip
ENDS = {
    True: ("{name} was happy and proud .", "{pronoun} laughed and felt great joy .", "What a wonderful day !"),
    False: ("{name} was sad and alone .", "{pronoun} felt bad and went home angry .", "What a terrible day !"),
}


def made(count: int, seed: int) -> list[dict]:
    """`count` rows {"text"} from the seed."""
    rng = Random(f"stories/{seed}")
    return [{"text": _make(rng)} for _ in range(count)]


def read(path: str | os.PathLike, skipped: list[str] | None = None) -> list[dict]:
    """The stories {"text"} of a text file, without the space around them.

    A story with nothing in it raises InputError, or is counted in `skipped` where that is a list. What follows the
    last separator may be empty.
    """
    pieces = stored.read_text(Path(path)).split(SEPARATOR)
    if not pieces[-1].strip():
        pieces.pop()
    rows = []
    for number, piece in enumerate(pieces, start=1):
        if piece.strip():
            rows.append({"text": piece.strip()})
        elif skipped is None:
            raise InputError(f"{path}: story {number}: expected text, got none")
        else:
            skipped.append(f"{path}: story {number}: no text")
    if not rows:
        raise InputError(f"{path}: expected at least one story, got none")
    return rows


def download() -> list[dict]:
    """The rows of the hub's set."""
    return [row for row in hub.read(HUB, "train", ("text",)) if row["text"].strip()]


def _make(rng: Random) -> str:
    name, pronoun = rng.choice(NAMES)
    happy = rng.random() < 0.5
    words = {"name": name, "pronoun": pronoun, "thing": rng.choice(THINGS), "place": rng.choice(PLACES)}
    return " ".join(rng.choice(part).format(**words) for part in (BEGINNINGS, MIDDLES[happy], ENDS[happy]))
