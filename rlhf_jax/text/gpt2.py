"""Reads a byte-level BPE like GPT-2's (Radford et al. 2019) from files, and adds PAD if the files have none.

GPT-2 itself has 50257 tokens, so its PAD is id 50257.
"""

import os
from pathlib import Path

from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, char, hf, stored

NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # as OpenAI and as Hugging Face name them
FILES = ((hf.FILE,), *NAMES)  # any one of these sets is enough


def from_files(path: str | os.PathLike) -> bpe.BPETokenizer | char.CharTokenizer:
    """Reads a tokenizer.json or a folder that has one, or a folder with a pair of NAMES (token -> id, and merges)."""
    path = Path(path)
    if path.is_file() or (path / hf.FILE).exists():
        return hf.read(path if path.is_file() else path / hf.FILE)
    pair = next((names for names in NAMES if all((path / name).exists() for name in names)), None)
    if pair is None:
        raise InputError(f"{path}: expected a folder with {', or '.join(' and '.join(names) for names in FILES)}")
    tokens, merges = _tokens(path / pair[0]), _merges(path / pair[1])
    try:
        return bpe.BPETokenizer(tokens, merges)
    except InputError as error:
        raise InputError(f"{path / pair[0]} does not fit {pair[1]}: {error}") from None


def _tokens(file: Path) -> tuple[str, ...]:
    ids = stored.read_json(file)
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise InputError(f"{file}: expected a JSON object of token -> id")
    if set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{file}: expected each of the ids 0 to {len(ids) - 1} once")
    return tuple(sorted(ids, key=lambda token: ids[token]))


def _merges(file: Path) -> tuple[str, ...]:
    lines = stored.read_text(file).splitlines()
    return tuple(line for line in lines if line and not line.startswith("#version:"))
