"""Rewards of questions that have a right answer, the `label` of a row."""

from rlhf_jax.errors import InputError


def exact(rows, texts: list[str]) -> list[float]:
    """1 for each text that is its row's label, without whitespace around either, else 0: the reward `exact`."""
    return [float(text.strip() == label) for label, text in zip(_labels("exact", rows), texts, strict=True)]


def partial(rows, texts: list[str]) -> list[float]:
    """Share in [0, 1] of places at which a text and its row's label have the same character: the reward `partial`.

    The longer of the two has the places, so a text that goes on too long is worth less.
    """
    pairs = zip(_labels("partial", rows), (text.strip() for text in texts), strict=True)
    return [
        sum(a == b for a, b in zip(label, text, strict=False)) / max(len(label), len(text)) for label, text in pairs
    ]


def _labels(name, rows):
    for row in rows:
        if "label" not in row:
            raise InputError(f"{name}: expected rows with a label, the right answer")
        yield row["label"].strip()
