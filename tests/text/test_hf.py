"""The oracle is the `tokenizers` library itself, on the same file."""

import copy
import functools
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, char, hf

TEXTS = ["abab abab cd cd café café", "it's  it's    a 12 12 naïve naïve\n\n"] * 2
SPACES = [" " * count for count in range(5, 1, -1)]


@functools.cache
def library(kind):
    """A tokenizer made with the library alone: of GPT-2's or of GPT-NeoX's kind."""
    codec = tokenizers.Tokenizer(models.BPE())
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.post_processor = processors.ByteLevel(trim_offsets=True)
    codec.decoder = decoders.ByteLevel()
    first = ["<|endoftext|>", "<|padding|>"] if kind == "neox" else []
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=first, initial_alphabet=bpe.BYTES, min_frequency=2, show_progress=False
    )
    if kind == "neox":
        codec.normalizer = normalizers.NFC()
    codec.train_from_iterator(TEXTS, trainer)
    if kind == "neox":
        codec.add_tokens([AddedToken(spaces, normalized=True) for spaces in SPACES])
    else:
        codec.add_special_tokens(["<|endoftext|>"])
    codec.encode_special_tokens = True  # as ours: their names are text
    return codec


@functools.cache
def record(kind):
    return json.loads(library(kind).to_str())


def changed(kind, field, value):
    """The record with a dotted field set to the value."""
    whole = copy.deepcopy(record(kind))
    *sections, name = field.split(".")
    functools.reduce(dict.__getitem__, sections, whole)[name] = value
    return whole


def error(whole):
    with pytest.raises(InputError) as caught:
        hf.from_hf(whole)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LETTERS = "abcdefi' \n\t12é\N{COMBINING ACUTE ACCENT}\N{COMBINING DIAERESIS}<|endoftext|>"
TEXT = st.text(st.sampled_from(LETTERS) | st.characters(codec="utf-8")) | st.text(LETTERS, min_size=20)
KINDS = pytest.mark.parametrize("kind", ["gpt2", "neox"])


# In


@KINDS
@given(text=TEXT)
def test_ids_are_the_librarys(kind, text):
    tokenizer = hf.from_hf(record(kind))
    ids = library(kind).encode(text).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == library(kind).decode(ids)


def test_eos_and_pad():
    gpt2, neox = hf.from_hf(record("gpt2")), hf.from_hf(record("neox"))
    last = library("gpt2").token_to_id("<|endoftext|>")
    assert (gpt2.eos_id, gpt2.pad_id, gpt2.vocab_size) == (last, last + 1, last + 2)
    assert (neox.eos_id, neox.pad_id, neox.vocab_size) == (0, 1, library("neox").get_vocab_size())


def with_special(kind, name, special=True):
    codec = tokenizers.Tokenizer.from_str(library(kind).to_str())
    codec.add_tokens([AddedToken(name, special=special)])
    return json.loads(codec.to_str())


@pytest.mark.parametrize("name", hf.PADS)
def test_a_pad_token_of_the_file_is_used(name):
    tokenizer = hf.from_hf(with_special("gpt2", name))
    assert tokenizer.pad_id == tokenizer.eos_id + 1 == tokenizer.vocab_size - 1


def test_a_name_of_pad_that_is_no_special_token_is_not_pad():
    tokenizer = hf.from_hf(with_special("gpt2", "[PAD]", special=False))
    assert tokenizer.encode("[PAD]") == [tokenizer.eos_id + 1] and tokenizer.pad_id == tokenizer.eos_id + 2


def test_a_special_token_for_another_use_is_no_text_either():
    tokenizer = hf.from_hf(with_special("gpt2", "<|user|>"))
    assert tokenizer.decode(tokenizer.encode("<|user|>")) == "<|user|>"
    assert tokenizer.eos_id + 1 not in tokenizer.encode("<|user|>")


