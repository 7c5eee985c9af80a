"""Weights of Hugging Face's models <-> our parameter trees, by family (families/). Arrays only: no torch.

    params = hf.load("gpt2", config)                           # or hf.from_hf(hf.read(path), config), piece by piece
    hf.save("policy", params, config, eos_id=..., pad_id=...)  # what transformers' from_pretrained reads

A reward model is their ...ForSequenceClassification with one label: scalar_from_hf, save_scalar.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlhf_jax import hub
from rlhf_jax.errors import InputError, listed
from rlhf_jax.models import families, hf_config, hf_layout
from rlhf_jax.models.families.family import HEADS
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.weights import FILE, INDEX, read

# Files of a model of transformers, in a folder or on the hub; any one of these sets is enough.
FILES = ((hf_config.FILE, FILE), (hf_config.FILE, INDEX, "model-*.safetensors"))

SCORE_BIAS = "score.bias"
SHARD = 5 * 10**9  # most bytes of a file; a larger model is written as shards with an index, as transformers does
VOCABULARY = (("wte", "embedding"), ("unembed", "embedding"))  # tables with one row per token id


def load(path, config):
    """A language model's parameters from a safetensors file or a folder that transformers saved.

    The sizes of config must be those of the config.json beside the weights. A folder must have one. A single file may
    lack it; then only the shapes are checked, which do not determine the number of heads. Raises InputError.
    """
    path = Path(path)
    arrays = read(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or (folder / hf_config.FILE).exists():
        hf_config.compare(folder, config)
    try:
        return from_hf(arrays, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def find(place):
    """The file or folder of weights at a path, or of a name on the hub, which is downloaded. Raises InputError."""
    return Path(place) if Path(place).exists() else hub.folder(place, *FILES)


def from_hf(arrays, config):
    """A checkpoint's arrays by name -> parameters of a LanguageModel of the config: float32 copies.

    What wrappers add to the names (`_orig_mod.`, `module.`: hf_layout.WRAPPERS) is ignored.

    The checkpoint may lack the rows of up to 255 ids, such as PAD: these start as the mean row. (A row of zeros would
    have logit 0, which is far above all others in GPT-2.)

    Raises one InputError that lists missing, unexpected and misshapen arrays by the checkpoint's names, or names one
    with a number that is not finite.
    """
    return _import(arrays, jax.eval_shape(LanguageModel(config).init, jax.random.key(0)), config)


def to_hf(params, config):
    """A LanguageModel's parameters (or their gradients) -> {transformers' name: array}.

    transformers can use them only if it has an architecture of this Config (hf_config.py refuses the others).
    """
    family, arrays = families.of(config), {}
    for path, leaf in flatten_dict(params).items():
        leaf = np.asarray(leaf)
        for name, columns in family.parts(path, config).items():
            arrays[name] = family.to_theirs(path, leaf[..., columns], config)
    return arrays


def scalar_from_hf(arrays, config):
    """The arrays of a ...ForSequenceClassification with one label -> parameters of a ScalarModel."""
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    shapes.pop("unembed", None)
    shapes["score"] = {"embedding": jax.ShapeDtypeStruct((1, config.width), np.float32)}
    arrays = dict(arrays)
    bias = arrays.pop(SCORE_BIAS, np.zeros(1)) if not families.of(config).NORM_BIAS else np.zeros(1)
    trunk = _import(arrays, shapes, config)
    kernel_D = trunk.pop("score")["embedding"][0]
    return {"trunk": trunk, "head": {"kernel": kernel_D, "bias": np.asarray(bias, np.float32).reshape(())}}


def scalar_to_hf(params, config):
    """A ScalarModel's parameters -> the arrays of a ...ForSequenceClassification with one label.

    Their head has no bias. Our bias b moves into the bias of the last layer norm, which only the head w reads:
    w.(y + b w / w.w) = w.y + b, the same score up to rounding. b = 0 changes no bit. InputError if w is 0 and b is not.
    An RMS norm has no bias: b is then an array of its own, SCORE_BIAS, which we read back. transformers ignores it, and
    its scores are ours minus b: the order of completions is the same.
    """
    kernel_D, bias = (np.asarray(params["head"][name], np.float64) for name in ("kernel", "bias"))
    trunk = {**params["trunk"], "score": {"embedding": kernel_D.astype(np.float32)[None]}}
    if bias and not families.of(config).NORM_BIAS:
        return to_hf(trunk, config) | {SCORE_BIAS: np.full(1, bias, np.float32)}
    if bias:
        if not kernel_D.any():
            raise InputError(f"reward head: expected weights other than 0, to export the bias of {bias} with them")
        norm = trunk["ln_f"]
        moved_D = np.asarray(norm["bias"], np.float64) + bias * kernel_D / (kernel_D @ kernel_D)
        trunk["ln_f"] = {**norm, "bias": moved_D.astype(np.float32)}
    return to_hf(trunk, config)


def save(folder, params, config, *, eos_id, pad_id, generation=None, beside=None):
    """Writes a language model as transformers does: model.safetensors, config.json, generation_config.json.

    generation holds more defaults of `generate`; beside, {name: text or JSON value}, holds more files. The folder must
    be new or empty, and is written whole or not at all. Raises InputError. Padded ids are kept (see hf_config.py).
    """
    record = hf_config.language_model(config, eos_id=eos_id, pad_id=pad_id)
    ids = {name: record[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    records = {hf_config.FILE: record, "generation_config.json": ids | (generation or {})}
    write(folder, to_hf(params, config), records | (beside or {}))


def save_scalar(folder, params, config, *, eos_id, pad_id, beside=None):
    """Writes a reward model as transformers does: model.safetensors, config.json; the folder as in `save`."""
    record = hf_config.scalar_model(config, eos_id=eos_id, pad_id=pad_id)
    write(folder, scalar_to_hf(params, config), {hf_config.FILE: record} | (beside or {}))


def _import(arrays, shapes, config):
    shapes = {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}
    arrays, family = _Unwrapped(arrays), families.of(config)
    prefix = hf_layout.unwrapped(family.PREFIX)
    bare = not any(name.startswith(prefix) for name in arrays)  # a trunk saved without a head
    parts = {
        path: {
            hf_layout.unwrapped(name).removeprefix(prefix if bare else ""): columns
            for name, columns in family.parts(path, config).items()
        }
        for path in shapes
    }
    problems = _problems(arrays, parts, shapes, prefix, bare, config)
    if any(problems):
        reasons = "; ".join(listed(messages, "; ") for messages in problems if messages)
        raise InputError(f"{family.TYPE} checkpoint: {reasons}")
    # Largest first: an array is in memory twice while it is copied.
    paths = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
    leaves = {}
    for path in paths:
        leaves[path] = leaf = _aligned(shapes[path])
        for name, columns in parts[path].items():
            _fill(leaf[..., columns], family.to_ours(path, arrays[name], config))
        with np.errstate(invalid="ignore"):
            total = leaf.sum(dtype=np.float64)  # in float64 no sum of float32 numbers overflows
        if not math.isfinite(total):
            bad = {name: leaf[..., columns] for name, columns in parts[path].items()}
            name, part = next((name, part) for name, part in bad.items() if not np.isfinite(part).all())
            count = int(np.sum(~np.isfinite(part)))
            expected = f"expected finite numbers (float32), got {count} of {part.size} that are not"
            raise InputError(f"{family.TYPE} checkpoint: {arrays.as_there(name)}: {expected}")
    return unflatten_dict({path: leaves[path] for path in shapes})


class _Unwrapped(Mapping):
    """Arrays by their names without what wrappers have added. InputError if two have the same."""

    def __init__(self, arrays):
        self._arrays = arrays
        self._names: dict[str, str] = {}  # as they are there, by what they are read as
        for name in arrays:
            first = self._names.setdefault(hf_layout.unwrapped(name), name)
            if first != name:
                raise InputError(f"{first} and {name}: expected one array of this name")

    def __getitem__(self, name):
        return self._arrays[self._names[name]]

    def as_there(self, name):
        """The name that the checkpoint has for it."""
        return self._names[name]

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def _problems(arrays, parts, shapes, prefix, bare, config):
    """What is missing, what is wrong and what is unexpected: three lists of messages."""
    family, missing, wrong = families.of(config), [], []
    for path, names in parts.items():
        for name, columns in names.items():
            if name not in arrays:
                whole = name if bare or path[0] in HEADS or name.startswith(family.PREFIX) else family.PREFIX + name
                missing.append(f"{whole} is missing")
                continue
            ours = np.broadcast_to(np.float32(0), shapes[path])[..., columns]  # takes no memory
            expected, array = family.turned(path, ours).shape, arrays[name]
            if not jax.numpy.issubdtype(array.dtype, np.floating):
                wrong.append(f"{arrays.as_there(name)} is of {array.dtype}, expected floating-point numbers")
            if array.shape != expected and not (path in VOCABULARY and _lacks_rows(array.shape, expected)):
                wrong.append(f"{arrays.as_there(name)} has shape {array.shape}, expected {expected}")
    head, (embedding,) = family.name(("unembed", "embedding")), parts["wte", "embedding"]
    tied, table = {head} if config.tied else set(), arrays.get(embedding)
    if tied & arrays.keys() and (table is None or not np.array_equal(arrays[head], table, equal_nan=True)):
        whole = family.name(("wte", "embedding")) if not bare else embedding
        wrong.append(f"{head} is not tied: expected it absent or equal to {whole}")
    others = sorted(arrays.keys() - {name for names in parts.values() for name in names} - tied)
    others = [name for name in others if not hf_layout.BUFFER.fullmatch(name.removeprefix("" if bare else prefix))]
    return missing, wrong, [f"{arrays.as_there(name)} is unexpected" for name in others]


def _lacks_rows(shape, expected):
    return shape[1:] == expected[1:] and shape != () and 0 < expected[0] - shape[0] < hf_config.PADDING


def _aligned(shape):
    """An empty float32 array, aligned so that JAX uses its memory on a CPU without a second copy."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


