"""Reads a byte-level BPE like GPT-2's (Radford et al. 2019) from files, and adds PAD if the files have none.

GPT-2 itself has 50257 tokens, so its PAD is id 50257.
"""

import os
from pathlib import Path
from typing import Any

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.text import bpe, char, hf, stored

NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # as OpenAI and as Hugging Face name them
FILES = ((hf.FILE,), *NAMES)  # any one of these sets is enough
# What transformers may write beside them: tokens that are not in the vocabulary, settings, and the special tokens.
ALSO = ADDED, CONFIG, SPECIAL = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
ROLES = (*(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")), "additional_special_tokens")


def from_files(path: str | os.PathLike) -> bpe.BPETokenizer | char.CharTokenizer:
    """Reads a tokenizer.json or a folder that has one, or a folder with a pair of NAMES (token -> id, and merges).

    In a folder, the files ALSO are read too. InputError names the file that does not fit the others, or that has a
    setting which we would not follow.
    """
    path = Path(path)
    if path.is_file():
        return hf.read(path)
    config, added = _settings(path)
    if (path / hf.FILE).exists():
        tokenizer = hf.read(path / hf.FILE)
        if added:
            _check_added(path, added)
        return tokenizer
    pair = next((names for names in NAMES if all((path / name).exists() for name in names)), None)
    if pair is None:
        raise InputError(f"{path}: expected a folder with {', or '.join(' and '.join(names) for names in FILES)}")
    vocabulary = _tokens(path / pair[0])
    named = [name for name in _special(config) if name in vocabulary]
    known = [{"content": name, "id": vocabulary[name], "special": True} for name in named]
    record = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"vocab": vocabulary, "merges": _merges(path / pair[1])},
        "added_tokens": known + added,
    }
    try:
        return hf.from_hf(record)
    except InputError as error:
        raise InputError(f"{path / pair[0]} does not fit {pair[1]}: {error}") from None


def _settings(folder: Path) -> tuple[dict, list[dict]]:
    """(settings, added tokens as in a tokenizer.json) of the files ALSO, which need not be there."""
    there = {name: jsonfile.read(folder / name) for name in ALSO if (folder / name).exists()}
    config = there.get(SPECIAL, {}) | there.get(CONFIG, {})
    if config.get("add_prefix_space"):
        raise InputError(
            f"{folder / CONFIG}: add_prefix_space: expected false, got {short(repr(config['add_prefix_space']))}"
        )
    special, ids = _special(config), there.get(ADDED, {})
    added = {name: {"content": name, "id": id, "special": name in special} for name, id in ids.items()}
    decoder = config.get("added_tokens_decoder") or {}
    try:
        added |= {token["content"]: token | {"id": int(id)} for id, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{folder / CONFIG}: added_tokens_decoder: expected an object of id -> token") from None
    return config, list(added.values())


def _special(config: dict) -> set[str]:
    """The names of the special tokens."""
    values = [value for role in ROLES for value in _list(config.get(role))]
    names = [value.get("content") if isinstance(value, dict) else value for value in values]
    return {name for name in names if isinstance(name, str)}


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _check_added(folder: Path, added: list[dict]) -> None:
    """Refuses added tokens that the tokenizer.json does not have."""
    record = stored.read_json(folder / hf.FILE)
    ids = record["model"]["vocab"] | {token["content"]: token["id"] for token in record.get("added_tokens") or []}
    if wrong := [f"{token.get('content')!r}" for token in added if ids.get(token.get("content")) != token["id"]]:
        names = " and ".join(name for name in (ADDED, CONFIG) if (folder / name).exists())
        raise InputError(f"{folder / hf.FILE}: expected the added tokens of {names} with their ids: {listed(wrong)}")


def _tokens(file: Path) -> dict[str, int]:
    ids = stored.read_json(file)
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
        raise InputError(f"{file}: expected a JSON object of token -> id")
    if set(ids.values()) != set(range(len(ids))):
        raise InputError(f"{file}: expected each of the ids 0 to {len(ids) - 1} once")
    return ids


def _merges(file: Path) -> list[str]:
    lines = stored.read_text(file).splitlines()
    return [line for line in lines if line and not line.startswith("#version:")]
