import pytest

from rlhf_jax.evaluate.copying import copied

POST = "My boss sold my bike. I am sad, should I quit?"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("boss SOLD my bike!", 1),  # case and punctuation do not count
        ("my bike was sold", 2 / 4),  # "my bike"
        ("quit sad", 1 / 2),
        ("nothing here", 0),
        ("...", 0),
    ],
)
def test_the_longest_shared_run_over_the_words(text, share):
    assert copied(POST, text) == share


def test_a_common_word_counts_in_long_texts_too():
    assert copied("on the the the", "the " * 300) == 3 / 300
