"""Tiny stories: from a file, from a data set of the hub, or generated here from a seed.

A generated story has three sentences: who found what, what happened then, and a happy or an unhappy end. No text is
copied from anywhere.
"""

from pathlib import Path
from random import Random

from rlhf_jax.data import files
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


def choices(columns) -> list[tuple[str]]:
    """The column of a file or a data set that has the text."""
    return [(columns.text,)]


def cells(path: str, columns) -> files.Cells:
    """The cells of a JSONL, CSV or Parquet file, or of a text file with <|endoftext|> between the stories.

    The part after the last separator may be empty.
    """
    if Path(path).suffix.lower() in files.READERS:
        yield from files.cells(path, *choices(columns))
        return
    pieces = stored.read_text(Path(path)).split(SEPARATOR)
    if len(pieces) == 1 and pieces[0].strip():
        raise InputError(f"{path}: expected {SEPARATOR} between the stories, got one text without it")
    if not pieces[-1].strip():
        pieces.pop()
    for number, piece in enumerate(pieces, start=1):
        yield f"{path}: story {number}", {columns.text: piece}


def row(values: dict) -> dict[str, str]:
    """{"text"} of the one cell, without the space around it."""
    (text,) = values.values()
    return {"text": text.strip() if isinstance(text, str) else text}


def _make(rng: Random) -> str:
    name, pronoun = rng.choice(NAMES)
    happy = rng.random() < 0.5
    words = {"name": name, "pronoun": pronoun, "thing": rng.choice(THINGS), "place": rng.choice(PLACES)}
    return " ".join(rng.choice(part).format(**words) for part in (BEGINNINGS, MIDDLES[happy], ENDS[happy]))