ALONE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("post_processor", None),
        ("post_processor", ALONE),  # as transformers 5 writes it
        ("truncation", {"max_length": 3}),
        ("model.merges", [" ".join(merge) for merge in record("gpt2")["model"]["merges"]]),  # as it once wrote them
        ("model.continuing_subword_prefix", ""),
    ],
)
def test_other_spellings_of_the_same(field, value):
    assert hf.from_hf(changed("gpt2", field, value)) == hf.from_hf(record("gpt2"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "normalizer",
            {"type": "Lowercase"},
            'normalizer.type: expected none or "NFC", as in byte-level BPE, got "Low',
        ),
        (
            "pre_tokenizer",
            {"type": "Whitespace"},
            'pre_tokenizer.type: expected "ByteLevel", as in byte-level BPE, got',
        ),
        ("pre_tokenizer", None, 'pre_tokenizer.type: expected "ByteLevel", as in byte-level BPE, got null'),
        ("pre_tokenizer.add_prefix_space", True, "pre_tokenizer.add_prefix_space: expected false, "),
        ("pre_tokenizer.use_regex", False, "pre_tokenizer.use_regex: expected none or true, "),
        ("post_processor", {"type": "RobertaProcessing"}, "post_processor.type: expected none or "),
        (
            "post_processor",
            ALONE | {"single": [{"SpecialToken": {"id": "<s>"}}, *ALONE["single"]]},
            "post_processor.single: expected the text alone, got ",
        ),
        ("decoder", {"type": "WordPiece"}, 'decoder.type: expected "ByteLevel", '),
        ("model.type", "WordPiece", 'model.type: expected none or "BPE", '),
        ("model.dropout", 0.1, "model.dropout: expected none or 0, "),
        ("model.end_of_word_suffix", "</w>", 'model.end_of_word_suffix: expected none or "", '),
        ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix: "),
        ("model.byte_fallback", True, "model.byte_fallback: expected none or false, "),
        ("model.ignore_merges", True, "model.ignore_merges: expected none or false, "),
        ("model.vocab", ["a"], "model.vocab: expected an object of token -> id"),
        ("model.vocab", {"a": "0"}, "model.vocab and added_tokens: expected each of the ids 0 to 1 once"),
        ("model.merges", None, "model.merges: expected a list"),
        ("model.merges", [3], "model.merges: expected a list of pairs of tokens"),
        ("post_processor", ALONE | {"single": 3}, "post_processor.single: expected the text alone, got 3"),
        ("decoder.type", "x" * 5_000, 'decoder.type: expected "ByteLevel", as in byte-level BPE, got "xxx'),
        ("model.merges", ["a b"], "tokens: expected the "),
        ("added_tokens", [{"id": 1}], "added_tokens: expected a list of objects with content and id"),
        ("added_tokens", [{"content": "new", "id": 7}], "model.vocab and added_tokens: expected each of the ids 0 to "),
        ("added_tokens", [], "special: expected <|endoftext|> and others that no merge makes, got ()"),
    ],
)
def test_the_field_of_another_kind_is_named(field, value, message):
    found = error(changed("gpt2", field, value))
    assert found.startswith(message) and len(found) < 250


@pytest.mark.parametrize("field", ["single_word", "lstrip", "rstrip"])
def test_an_added_token_that_looks_at_its_neighbours_is_refused(field):
    added = [*record("neox")["added_tokens"][:-1], record("neox")["added_tokens"][-1] | {field: True}]
    message = f"added_tokens: '  ': {field}: expected none or false, as in byte-level BPE, got true"
    assert error(changed("neox", "added_tokens", added)) == message


def test_an_added_token_is_found_after_normalization():
    added = [*record("neox")["added_tokens"][:-1], record("neox")["added_tokens"][-1] | {"normalized": False}]
    assert error(changed("neox", "added_tokens", added)).startswith("added_tokens: '  ': normalized: expected true")