def _fill(part, array):
    """Copies an array into a part of ours. Missing rows become the mean row."""
    with np.errstate(over="ignore", invalid="ignore"):  # `_import` refuses inf, which a large float64 becomes, and NaN
        part[: len(array)] = array
        if len(array) < len(part):
            part[len(array) :] = part[: len(array)].mean(axis=0)


def check_folder(folder):
    """Refuses a folder that `save` could not write: one with files in it, or one that cannot be made."""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there == folder and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or an empty folder to write to")
    parent = folder.parent if there == folder else there  # the folder is written beside its place, and then renamed
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "a folder that may not be written" if parent.is_dir() else "not a folder"
        raise InputError(f"{folder}: cannot be written ({parent} is {reason})")


def contiguous(array):
    """The array with its numbers in order, as safetensors writes raw memory; of any device."""
    return np.ascontiguousarray(array)


def write(folder, arrays, records, file=FILE):
    """Writes a new folder, whole or not at all: arrays, and files by name, each a text or a JSON value."""
    check_folder(folder)
    folder = Path(folder).absolute()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by an export that was killed
        unfinished.mkdir(parents=True)
        _write_arrays(unfinished, arrays, file)
        for name, record in records.items():
            text = record if isinstance(record, str) else json.dumps(record, indent=2, sort_keys=True) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error})") from error


def _write_arrays(folder, arrays, file):
    """One file or, of more than SHARD bytes, shards and their index."""
    shards: list[dict] = [{}]
    for name, array in arrays.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + array.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = array
    if len(shards) == 1:
        save_file(arrays, folder / file, metadata={"format": "pt"})
        return
    file_of: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
