"""VADER's score, and the words that it is made of."""

import pytest
from vaderSentiment.vaderSentiment import normalize

from rlhf_jax.rewards import sentiment

TEXTS = [
    "a good day",
    "not a good day, but I really LOVE it :)",
    "Kind of sad. no hope",
    "\N{SMILING FACE WITH OPEN MOUTH} good\N{SMILING FACE WITH OPEN MOUTH}\N{SMILING FACE WITH OPEN MOUTH}",
    "nothing",
    "",
]


def test_words_by_hand():
    text = "sad, very GOOD."
    sad, good = sentiment.words(text)
    assert (text[sad.start : sad.end], text[good.start : good.end]) == ("sad,", "GOOD.")
    assert (sad.own, good.own) == (-2.1, 1.9)  # VADER's lexicon
    assert sad.counted == pytest.approx(-2.1) and good.counted == pytest.approx(1.9 + 0.733 + 0.293)  # capitals, very


@pytest.mark.parametrize("text", TEXTS)
def test_the_score_is_made_of_the_words(text):
    """Without ! and ?, the score is VADER's normalization of the sum."""
    total = sum(word.counted for word in sentiment.words(text))
    assert sentiment.compound([text]) == [pytest.approx(normalize(total) if text else 0, abs=1e-4)]


def test_words_are_where_they_stand_in_a_text_with_emoji():
    text = TEXTS[3]
    found = [text[word.start : word.end] for word in sentiment.words(text)]
    smile = "\N{SMILING FACE WITH OPEN MOUTH}"
    assert set(found) == {smile, "good"} and found.count("good") == 1