@pytest.mark.parametrize("whole", [{}, [], {"kind": "char", "characters": "ab"}])
def test_json_of_something_else_is_refused(whole):
    assert error(whole).startswith("pre_tokenizer.type: expected ")


def test_the_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=f"^{tmp_path}/tokenizer.json: pre_tokenizer.type: "):
        hf.read(tmp_path / "tokenizer.json")


# Out


UNKNOWN = char.train(["a\N{REPLACEMENT CHARACTER}"])  # a known replacement character is not UNK


@pytest.mark.parametrize(
    "tokenizer",
    [bpe.train(TEXTS, 290), *(hf.from_hf(record(kind)) for kind in ("gpt2", "neox")), char.train(TEXTS), UNKNOWN],
)
def test_what_was_exported_is_read_back_equal(tokenizer, tmp_path):
    hf.export(tokenizer, tmp_path)
    assert hf.read(tmp_path / "tokenizer.json") == tokenizer


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer: expected that of a tokenizer of characters, as we "),
        ("decoder", None, "decoder: expected that of a tokenizer of characters, as we write it, or byte-level BPE"),
        ("normalizer", {"type": "NFC"}, "normalizer: expected that of "),
        ("model", {"type": "WordLevel", "vocab": {"ab": 0, "c": 1, "d": 2, "<unk>": 3}}, "model: expected that of "),
        ("model", {"type": "WordLevel", "vocab": {}}, "model.vocab and added_tokens: expected each of the ids 0 to 1"),
        ("model", {"type": "WordLevel"}, "model.vocab: expected an object of token -> id"),
    ],
)
def test_words_of_another_kind_are_no_characters(field, value, message):
    assert error(hf.to_hf(char.train(["abc"]))["tokenizer.json"] | {field: value}).startswith(message)


CHAR = char.train(TEXTS)
EXPORTED = [CHAR, bpe.train(TEXTS, 290), hf.from_hf(record("neox"))]


@functools.cache
def exported(i):
    return tokenizers.Tokenizer.from_str(json.dumps(hf.to_hf(EXPORTED[i])["tokenizer.json"]))


@pytest.mark.parametrize("i", range(3), ids=["char", "bpe", "neox"])
@given(text=TEXT)
def test_the_library_gives_the_exported_one_our_ids(i, text):
    text = f"a{text}"  # our tokenizer refuses a text without known characters
    theirs, ours = exported(i), EXPORTED[i]
    theirs.encode_special_tokens = True
    ids = theirs.encode(text).ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.get_vocab_size() == ours.vocab_size


@pytest.mark.parametrize("i", range(3), ids=["char", "bpe", "neox"])
def test_eos_and_pad_are_two_special_tokens(i, tmp_path):
    hf.export(EXPORTED[i], tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert {name: config[name] for name in names} == names and config["add_prefix_space"] is False
    theirs = exported(i)
    ids = [theirs.token_to_id(names["eos_token"]), theirs.token_to_id(names["pad_token"])]
    assert ids == [EXPORTED[i].eos_id, EXPORTED[i].pad_id]
    theirs.encode_special_tokens = False
    assert theirs.encode("a<|endoftext|>").ids == [*EXPORTED[i].encode("a"), ids[0]]
    assert theirs.decode(ids) == ""  # without special tokens


def test_a_known_replacement_character_is_not_taken_for_unknown():
    tokenizer = char.train(["a\N{REPLACEMENT CHARACTER}"])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf.to_hf(tokenizer)["tokenizer.json"]))
    assert (
        theirs.encode("a\N{REPLACEMENT CHARACTER}b").ids == tokenizer.encode("a\N{REPLACEMENT CHARACTER}b") == [0, 1, 2]
    )


def test_pad_has_a_name_that_no_token_has():
    tokenizer = bpe.BPETokenizer((*bpe.BYTES, bpe.EOS, "<|pad|>"), (), added=("<|pad|>",))
    assert hf.to_hf(tokenizer)["special_tokens_map.json"]["pad_token"] == "<|padding|>"
