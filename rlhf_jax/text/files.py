"""Reads the tokenizer of a folder, as Hugging Face or OpenAI writes it, with its EOS, its PAD and its chat template.

EOS are the tokens that end a completion: the tokenizer's own, then those of generation_config.json, as Llama 3 and Qwen
have several. PAD is never one of them: where the files use EOS as PAD or name none, PAD is a free special token whose
name says so, or a new token after all others. GPT-2 has 50257 tokens, so its PAD is id 50257.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.text import bpe, char, hf, library, stored

NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # as OpenAI and as Hugging Face name them
FILES = ((hf.FILE,), *NAMES)  # any one of these sets is enough
# What transformers may write beside them: tokens that are not in the vocabulary, settings, the special tokens, how to
# generate, the model's config and the chat template.
ADDED, CONFIG, SPECIAL = ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
GENERATION, MODEL, TEMPLATE = ("generation_config.json", "config.json", "chat_template.jinja")
ALSO = (ADDED, CONFIG, SPECIAL, GENERATION, MODEL, TEMPLATE)
ROLES = (*(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")), "additional_special_tokens")

EOS = (bpe.EOS, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>")  # names of EOS where no file names it
NONE = "none"  # the chat template of text.template that is no template


def from_files(
    path: str | os.PathLike,
    *,
    eos: str = "",
    pad: str = "",
    template: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> library.FileTokenizer | char.CharTokenizer:
    """Reads a tokenizer.json or a folder that has one, or a folder with a pair of NAMES (token -> id, and merges).

    In a folder, the files ALSO are read too. `eos` names the tokens that end a completion, with commas between them,
    and `pad` names PAD, instead of the files; a PAD that the tokenizer does not have is added. `template` is the path
    of a chat template, or "none", instead of the files'. `note` gets one line where PAD is not the files' own.

    InputError names the file that does not fit the others, or that has a setting which we would not follow; or says
    that there is no EOS.
    """
    path = Path(path)
    file = path if path.is_file() else path / hf.FILE
    settings, added = _settings(path) if path.is_dir() else ({}, [])
    if file.exists():
        text = stored.read_text(file)
        if characters := hf.characters(stored.read_json(file)):
            return characters
        if added:
            _check_added(path, added)
    else:
        text, file = _of_pair(path, settings, added)
    try:
        codec = library.load(text)
        _check_prefix(codec, settings)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    ends = _eos(codec, eos, settings, path, file)
    padding = _pad(codec, pad, ends, settings, file)
    named = [(role, name) for role in ("bos_token", "unk_token") if (name := _content(settings.get(role)))]
    before = codec.token_to_id(padding)
    tokenizer = library.of_codec(codec, ends, padding, chat_template(template, path, settings), named)
    if padding != (theirs := _content(settings.get("pad_token"))):
        kind = "a new token, " if before is None else ""
        note(f"text: PAD is {padding}, {kind}id {tokenizer.pad_id}{f'; {theirs} ends a text' * (theirs in ends)}")
    return tokenizer


def chat_template(template: str, folder: Path | None = None, settings: dict | None = None) -> str:
    """The source of the chat template: that of the file `template`, or "none"; of the folder, where that is empty."""
    if template:
        return template if template == NONE else stored.read_text(Path(template))
    if folder and (folder / TEMPLATE).exists():
        return stored.read_text(folder / TEMPLATE)
    found = (settings or {}).get("chat_template") or ""
    if isinstance(found, list):  # several with names
        found = next((each.get("template") for each in found if each.get("name") == "default"), "")
    return found


def _eos(codec: tokenizers.Tokenizer, wanted: str, settings: dict, folder: Path, file: Path) -> list[str]:
    """The names of the tokens that end a completion, the one that is written first."""
    if wanted:
        found = [name.strip() for name in wanted.split(",")]
        if unknown := [name for name in found if codec.token_to_id(name) is None]:
            raise InputError(f"text.eos: expected tokens of {file}, got {listed(map(repr, unknown))}")
    else:
        theirs = [_content(settings.get("eos_token")), *(codec.id_to_token(id) for id in _generation(folder))]
        found = [name for name in theirs if name and codec.token_to_id(name) is not None]
        found = found or [name for name in EOS if codec.token_to_id(name) is not None][:1]
    if not found:
        raise InputError(
            f"{file}: expected a token that ends a text (EOS), as {CONFIG} or {GENERATION} name it, or {listed(EOS)}; "
            "give its name with --config.text.eos=NAME"
        )
    return list(dict.fromkeys(found))


def _generation(folder: Path) -> list[int]:
    """The ids of EOS in generation_config.json or, where that has none, in config.json."""
    for file in (folder / GENERATION, folder / MODEL):
        value = jsonfile.read(file).get("eos_token_id") if folder.is_dir() and file.exists() else None
        if ids := [id for id in _list(value) if type(id) is int and id >= 0]:
            return ids
    return []


def _pad(codec: tokenizers.Tokenizer, wanted: str, eos: list[str], settings: dict, file: Path) -> str:
    """The name of PAD: a special token that is not EOS, and that no text encodes to; it may be a new one."""
    if wanted in eos:
        raise InputError(f"text.pad: expected a token other than EOS, got {wanted!r}, with which {file} ends a text")
    special = {token.content for token in codec.get_added_tokens_decoder().values() if token.special}
    free = special - {*eos, getattr(codec.model, "unk_token", None)}
    known = [name for name in (_content(settings.get("pad_token")), *library.PADS) if name in free]
    new = [name for name in library.PADS if codec.token_to_id(name) is None]
    return wanted or [*known, *new][0]


def _check_prefix(codec: tokenizers.Tokenizer, settings: dict) -> None:
    """Refuses a setting of tokenizer_config.json that would change the pre-tokenizer of the tokenizer.json."""
    own, wanted = getattr(codec.pre_tokenizer, "add_prefix_space", None), settings.get("add_prefix_space")
    if own is not None and wanted is not None and own != wanted:
        raise InputError(f"pre_tokenizer.add_prefix_space: expected that of {CONFIG}, {wanted}, got {own}")


def _of_pair(folder: Path, settings: dict, added: list[dict]) -> tuple[str, Path]:
    """(the tokenizer.json of a vocabulary and its merges, the file of the vocabulary)."""
    pair = next((names for names in NAMES if all((folder / name).exists() for name in names)), None)
    if pair is None:
        raise InputError(f"{folder}: expected a folder with {', or '.join(' and '.join(names) for names in FILES)}")
    vocabulary, merges = _tokens(folder / pair[0]), _merges(folder / pair[1])
    named = {name for name in (*_special(settings), bpe.EOS) if name in vocabulary}
    made = {*bpe.BYTES, *("".join(merge) for merge in merges), *named, *(token["content"] for token in added)}
    if wrong := made ^ {*vocabulary, *(token["content"] for token in added)}:
        raise InputError(
            f"{folder / pair[0]} does not fit {pair[1]}: expected the {len(made)} bytes, merges and special tokens, "
            f"got {len(vocabulary)}; others: {listed(map(short, sorted(wrong)))}"
        )
    prefix = bool(settings.get("add_prefix_space"))
    return bpe.as_json(vocabulary, merges, sorted(named), added, prefix), folder / pair[0]


def _settings(folder: Path) -> tuple[dict, list[dict]]:
    """(settings, added tokens as in a tokenizer.json) of the files ALSO, which need not be there."""
    there = {name: jsonfile.read(folder / name) for name in (ADDED, CONFIG, SPECIAL) if (folder / name).exists()}
    settings = there.get(SPECIAL, {}) | there.get(CONFIG, {})
    special, ids = _special(settings), there.get(ADDED, {})
    added = {name: {"content": name, "id": id, "special": name in special} for name, id in ids.items()}
    decoder = settings.get("added_tokens_decoder") or {}
    try:
        added |= {token["content"]: token | {"id": int(id)} for id, token in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{folder / CONFIG}: added_tokens_decoder: expected an object of id -> token") from None
    if wrong := [name for name, token in added.items() if type(token["id"]) is not int]:
        raise InputError(f"{folder / ADDED}: expected an object of token -> id, got another value for {wrong[0]!r}")
    return settings, list(added.values())


def _special(settings: dict) -> set[str]:
    """The names of the special tokens."""
    return {_content(value) for role in ROLES for value in _list(settings.get(role))} - {""}


def _content(value: Any) -> str:
    """The name of a token in the settings: it is there as text, or as an object with its content."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else ""


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _check_added(folder: Path, added: list[dict]) -> None:
    """Refuses added tokens that the tokenizer.json does not have."""
    record = stored.read_json(folder / hf.FILE)
    there = record.get("added_tokens") or []
    vocabulary = record["model"]["vocab"]
    ids = (vocabulary if isinstance(vocabulary, dict) else {}) | {token["content"]: token["id"] for token in there}
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


def _merges(file: Path) -> list[list[str]]:
    lines = stored.read_text(file).splitlines()
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version:")]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise InputError(f"{file}: expected two tokens a line, got {short(' '.join(wrong[0]))!r}")
    return pairs
