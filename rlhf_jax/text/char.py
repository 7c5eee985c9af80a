"""One id per character: the smallest vocabulary and the longest sequences."""

import dataclasses
import functools
import os
from collections.abc import Iterable

from rlhf_jax.errors import InputError
from rlhf_jax.text import stored

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what an unknown character decodes to


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """Id i is characters[i]; the three ids after them are UNK (any other character), EOS and PAD."""

    characters: str
    template: str = ""  # the chat template, in Jinja; empty: there is none

    def __post_init__(self):
        if not isinstance(self.characters, str) or not self.characters:
            raise InputError("characters: expected a string of at least one character")
        if len(set(self.characters)) < len(self.characters):
            raise InputError("characters: expected each character once")

    @classmethod
    def from_record(cls, record: dict) -> "CharTokenizer":
        return cls(record["characters"], record.get("template", ""))

    @property
    def unk_id(self) -> int:
        return len(self.characters)

    @property
    def eos_id(self) -> int:
        return len(self.characters) + 1

    @property
    def roles(self) -> dict[str, str]:
        return {}

    @property
    def special(self) -> tuple[str, ...]:
        return ()

    @property
    def begin(self) -> list[int]:
        return []

    @property
    def space(self) -> str:
        return " "

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @property
    def pad_id(self) -> int:
        return len(self.characters) + 2

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 3

    def encode(self, text: str) -> list[int]:
        """One id per character. Raises InputError if no visible character of `text` is known."""
        ids = [self._ids.get(character, self.unk_id) for character in text]
        visible = text.strip()
        if visible and self._ids.keys().isdisjoint(visible):
            first = "".join(dict.fromkeys(visible))[:5]
            raise InputError(f"text with no known characters: it begins with {first!r}; all its characters are new")
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_special(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        known = (i for i in ids if i not in (self.pad_id, self.eos_id))
        return "".join(self.characters[i] if i < len(self.characters) else UNKNOWN for i in known)

    def token_bytes(self, id: int) -> bytes:
        return self.decode([id]).encode()

    def save(self, directory: str | os.PathLike) -> None:
        stored.write(directory, self._record)

    def fingerprint(self) -> str:
        return stored.fingerprint(self._record)

    @property
    def _record(self) -> dict:
        return {"kind": "char", "characters": self.characters} | ({"template": self.template} if self.template else {})

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {character: i for i, character in enumerate(self.characters)}


def train(texts: Iterable[str]) -> CharTokenizer:
    """The tokenizer of all characters in `texts`, in code point order."""
    return CharTokenizer("".join(sorted(set().union(*texts))))
