import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.text import char

TEXT = st.text()


def test_by_hand():
    tokenizer = char.train(["banana", "bad"])  # a 0, b 1, d 2, n 3, UNK 4, EOS 5, PAD 6
    assert tokenizer.encode("band") == [1, 0, 3, 2]
    assert tokenizer.encode("bond") == [1, 4, 3, 2]
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (4, 5, 6, 7)
    assert tokenizer.decode([6, 6, 1, 0, 4, 5, 6]) == "ba\N{REPLACEMENT CHARACTER}"


@given(st.lists(TEXT, min_size=1).filter(any))
def test_texts_it_was_trained_on_round_trip(texts):
    tokenizer = char.train(texts)
    encoded = tokenizer.encode_batch(texts)
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in encoded] == texts


def test_training_does_not_depend_on_the_order_of_texts():
    assert char.train(["ab", "c"]) == char.train(["c", "ba"])


def test_no_text_gives_pad_or_eos():
    tokenizer = char.train(["<|endofx>p"])
    assert {tokenizer.eos_id, tokenizer.pad_id}.isdisjoint(tokenizer.encode("<|endoftext|><|pad|>"))


@pytest.mark.parametrize("text", ["你好", " 你好\n"])
def test_a_text_with_no_known_characters_is_an_error(text):
    with pytest.raises(InputError, match="no known characters.*'你好'"):
        char.train(["a b\n"]).encode(text)


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_a_text_without_visible_characters_is_no_error(text):
    assert len(char.train(["a b"]).encode(text)) == len(text)


def test_ids_that_it_does_not_have_are_unknown():
    """As of a model whose vocabulary is padded."""
    assert char.train(["ab"]).decode([1, 2, 3, 4, 5, 99, 0]) == f"b{3 * char.UNKNOWN}a"


def test_training_needs_a_character():
    with pytest.raises(InputError, match="at least one character"):
        char.train(["", ""])


def test_bytes_of_tokens_are_those_of_the_text():
    tokenizer = char.CharTokenizer("aé ")
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("é a"))) == "é a".encode()
    assert tokenizer.token_bytes(tokenizer.unk_id) == char.UNKNOWN.encode()
    assert tokenizer.token_bytes(tokenizer.eos_id) == tokenizer.token_bytes(tokenizer.pad_id) == b""
