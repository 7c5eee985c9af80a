"""str <-> ids, one interface: `char` and `library`, which is any tokenizer.json; `bpe` trains one of these.

`files` reads the folder of a model, `hf` writes one for transformers, and `stored` is the file in a workdir.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, char, files, hf, library, stored

SPECIAL = (*files.EOS, *library.PADS)  # the names that EOS and PAD have in the tokenizers of files


class Tokenizer(Protocol):
    """Ids are 0..vocab_size-1, PAD and EOS among them. PAD is never EOS, and no text encodes to either.

    Equal tokenizers compare equal and have equal fingerprints.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    @property
    def eos_id(self) -> int:
        """EOS, which is written after a completion."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion where they are sampled: EOS first, then others that some models write."""

    @property
    def template(self) -> str:
        """The chat template, in Jinja (text/chat.py); empty: there is none."""

    @property
    def roles(self) -> Mapping[str, str]:
        """{role: name of the token} of what a chat template can name: eos_token, pad_token, bos_token."""

    @property
    def special(self) -> tuple[str, ...]:
        """The names of the special tokens, which only a chat template writes."""

    @property
    def begin(self) -> list[int]:
        """What stands before every prompt that is text: BOS, where the files say so (Llama), or nothing."""

    @property
    def space(self) -> str:
        """What stands before a completion: a space, or nothing where encoding puts one before every text."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without EOS. The name of a special token is ordinary text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, as from `encode` but faster."""

    def encode_special(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens are these tokens, as a chat template writes them."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without PAD and any EOS. What is not a known character becomes U+FFFD."""

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one token, which may be a part of a character; none of PAD and EOS."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the file that `load` reads."""

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that determines the ids of a text."""


def responses(tokenizer: Tokenizer, response_BR, mask_BR) -> list[str]:
    """Decodes the ids where mask_BR is 1: a text per row, without whitespace around it."""
    pairs = zip(np.asarray(response_BR), np.asarray(mask_BR, bool), strict=True)
    return [tokenizer.decode(ids[mask].tolist()).strip() for ids, mask in pairs]


def load(directory: str | os.PathLike) -> hf.Ours:
    """The tokenizer saved in `directory`, a workdir's text/. Raises InputError if it is missing or damaged."""
    path = Path(directory, stored.FILE)
    kinds: dict[str, Callable[[dict], hf.Ours]] = {
        "char": char.CharTokenizer.from_record,
        "file": library.FileTokenizer.from_record,
        "bpe": bpe.from_record,  # of older runs
    }
    again = "; the command that trains the run makes it again"
    try:
        record = stored.read_json(path)
    except InputError as error:
        raise InputError(f"{error}{again}") from None
    try:
        return kinds[record["kind"]](record)
    except InputError as error:
        raise InputError(f"{path}: {error}{again}") from None
    except (AttributeError, KeyError, TypeError):  # not an object, a field missing, a field of another type
        expected = f"expected the fields of a tokenizer of kind {', '.join(kinds)}"
        raise InputError(f"{path}: {expected}{again}") from None
