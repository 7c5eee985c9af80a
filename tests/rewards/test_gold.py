from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import function, gold

RECORD = {"who": "sister", "verb": "broke", "object": "laptop", "feeling": "angry", "ask": "leave"}
SLOT_WORDS = [word for words in gold.VOCABULARY.values() for word in words]

records = st.fixed_dictionaries({field: st.sampled_from(words) for field, words in gold.VOCABULARY.items()})
summaries = st.lists(st.sampled_from([*SLOT_WORDS, "my", "and", "i", ",", "?"]), max_size=30).map(" ".join)


@pytest.mark.parametrize(
    "summary, expected",
    [
        ("my sister broke my laptop and i feel angry , should i leave ?", 1.0),
        ("sister broke laptop angry leave", 1.0),  # words are read, not grammar
        ("Sister broke laptop. Angry! Leave?", 1.0),
        ("my sister broke my laptop", 1 / 4 + 1 / 8 + 1 / 8),
        ("somebody broke something", 1 / 8),
        ("i need some advice about my life .", 0.0),
        ("", 0.0),
        ("my boss broke my laptop and i feel angry , should i leave ?", 3 / 4 - 1 / 4),  # one of another person
        ("my sister sold my bike and i feel angry , should i leave ?", 3 / 4 - 2 / 4),  # verb and object are two words
        ("my sister , not my boss , broke my laptop and i feel angry , should i leave ?", 1 - 1 / 4 - 3 * 0.05),
        ("boss sold bike sad quit", -1.0),  # -5/4, but no score is below -1
    ],
)
def test_score_by_hand(summary, expected):
    assert gold.score(RECORD, summary) == pytest.approx(expected)


def test_parts_by_hand():
    # sister broke laptop: 1/4 + 1/8 + 1/8; boss is invented, twice the same; 14 words are 2 more than 12
    summary = "well , well , my sister and her boss , yes her boss , broke my old laptop ."
    assert gold.parts(RECORD, summary) == {"coverage": 0.5, "invented": 1, "excess": 2}


def test_only_whole_words_count():
    assert gold.score(RECORD, "sisters brokeback laptops leaves") == 0
    assert gold.parts(RECORD, "careful bagging bookends")["invented"] == 0  # car, bag, book


def test_punctuation_is_no_word():
    twelve = "my sister broke my laptop and i feel angry should i leave"
    assert gold.score(RECORD, twelve) == gold.score(RECORD, " , ".join(twelve.split()) + " ? ! ...") == 1
    assert gold.score(RECORD, twelve + " now") == pytest.approx(0.95)


def test_a_word_belongs_to_one_slot_and_the_weights_to_one_whole():
    for words, others in combinations(gold.VOCABULARY.values(), 2):
        assert not set(words) & set(others)
    assert len(SLOT_WORDS) == len(set(SLOT_WORDS))
    assert gold.WEIGHT.keys() == gold.VOCABULARY.keys()
    assert sum(gold.WEIGHT.values()) == 1


@given(records, summaries)
def test_a_score_is_between_minus_one_and_one(record, summary):
    assert -1 <= gold.score(record, summary) <= 1


@given(records, summaries, st.data())
def test_saying_it_again_never_helps(record, summary, data):
    words = summary.split() or ["my"]
    again = f"{summary} {data.draw(st.sampled_from(words))}"
    assert gold.score(record, again) <= gold.score(record, summary)


@given(records, summaries)
def test_order_does_not_matter(record, summary):
    assert gold.parts(record, " ".join(sorted(summary.split()))) == gold.parts(record, summary)


@pytest.mark.parametrize(
    "record, message",
    [
        (RECORD | {"who": "dog"}, "record.who: expected one of sister, .*; got 'dog'"),
        (RECORD | {"ask": None}, "record.ask: expected one of leave, .*; got None"),
        ({"who": "sister"}, r"record: expected the fields who, verb, object, feeling, ask; got \['who'\]"),
        (RECORD | {"when": "today"}, "record: expected the fields who, .*; got .*'when'"),
        ("sister", "record: expected the fields who, .*; got str"),
    ],
)
def test_what_is_no_record_is_named(record, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        gold.score(record, "my sister")
    assert "\n" not in str(error.value)


def test_the_reward_gold_is_the_score_of_each_rows_record():
    rows = [{"record": RECORD, "prompt": "..."}, {"record": RECORD | {"who": "boss"}, "prompt": "..."}]
    texts = ["my sister broke my laptop"] * 2
    assert gold.of_rows(rows, texts) == [0.5, 0.25 - 0.25]
    reward = function.load("gold")
    assert reward.takes_rows and reward.scores(rows, texts)["reward"].tolist() == [0.5, 0]


def test_gold_needs_records():
    with pytest.raises(InputError, match="^gold: expected rows with a record, as those of the embedded world have$"):
        gold.of_rows([{"prompt": "..."}], ["my sister"])
    with pytest.raises(InputError, match="^reward gold: InputError: gold: expected rows with a record"):
        function.load("gold").scores([{"prompt": "..."}], ["my sister"])
