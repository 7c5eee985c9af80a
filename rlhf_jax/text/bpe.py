"""Byte-level byte-pair encoding (Sennrich et al. 2016; bytes and word split as in Radford et al. 2019).

Tokens and merges are written in GPT-2's alphabet, which gives each of the 256 bytes one printable character: a space is
"Ġ". All 256 bytes are tokens, so every text can be encoded.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterable
from typing import Any

import tokenizers

from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.text import stored

EOS = "<|endoftext|>"
NORMALIZERS = {"": None, "NFC": tokenizers.normalizers.NFC()}
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# The byte of each character of the alphabet: bytes that are no printable character have the characters from U+0100 on.
_PRINTABLE = [byte for byte in range(256) if chr(byte) in BYTES]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
    """Id i is tokens[i]: the 256 bytes, the results of the merges, the added and the special tokens, in any order.

    merges[r] = "left right" is the merge of rank r; lower ranks are applied first. Encoding normalizes the text,
    matches the added tokens whole, and splits the rest into words. Raises InputError where the fields do not fit.
    """

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    added: tuple[str, ...] = ()  # as plain text, with " " for a space: runs of spaces in GPT-NeoX
    special: tuple[str, ...] = (EOS,)  # no text encodes to these; we use only EOS and PAD
    pad: str = ""  # the special token that is PAD; empty: PAD is the id after all tokens
    normalizer: str = ""  # one of NORMALIZERS

    def __post_init__(self):
        made = {*BYTES}
        for rank, merge in enumerate(self.merges):
            left, _, right = merge.partition(" ")
            if left not in made or right not in made:
                raise InputError(f"merges: expected two earlier tokens at rank {rank}, got {short(repr(merge))}")
            made.add(left + right)
        if not made.isdisjoint(self.special) or EOS not in self.special or self.pad not in ("", *self.special):
            raise InputError(
                f"special: expected {EOS} and {short(str(self.pad)) or 'others'} that no merge makes, "
                f"got ({listed(map(short, self.special))})"
            )
        if self.pad == EOS:
            raise InputError(f"pad: expected a token other than {EOS}")
        if self.normalizer not in NORMALIZERS:
            raise InputError(f"normalizer: expected none or NFC, got {short(repr(self.normalizer))}")
        made |= {*self.special, *self.added}
        if len(set(self.tokens)) < len(self.tokens) or made != set(self.tokens):
            raise InputError(
                f"tokens: expected the {len(made)} bytes, merges, added and special tokens, each once, "
                f"got {len(self.tokens)} with {len(made - set(self.tokens))} of them missing"
            )

    @classmethod
    def from_record(cls, record: dict) -> "BPETokenizer":
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        del fields["kind"]
        return cls(**fields)

    @functools.cached_property
    def eos_id(self) -> int:
        return self.tokens.index(EOS)

    @functools.cached_property
    def pad_id(self) -> int:
        return self.tokens.index(self.pad) if self.pad else len(self.tokens)

    @property
    def vocab_size(self) -> int:
        return len(self.tokens) + (not self.pad)

    def encode(self, text: str) -> list[int]:
        return self.codec.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.codec.encode_batch_fast(texts)]

    def decode(self, ids: list[int]) -> str:
        return self.codec.decode([i for i in ids if i not in (self.pad_id, self.eos_id)])

    def token_bytes(self, id: int) -> bytes:
        token = "" if id >= len(self.tokens) or id in (self.pad_id, self.eos_id) else self.tokens[id]
        return token.encode() if token in self.added + self.special else bytes(BYTE[char] for char in token)

    def save(self, directory: str | os.PathLike) -> None:
        stored.write(directory, self._record)

    def fingerprint(self) -> str:
        return stored.fingerprint(self._record)

    @property
    def _record(self) -> dict:
        return {"kind": "bpe"} | dataclasses.asdict(self)

    @functools.cached_property
    def codec(self) -> tokenizers.Tokenizer:
        """The encoder. To it, the name of a special token in a text is ordinary text."""
        ids = {token: i for i, token in enumerate(self.tokens)}
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in self.merges)]
        codec = _byte_level(tokenizers.models.BPE(ids, merges))
        if self.normalizer:
            codec.normalizer = NORMALIZERS[self.normalizer]
        codec.add_tokens([tokenizers.AddedToken(token, normalized=True) for token in self.added])
        return codec


def train(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
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
    codec = _byte_level(tokenizers.models.BPE())
    codec.train_from_iterator(texts, trainer)
    model = json.loads(codec.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return BPETokenizer((*tokens, EOS), tuple(" ".join(merge) for merge in model["merges"]))


def _byte_level(model: tokenizers.models.BPE) -> tokenizers.Tokenizer:
    codec = tokenizers.Tokenizer(model)
    codec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = tokenizers.decoders.ByteLevel()
    return codec
