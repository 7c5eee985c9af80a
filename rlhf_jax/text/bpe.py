"""Byte-level byte-pair encoding (Sennrich et al. 2016; bytes and word split as in Radford et al. 2019).

Tokens and merges are written in GPT-2's alphabet, which gives each of the 256 bytes one printable character: a space is
"Ġ". All 256 bytes are tokens, so every text can be encoded.
"""

import json
from collections.abc import Iterable

import tokenizers

from rlhf_jax.errors import InputError
from rlhf_jax.text import library

EOS = "<|endoftext|>"
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def train(texts: Iterable[str], vocab_size: int) -> library.FileTokenizer:
    """The bytes, then one token for each merge learned from `texts`, then EOS and PAD: `vocab_size` ids.

    There are fewer ids if `texts` runs out of pairs that occur twice. The same texts give the same tokenizer. Raises
    InputError if vocab_size is below 258.
    """
    learned = vocab_size - 2  # without EOS and PAD
    if learned < len(BYTES):
        raise InputError(f"vocab_size: expected at least {len(BYTES) + 2} (the bytes, EOS and PAD), got {vocab_size}")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=BYTES, min_frequency=2, show_progress=False
    )
    codec = byte_level(tokenizers.models.BPE())
    codec.train_from_iterator(texts, trainer)
    return library.of_codec(codec, (EOS,), library.PADS[0])


def from_record(record: dict) -> library.FileTokenizer:
    """The tokenizer in the file of an older run, whose fields are tokens, merges, added, special, pad, normalizer."""
    tokens, special = record["tokens"], record.get("special", [EOS])
    plain = [{"content": name, "id": tokens.index(name), "normalized": True} for name in record.get("added", [])]
    ids = {token: i for i, token in enumerate(tokens)}
    ids = {token: i for token, i in ids.items() if token not in record.get("added", [])}
    merges = [merge.split(" ") for merge in record["merges"]]
    codec = library.load(as_json(ids, merges, special, plain))
    if record.get("normalizer"):
        codec.normalizer = tokenizers.normalizers.NFC()
    return library.of_codec(codec, [EOS], record.get("pad") or library.PADS[0])


def as_json(
    ids: dict[str, int],
    merges: Iterable[Iterable[str]],
    special: Iterable[str],
    added: Iterable[dict],
    add_prefix_space: bool = False,
) -> str:
    """The tokenizer.json of a vocabulary with these special tokens in it, merges, and added tokens."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    known: list[dict] = [{"content": name, "id": ids[name], "special": True} for name in special]
    # The library gives the last ids to special tokens by itself, as `train` does: one form for the same tokenizer.
    kept = {token: i for token, i in ids.items() if token not in special}
    kept = kept if all(token["id"] >= len(kept) for token in known) else ids
    pairs = [(left, right) for left, right in merges]
    record = json.loads(byte_level(tokenizers.models.BPE(kept, pairs), add_prefix_space).to_str())
    record["added_tokens"] = sorted((plain | token for token in [*known, *added]), key=lambda token: token["id"])
    return json.dumps(record)


def byte_level(model: tokenizers.models.BPE, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """The library's tokenizer of GPT-2's kind with this model."""
    codec = tokenizers.Tokenizer(model)
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    codec.decoder = tokenizers.decoders.ByteLevel()
    return codec
