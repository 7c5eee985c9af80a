"""What we write for transformers; the oracle is the `tokenizers` library on the written file."""

import dataclasses
import json

import pytest
import tokenizers
from hypothesis import given, settings

from rlhf_jax.text import bpe, char, files, hf
from tests.text.test_library import TEXT, TEXTS, folder

CHAR = char.train(TEXTS)
KINDS = ("char", "bpe", "neox", "llama2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{kind: (ours, the library's tokenizer of what we exported, its folder)}"""

    def made(kind):
        own = tmp_path_factory.mktemp(kind)
        trained = {"char": CHAR, "bpe": bpe.train(TEXTS, 290)}
        ours = trained.get(kind) or files.from_files(folder(own / "in", kind))
        hf.export(ours, own / "out")
        return ours, tokenizers.Tokenizer.from_file(str(own / "out" / hf.FILE)), own / "out"

    return {kind: made(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=40)
def test_the_library_gives_the_exported_one_our_ids(kind, exported, text):
    text = f"a{text}"  # our tokenizer refuses a text without known characters
    ours, theirs, _ = exported[kind]
    theirs.encode_special_tokens = True
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.get_vocab_size() == ours.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_eos_and_pad_are_two_special_tokens(kind, exported):
    ours, theirs, out = exported[kind]
    config = json.loads((out / "tokenizer_config.json").read_text())
    names = json.loads((out / "special_tokens_map.json").read_text())
    assert {name: config[name] for name in names} == names
    ids = [theirs.token_to_id(names["eos_token"]), theirs.token_to_id(names["pad_token"])]
    assert ids == [ours.eos_id, ours.pad_id]
    theirs.encode_special_tokens = False
    assert theirs.encode(f"a{names['eos_token']}").ids == [*ours.begin, *ours.encode("a"), ids[0]]
    assert theirs.decode(ids) == ""  # without special tokens


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_is_read_back(kind, exported):
    ours, _, out = exported[kind]
    again = files.from_files(out)
    assert (again.eos_ids, again.pad_id, again.vocab_size) == (ours.eos_ids, ours.pad_id, ours.vocab_size)
    assert again.encode(TEXTS[1]) == ours.encode(TEXTS[1])
    assert again == ours


def test_a_template_goes_out_and_in(tmp_path):
    tokenizer = dataclasses.replace(bpe.train(TEXTS, 290), template="{{ messages }}")
    hf.export(tokenizer, tmp_path)
    assert files.from_files(tmp_path).template == "{{ messages }}"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"decoder": None},
        {"normalizer": {"type": "NFC"}},
        {"model": {"type": "WordLevel", "vocab": {"ab": 0, "c": 1, "d": 2, "<unk>": 3}}},
        {"model": {"type": "WordLevel", "vocab": {}}},
        {"model": {"type": "WordLevel"}},
        {"model": None},
    ],
)
def test_words_of_another_kind_are_no_characters(change):
    written = hf.to_hf(char.train(["abc"]))[hf.FILE]
    assert hf.characters(written) == char.train(["abc"]) and hf.characters(written | change) is None


def test_a_known_replacement_character_is_not_taken_for_unknown():
    tokenizer = char.train(["a\N{REPLACEMENT CHARACTER}"])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf.to_hf(tokenizer)[hf.FILE]))
    assert (
        theirs.encode("a\N{REPLACEMENT CHARACTER}b").ids == tokenizer.encode("a\N{REPLACEMENT CHARACTER}b") == [0, 1, 2]
    )
    assert hf.characters(hf.to_hf(tokenizer)[hf.FILE]) == tokenizer
