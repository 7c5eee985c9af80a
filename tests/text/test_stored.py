"""Saving and loading, for every kind of tokenizer."""

import json

import pytest

from rlhf_jax import text
from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, char

TEXTS = ["one one é 你 \n", 'two "two" two']
TEMPLATED = char.CharTokenizer("one", "{{ messages }}")
TOKENIZERS = [char.train(TEXTS), bpe.train(TEXTS, 270), TEMPLATED]


@pytest.fixture(params=TOKENIZERS, ids=["char", "bpe", "templated"])
def tokenizer(request) -> text.Tokenizer:
    return request.param


def test_a_saved_tokenizer_comes_back_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = text.load(tmp_path / "new" / "folder")
    assert loaded == tokenizer
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_saving_replaces_and_leaves_one_file(tokenizer, tmp_path):
    char.train(["something else"]).save(tmp_path)
    tokenizer.save(tmp_path)
    assert text.load(tmp_path) == tokenizer
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_save_that_fails_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        char.train(["something else"]).save(tmp_path)
    assert text.load(tmp_path) == tokenizer


def test_different_tokenizers_have_different_fingerprints():
    others = [char.train(["one"]), bpe.train(TEXTS, 258)]
    assert len({tokenizer.fingerprint() for tokenizer in TOKENIZERS + others}) == 5


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/tokenizer.json: No such file"):
        text.load(tmp_path)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ('{"kind": "char",\n "characters"', "tokenizer.json:2: expected JSON"),
        ("[]", "tokenizer.json: expected the fields of a tokenizer of kind char, file, bpe"),
        ('{"kind": "words"}', "tokenizer.json: expected the fields of a tokenizer of kind char, file, bpe"),
        ('{"kind": "file", "json": "{}", "more": 1}', "tokenizer.json: expected the fields"),
        (
            '{"kind": "file", "json": "{}", "eos_ids": [1], "pad_id": 2, "named": []}',
            "tokenizer.json: expected a tokeni",
        ),
        ('{"kind": "char"}', "tokenizer.json: expected the fields"),
        ('{"kind": "char", "characters": ""}', "tokenizer.json: characters: expected a string"),
        ('{"kind": "char", "characters": "abca"}', "tokenizer.json: characters: expected each character once"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, saved, message):
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(InputError, match=f"{tmp_path}/{message}"):
        text.load(tmp_path)


def test_the_ids_of_eos_and_pad_must_be_special_tokens(tmp_path):
    bpe.train(TEXTS, 270).save(tmp_path)
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(record | {"eos_ids": [3]}))
    with pytest.raises(InputError, match="tokenizer.json: eos_ids and pad_id: expected ids of special tokens"):
        text.load(tmp_path)


def test_the_file_of_an_older_run_is_the_same_tokenizer(tmp_path):
    """Its tokens, merges and special tokens are fields there, so the run can go on."""
    new = bpe.train(["abab abab cd"], 260)
    model = json.loads(new.json)["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), bpe.EOS]
    record = {"kind": "bpe", "tokens": tokens, "merges": [" ".join(merge) for merge in model["merges"]]}
    record |= {"added": [], "special": [bpe.EOS], "pad": "", "normalizer": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    assert text.load(tmp_path) == new and text.load(tmp_path).fingerprint() == new.fingerprint()
    neox = {"tokens": [bpe.EOS, "<|padding|>", *bpe.BYTES, "  "], "merges": [], "added": ["  "], "normalizer": "NFC"}
    neox |= {"kind": "bpe", "special": [bpe.EOS, "<|padding|>"], "pad": "<|padding|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(neox))
    older = text.load(tmp_path)
    assert (older.eos_id, older.pad_id, older.vocab_size) == (0, 1, 259)
    assert older.encode("a  e\N{COMBINING ACUTE ACCENT}") == [2 + bpe.BYTES.index("a"), 258, *older.encode("é")]
    (tmp_path / "tokenizer.json").write_text('{"kind": "char", "characters": "ab"}')
    assert text.load(tmp_path) == char.CharTokenizer("ab")


def test_the_file_is_json_with_its_kind(tmp_path):
    TOKENIZERS[0].save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == "char"
