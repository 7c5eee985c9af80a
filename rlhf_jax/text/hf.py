"""Hugging Face tokenizers <-> ours: reads their byte-level BPE, writes files for transformers.AutoTokenizer.

A text has the same ids on both sides, with one exception: theirs encodes the name of a special token as that token.
"""

import json
import os
from pathlib import Path

import tokenizers

from rlhf_jax.errors import InputError, short
from rlhf_jax.text import bpe, char, stored

FILE = "tokenizer.json"
PADS = ("<|pad|>", "<|padding|>", "[PAD]", "<pad>")  # known names of PAD; ours is the first

# The fields of a tokenizer.json and their values in byte-level BPE; None: null or absent.
EXPECTED = {
    "normalizer.type": (None, "NFC"),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (None, True),
    "post_processor.type": (None, "ByteLevel", "TemplateProcessing"),
    "decoder.type": ("ByteLevel",),
    "model.type": (None, "BPE"),
    "model.dropout": (None, 0),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.byte_fallback": (None, False),
    "model.ignore_merges": (None, False),
}
# The same for an added token, which is matched whole in a text.
EXPECTED_OF_ADDED = {"single_word": (None, False), "lstrip": (None, False), "rstrip": (None, False)}


def read(path: str | os.PathLike) -> bpe.BPETokenizer | char.CharTokenizer:
    """The byte-level BPE in a tokenizer.json, such as GPT-2's or GPT-NeoX's, or the characters that `to_hf` wrote.

    InputError names the field at fault.
    """
    record = stored.read_json(Path(path))
    try:
        return from_hf(record)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def from_hf(record: dict) -> bpe.BPETokenizer | char.CharTokenizer:
    """The tokenizer in a parsed tokenizer.json. A special token with a name in PADS is PAD; else PAD is a new id.

    The file's truncation and padding are not read: batches have their own. Raises InputError for another kind.
    """
    if _get(record, "model.type") == "WordLevel":
        return _of_characters(record)
    _expect(EXPECTED, record)
    steps = _get(record, "post_processor.single") or []
    if not isinstance(steps, list) or any("Sequence" not in step for step in steps):
        raise InputError(f"post_processor.single: expected the text alone, got {short(json.dumps(steps))}")
    added = _added(record)
    ids = _ids(record, added)
    tokens = sorted(ids, key=ids.get)
    special = [token for token in tokens if token == bpe.EOS or token in added and added[token].get("special")]
    plain = [token for token in tokens if token in added and token not in special]
    normalizer = _get(record, "normalizer.type") or ""
    for token in plain:
        expected = EXPECTED_OF_ADDED | ({"normalized": (True,)} if normalizer else {})
        _expect(expected, added[token], f"added_tokens: {token!r}: ")
    pad = next((name for name in PADS if name in special), "")
    if pad == PADS[0] == tokens[-1]:  # the one that `to_hf` added
        tokens.remove(pad)
        special.remove(pad)
        pad = ""
    return bpe.BPETokenizer(tuple(tokens), _merges(record), tuple(plain), tuple(special), pad, normalizer)


def to_hf(tokenizer: bpe.BPETokenizer | char.CharTokenizer) -> dict[str, dict]:
    """The files that transformers.AutoTokenizer loads: {name: JSON value}. EOS and PAD are two special tokens.

    Their character tokenizer encodes a text without known characters as UNK; ours raises InputError.
    """
    codec, special = _characters(tokenizer) if isinstance(tokenizer, char.CharTokenizer) else _byte_level(tokenizer)
    codec.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in special])
    names = {"eos_token": codec.id_to_token(tokenizer.eos_id), "pad_token": codec.id_to_token(tokenizer.pad_id)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # no token types, which GPT-2 would add
    }
    return {FILE: json.loads(codec.to_str()), "tokenizer_config.json": config | names, "special_tokens_map.json": names}


def export(tokenizer: bpe.BPETokenizer | char.CharTokenizer, folder: str | os.PathLike) -> None:
    """Writes the files of `to_hf` into the folder."""
    for name, record in to_hf(tokenizer).items():
        stored.write(folder, record, name)


def _byte_level(tokenizer):
    codec = tokenizers.Tokenizer.from_str(tokenizer.codec.to_str())
    pad = tokenizer.pad or next(name for name in PADS if name not in tokenizer.tokens)
    return codec, dict.fromkeys((*tokenizer.special, pad))  # a new PAD gets the next id


def _characters(tokenizer):
    unknown = char.UNKNOWN if char.UNKNOWN not in tokenizer.characters else "<|unk|>"
    ids = {name: i for i, name in enumerate((*tokenizer.characters, unknown))}
    codec = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=unknown))
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    codec.decoder = tokenizers.decoders.Fuse()
    return codec, (bpe.EOS, PADS[0])  # EOS and PAD get the next two ids


def _of_characters(record):
    """What `_characters` made, and nothing else: any other word-level tokenizer splits texts in another way."""
    ids = _ids(record, _added(record))
    tokenizer = char.CharTokenizer("".join(sorted(ids, key=ids.get)[:-3]))  # UNK, EOS and PAD come last
    written = to_hf(tokenizer)[FILE]
    for field in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        if record.get(field) != written[field]:
            raise InputError(f"{field}: expected that of a tokenizer of characters, as we write it, or byte-level BPE")
    return tokenizer


def _expect(fields, record, where=""):
    for field, values in fields.items():
        if (value := _get(record, field)) not in values:
            expected = " or ".join("none" if value is None else json.dumps(value) for value in values)
            got = short(json.dumps(value))
            raise InputError(f"{where}{field}: expected {expected}, as in byte-level BPE, got {got}")


def _get(record, field):
    """record["a"]["b"] for the field "a.b"; None if it is absent."""
    for name in field.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _added(record):
    added = record.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(_get(token, "content"), str) for token in added):
        raise InputError("added_tokens: expected a list of objects with content and id")
    return {token["content"]: token for token in added}


def _ids(record, added):
    ids = _get(record, "model.vocab")
    if not isinstance(ids, dict):
        raise InputError("model.vocab: expected an object of token -> id")
    ids = ids | {name: token.get("id") for name, token in added.items()}
    if not all(type(i) is int for i in ids.values()) or set(ids.values()) != set(range(len(ids))):
        raise InputError(f"model.vocab and added_tokens: expected each of the ids 0 to {len(ids) - 1} once")
    return ids


def _merges(record):
    merges = _get(record, "model.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str | list) for merge in merges):
        raise InputError("model.merges: expected a list of pairs of tokens")
    return tuple(merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges)
