import dataclasses
import re
import unicodedata

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
    assert tokenizer.tokens[256:] == ("ab", "cd", "Ġcd", "abab", "<|endoftext|>")
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


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        ((*bpe.BYTES,), (), "expected the 257 .* got 256 with 1 of them missing"),  # no EOS
        ((*bpe.BYTES, bpe.EOS), ("a b",), "expected the 258 .* got 257 with 1 of them missing"),
        ((*bpe.BYTES, bpe.EOS, "ab"), (), "expected the 257 .* got 258 with 0 of them missing"),
        ((*bpe.BYTES, bpe.EOS, bpe.EOS), (), "each once"),
        ((*bpe.BYTES, bpe.EOS, "abc"), ("ab c",), "expected two earlier tokens at rank 0, got 'ab c'"),
        ((*bpe.BYTES, bpe.EOS, "a"), ("a",), "expected two earlier tokens at rank 0, got 'a'"),
        ((*bpe.BYTES, bpe.EOS), (f"< {bpe.EOS}",), "expected two earlier tokens at rank 0"),
    ],
)
def test_tokens_and_merges_must_fit_together(tokens, merges, message):
    with pytest.raises(InputError, match=message):
        bpe.BPETokenizer(tokens, merges)


# GPT-NeoX's kind: EOS and PAD first, NFC, runs of spaces added. Ids: 0 EOS, 1 PAD, 256 bytes, "é" as its two bytes.
NEOX = bpe.BPETokenizer(
    tokens=(bpe.EOS, "<|padding|>", *bpe.BYTES, "Ã©", "  ", "    "),
    merges=("Ã ©",),
    added=("  ", "    "),
    special=(bpe.EOS, "<|padding|>"),
    pad="<|padding|>",
    normalizer="NFC",
)


def test_added_tokens_and_normalization_by_hand():
    a, space = 2 + bpe.BYTES.index("a"), 2 + bpe.BYTES.index("Ġ")
    assert NEOX.encode("a      a") == [a, 260, 259, a]  # four spaces, then two: the longest first
    assert NEOX.encode("a a") == [a, space, a]
    assert NEOX.encode("e\N{COMBINING ACUTE ACCENT}") == NEOX.encode("é") == [258]
    assert NEOX.decode([1, a, 260, 258, 0]) == "a    é"
    assert (NEOX.eos_id, NEOX.pad_id, NEOX.vocab_size) == (0, 1, 261)


@given(st.text(st.sampled_from("ab \n<|>é") | st.characters(codec="utf-8")) | st.sampled_from(NEOX.special))
def test_no_text_has_special_tokens_of_another_kind_either(text):
    ids = NEOX.encode(text)
    assert {0, 1}.isdisjoint(ids)
    assert NEOX.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad": bpe.EOS}, "pad: expected a token other than <|endoftext|>"),
        ({"pad": "[PAD]"}, "special: expected <|endoftext|> and [PAD] that no merge makes, got ("),
        ({"special": ("<|padding|>",)}, "special: expected <|endoftext|> and <|padding|> that no merge makes, got ("),
        ({"special": (*NEOX.special, "Ã©")}, "special: expected <|endoftext|> and <|padding|> that no merge makes"),
        ({"normalizer": "NFKC"}, "normalizer: expected none or NFC, got 'NFKC'"),
        ({"added": ("  ", "x y")}, "tokens: expected the 261"),
    ],
)
def test_special_tokens_and_normalizer_must_be_known(change, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        dataclasses.replace(NEOX, **change)


def test_bytes_of_tokens_are_those_of_the_text():
    tokenizer = bpe.BPETokenizer((*bpe.BYTES, "  ", bpe.EOS), (), added=("  ",))
    text = "a\n  \u20ac\x00\xa0\N{FACE WITH TEARS OF JOY}"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert sorted(map(tokenizer.token_bytes, range(256))) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.token_bytes(tokenizer.eos_id) == tokenizer.token_bytes(tokenizer.pad_id) == b""
