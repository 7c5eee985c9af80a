"""GPT-2's own vocabulary (Radford et al. 2019), from the two files it is published in; PAD is added, as id 50257."""

import os
from pathlib import Path

from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, stored

NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # as OpenAI and as Hugging Face name them


def from_files(path: str | os.PathLike) -> bpe.BPETokenizer:
    """Reads the object of token -> id and the list of merges in the folder `path`, under either pair of names."""
    pairs = [(Path(path, tokens), Path(path, merges)) for tokens, merges in NAMES]
    found = next((pair for pair in pairs if all(file.exists() for file in pair)), None)
    if found is None:
        raise InputError(f"{path}: expected a folder with {' or '.join(' and '.join(pair) for pair in NAMES)}")
    tokens, merges = _tokens(found[0]), _merges(found[1])
    try:
        return bpe.BPETokenizer(tokens, merges)
    except InputError as error:
        raise InputError(f"{found[0]} does not fit {found[1].name}: {error}") from None


def _tokens(file: Path) -> tuple[str, ...]:
    ids = stored.read_json(file)
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise InputError(f"{file}: expected a JSON object of token -> id")
    if set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{file}: expected each of the ids 0 to {len(ids) - 1} once")
    return tuple(sorted(ids, key=ids.get))


def _merges(file: Path) -> tuple[str, ...]:
    lines = stored.read_text(file).splitlines()
    return tuple(line for line in lines if line and not line.startswith("#version:"))
