"""Overlap of generated summaries with reference summaries (Lin 2004)."""

import functools

import numpy as np

from rlhf_jax.errors import InputError

NAMES = ("rouge1", "rouge2", "rougeL")


def rouge(targets, predictions, *, stemmer=False):
    """Yields (name, mean F over the pairs) for ROUGE-1, ROUGE-2 and ROUGE-L, each in [0, 1].

    F = 2 p r / (p + r). p and r are the shares of the prediction's and of the target's unigrams, bigrams or tokens that
    the two have in common (for ROUGE-L, in their longest common subsequence); F is 0 if either is empty. Tokens are
    runs of [a-z0-9] after lowercasing. `stemmer=True` strips English suffixes (Porter) and gives higher numbers:
    report which was used. Raises InputError for no pairs.
    """
    if not targets:
        raise InputError("rouge: expected at least one pair of target and prediction, got none")
    overlap = scorer(NAMES, stemmer=stemmer)
    pairs = [overlap.score(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    for name in NAMES:
        yield name, float(np.mean([pair[name].fmeasure for pair in pairs]))


@functools.cache
def scorer(names, *, stemmer=False):
    """The scorer of rouge-score: score(target, prediction) -> {name: precision, recall, fmeasure}."""
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes a second: not at every start

    return RougeScorer(names, use_stemmer=stemmer)
