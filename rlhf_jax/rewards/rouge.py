"""ROUGE-L as a reward: the overlap of each completion with its row's reference, without any model (Lin 2004)."""

from collections.abc import Sequence

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.rouge import scorer

REFERENCE = "label"  # the column that completions are compared with


def of_rows(rows: Sequence[dict], texts: list[str]) -> list[float]:
    """F of ROUGE-L, in [0, 1], of each text with its row's label: the reward `rouge`.

    F = 2 p r / (p + r) of the longest common subsequence, as in evaluate/rouge.py, without stemming. A text that does
    not end with EOS is punished by the algorithm, as for every reward (missing_eos). Raises InputError for a row
    without a label.
    """
    check(rows)
    rouge_l = scorer(("rougeL",))
    pairs = zip(rows, texts, strict=True)
    return [rouge_l.score(row[REFERENCE], text)["rougeL"].fmeasure for row, text in pairs]


def check(rows: Sequence[dict]) -> None:
    """Raises InputError, naming the first row at fault, unless every row has a reference."""
    for i, row in enumerate(rows, start=1):
        if not isinstance(row.get(REFERENCE), str):
            where = getattr(row, "where", f"row {i}")
            raise InputError(f"rouge: {where}: expected a text {REFERENCE!r} to compare completions with, got none")
