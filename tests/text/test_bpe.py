import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe

TEXTS = ["abab abab cd cd", "<|endoftext|>" * 9]
TOKENIZER = bpe.train(TEXTS, 290)


def test_by_hand():
    # "ab" occurs 4 times, then "cd", " cd" and "abab" twice each; ids: 256 bytes, the merges, EOS, PAD
    tokenizer = bpe.train(TEXTS[:1], 262)
    names = [tokenizer.codec.id_to_token(i) for i in range(256, 262)]
    assert names == ["ab", "cd", "Ġcd", "abab", "<|endoftext|>", "<|pad|>"]
    assert tokenizer.encode("abab cdab") == [259, 258, 256]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (260, 261, 262)
    assert tokenizer.decode([261, 259, 258, 260, 261]) == "abab cd"


def test_merges_are_learned_only_from_pairs_that_occur_twice():
    assert bpe.train(["abc"], 300).vocab_size == 258


@given(st.text())
def test_every_text_round_trips_and_has_neither_pad_nor_eos(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert {TOKENIZER.eos_id, TOKENIZER.pad_id}.isdisjoint(ids)


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|pad|>", "a<|endoftext|>b"])
def test_names_of_special_tokens_are_ordinary_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.text()))
def test_a_batch_has_the_ids_of_its_texts(texts):
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_half_a_character_becomes_the_replacement_character():
    first_byte_of_e_acute, *_ = TOKENIZER.encode("é")
    assert TOKENIZER.decode([first_byte_of_e_acute, *TOKENIZER.encode("ab")]) == "\N{REPLACEMENT CHARACTER}ab"


def test_training_is_deterministic():
    assert bpe.train(TEXTS, 290) == TOKENIZER


@pytest.mark.parametrize("vocab_size", [0, 257])
def test_the_vocabulary_has_room_for_all_bytes(vocab_size):
    with pytest.raises(InputError, match=f"vocab_size: expected at least 258 .* got {vocab_size}"):
        bpe.train(TEXTS, vocab_size)


def test_bytes_of_tokens_are_those_of_the_text():
    tokenizer = TOKENIZER
    text = "abab\n  \u20ac\x00\xa0\N{FACE WITH TEARS OF JOY}"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert sorted(map(tokenizer.token_bytes, range(256))) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(tokenizer.eos_id) == tokenizer.token_bytes(tokenizer.pad_id) == b""
