import pytest

from rlhf_jax.evaluate import diversity


def test_words_are_lower_case_and_keep_their_apostrophes():
    assert diversity.words("I lOve YOU, don't i`m !") == ["i", "love", "you", "don't", "i`m"]


def test_distinct_bigrams_by_hand():
    # a b, b a, a b | a b: two different ones of four. No pair spans two texts.
    assert diversity.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert diversity.distinct(["a b a b", "a b"], 1) == 2 / 6


@pytest.mark.parametrize("texts", [[], [""], ["one"]])
def test_distinct_is_zero_without_bigrams(texts):
    assert diversity.distinct(texts, 2) == 0


def test_repeat_rate_by_hand():
    texts = ["love you love you love you love", "love love love", "a A a a", ""]
    assert diversity.repeat_rate(texts) == 2 / 4
    assert diversity.repeat_rate(texts, times=3) == 3 / 4


def test_repetition_lowers_distinct_and_raises_the_repeat_rate():
    different, same = [f"word{i} thing{i} is{i} new{i}" for i in range(9)], ["good good good good"] * 9
    assert diversity.distinct(same) < 0.1 < 0.9 < diversity.distinct(different)
    assert diversity.repeat_rate(same) == 1 and diversity.repeat_rate(different) == 0
