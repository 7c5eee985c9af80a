"""A tokenizer.json as it is: the `tokenizers` library reads it, encodes and decodes; nothing of it is built anew.

So every kind that the library knows has its own normalizer, pre-tokenizer, model and added tokens: the byte-level BPE
of GPT-2, GPT-NeoX, SmolLM2, Llama 3 and Qwen, and SentencePiece's BPE with byte fallback (Llama 2, Mistral). What is
off: the post-processor, whose BOS only prompts get (`begin`), and truncation and padding, which batches do.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable

import tokenizers

from rlhf_jax.errors import InputError, short
from rlhf_jax.text import stored

# Known names of PAD; ours is the first, and the last two are Llama 3's.
PADS = ("<|pad|>", "<|padding|>", "[PAD]", "<pad>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>")
# The byte of each character of GPT-2's alphabet: bytes that print badly have the characters from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in SentencePiece's tokens
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
    """`json` is the tokenizer.json, in which EOS and PAD are special tokens. `of_codec` makes one."""

    json: str = dataclasses.field(repr=False)
    eos_ids: tuple[int, ...]  # each of them ends a completion; the first is written after one
    pad_id: int
    template: str = ""  # the chat template, in Jinja; empty: there is none
    named: tuple[tuple[str, str], ...] = ()  # (role, token) of the tokens that a template can name beside EOS and PAD

    @classmethod
    def from_record(cls, record: dict) -> "FileTokenizer":
        fields = {name: value for name, value in record.items() if name != "kind"}
        named = tuple((role, token) for role, token in fields["named"])
        tokenizer = cls(**fields | {"eos_ids": tuple(fields["eos_ids"]), "named": named})
        if tokenizer._silent - tokenizer.codec.get_added_tokens_decoder().keys():
            raise InputError("eos_ids and pad_id: expected ids of special tokens of the tokenizer.json")
        return tokenizer

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        names = {"eos_token": self.eos_id, "pad_token": self.pad_id}
        return dict(self.named) | {role: self.codec.id_to_token(id) or "" for role, id in names.items()}

    @functools.cached_property
    def special(self) -> tuple[str, ...]:
        return tuple(token.content for token in self.codec.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def begin(self) -> list[int]:
        encoding = self.codec.encode("a")
        return encoding.ids[: encoding.special_tokens_mask.index(0)]

    @functools.cached_property
    def space(self) -> str:
        start = self.encode("a")
        joined = self.encode("a a")[len(start) :]
        return "" if start == joined != self.encode(" a") else " "

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self.codec.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.codec.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.codec.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_special(self, text: str) -> list[int]:
        return self._special_codec.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.codec.decode([i for i in ids if i not in self._silent], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        token = self.codec.id_to_token(id)
        if token is None or id in self._silent:
            return b""
        kinds = self._decoders
        if "ByteLevel" in kinds and all(character in BYTE for character in token):
            return bytes(BYTE[character] for character in token)
        if "ByteFallback" in kinds and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if "Metaspace" in kinds or SPACE in kinds:
            return token.replace(SPACE, " ").encode()
        return token.encode() if "ByteLevel" in kinds else self.codec.decode([id]).encode()

    def save(self, directory: str | os.PathLike) -> None:
        stored.write(directory, self._record)

    def fingerprint(self) -> str:
        return stored.fingerprint(self._record)

    @property
    def _record(self) -> dict:
        return {"kind": "file"} | dataclasses.asdict(self)

    @functools.cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset((*self.eos_ids, self.pad_id))

    @functools.cached_property
    def codec(self) -> tokenizers.Tokenizer:
        """The encoder. To it, the name of a special token in a text is ordinary text."""
        codec = load(self.json)
        codec.encode_special_tokens = True
        return codec

    @functools.cached_property
    def _special_codec(self) -> tokenizers.Tokenizer:
        return load(self.json)

    @functools.cached_property
    def _decoders(self) -> set[str]:
        """The types of the decoder's steps, and SPACE where a step replaces that by a space."""
        decoder = json.loads(self.json).get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        replaced = {SPACE for step in steps if step.get("pattern") == {"String": SPACE}}
        return {step.get("type") for step in steps} | replaced


def of_codec(
    codec: tokenizers.Tokenizer,
    eos: Iterable[str],
    pad: str,
    template: str = "",
    named: Iterable[tuple[str, str]] = (),
) -> FileTokenizer:
    """The FileTokenizer of the library's tokenizer, which is changed: its tokens `eos` and `pad` become special ones.

    Those that it does not have get the next ids.
    """
    special = {token.content for token in codec.get_added_tokens_decoder().values() if token.special}
    missing = [name for name in (*eos, pad) if name not in special]
    codec.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in missing])
    ids = codec.get_vocab()
    return FileTokenizer(
        json=json.dumps(json.loads(codec.to_str()), sort_keys=True),
        eos_ids=tuple(ids[name] for name in eos),
        pad_id=ids[pad],
        template=template,
        named=tuple(named),
    )


def load(text: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json's text, without truncation and padding.

    Raises InputError if the library cannot read it, if it encodes at random, or if an added token has another id in it.
    """
    try:
        codec = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        why = short(" ".join(str(error).split()), 150)
        raise InputError(f"expected a tokenizer.json that the library `tokenizers` reads ({why})") from None
    if rate := getattr(codec.model, "dropout", None):
        raise InputError(f"model.dropout: expected none or 0, as encoding must not be random, got {rate}")
    for token in json.loads(text).get("added_tokens") or []:
        if codec.token_to_id(token["content"]) != token["id"]:
            got = codec.token_to_id(token["content"])
            raise InputError(f"added_tokens: {token['content']!r}: expected id {token['id']}, the library gives {got}")
    codec.no_truncation()
    codec.no_padding()
    return codec
