"""How much of a summary is copied from its post."""

import difflib

from rlhf_jax.evaluate.diversity import words


def copied(source, text):
    """Words of the longest run that `text` shares with `source`, over the words of `text`: in [0, 1].

    1: the whole text stands in the source. Words are those of `diversity.words`, so case and punctuation do not count.
    0 for a text without words.
    """
    have, written = words(source), words(text)
    match = difflib.SequenceMatcher(None, have, written, autojunk=False).find_longest_match()
    return match.size / len(written) if written else 0.0
