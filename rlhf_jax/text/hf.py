"""Writes files for transformers.AutoTokenizer, and reads back the characters among them.

A text has the same ids on both sides, with one exception: theirs encodes the name of a special token as that token.
"""

import json
import os

import tokenizers

from rlhf_jax.text import bpe, char, library, stored

FILE = "tokenizer.json"
Ours = char.CharTokenizer | library.FileTokenizer


def to_hf(tokenizer: Ours) -> dict[str, dict]:
    """The files that transformers.AutoTokenizer loads: {name: JSON value}. EOS and PAD are two special tokens.

    Their character tokenizer encodes a text without known characters as UNK; ours raises InputError.
    """
    codec = _codec(tokenizer)
    names = {"eos_token": codec.id_to_token(tokenizer.eos_id), "pad_token": codec.id_to_token(tokenizer.pad_id)}
    names = {**tokenizer.roles, **names}  # bos_token, unk_token, ...
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # no token types, which GPT-2 would add
    }
    if isinstance(tokenizer, library.FileTokenizer):
        del config["add_prefix_space"]  # the tokenizer.json says it
    if tokenizer.template:
        config["chat_template"] = tokenizer.template
    return {FILE: json.loads(codec.to_str()), "tokenizer_config.json": config | names, "special_tokens_map.json": names}


def export(tokenizer: Ours, folder: str | os.PathLike) -> None:
    """Writes the files of `to_hf` into the folder."""
    for name, record in to_hf(tokenizer).items():
        stored.write(folder, record, name)


def characters(record: object) -> char.CharTokenizer | None:
    """The tokenizer of characters that `to_hf` wrote as this tokenizer.json; None where it is any other."""
    model = record.get("model") if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(model, dict) or model.get("type") != "WordLevel":
        return None
    vocabulary = model.get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    known = sorted(vocabulary, key=vocabulary.__getitem__)[:-1]  # UNK comes last
    if not known or any(len(character) != 1 for character in known):
        return None
    tokenizer = char.CharTokenizer("".join(known))
    written = to_hf(tokenizer)[FILE]
    same = all(record.get(field) == value for field, value in written.items())
    return tokenizer if same else None


def _codec(tokenizer: Ours) -> tokenizers.Tokenizer:
    """The library's tokenizer with EOS and PAD as special tokens."""
    if isinstance(tokenizer, library.FileTokenizer):
        return library.load(tokenizer.json)
    codec = _of_characters(tokenizer)
    pad = next(name for name in library.PADS if codec.token_to_id(name) is None)
    codec.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in (bpe.EOS, pad)])
    return codec


def _of_characters(tokenizer: char.CharTokenizer) -> tokenizers.Tokenizer:
    unknown = char.UNKNOWN if char.UNKNOWN not in tokenizer.characters else "<|unk|>"
    ids = {name: i for i, name in enumerate((*tokenizer.characters, unknown))}
    codec = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=unknown))
    codec.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    codec.decoder = tokenizers.decoders.Fuse()
    return codec
