"""Diversity of samples: distinct word n-grams, and words that repeat."""

import re
from collections import Counter


def words(text):
    """The words of a text in lower case: runs of letters, digits and _, with apostrophes inside."""
    return re.findall(r"\w+(?:['`]\w+)*", text.lower())


def distinct(texts, n=2):
    """Distinct word n-grams over all word n-grams of the texts, in [0, 1] (Li et al. 2016); 0 where there are none.

    It falls with the number of texts: compare only equal numbers of texts.
    """
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeat_rate(texts, times=4):
    """Share of the texts, in [0, 1], in which some word occurs `times` times or more."""
    repeated = [max(Counter(words(text)).values(), default=0) >= times for text in texts]
    return sum(repeated) / len(texts)


def _ngrams(items, n):
    return zip(*(items[i:] for i in range(n)), strict=False)
