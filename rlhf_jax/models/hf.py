"""Hugging Face GPT-2 weights <-> our parameter tree. Arrays only: neither torch nor transformers is needed.

GPT-2 stores its dense kernels as Flax does, [in, out] (transformers' Conv1D), with queries, keys and values side by
side in one [D, 3HK]: names change, numbers do not.
"""

import re

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rlhf_jax.errors import InputError
from rlhf_jax.models.heads import LanguageModel

PREFIX = "transformer."  # what a language model saved by transformers calls its trunk; a bare trunk has no prefix
HEAD = "lm_head.weight"  # absent, or a copy of the token embedding it is tied to
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants that old checkpoints carry

OUR_WORD = {
    "qkv": "c_attn",
    "out": "c_proj",
    "fc": "c_fc",
    "proj": "c_proj",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}


def read(path):
    """The arrays of a safetensors file, by name."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected a readable safetensors file: {error}") from error


def from_hf(arrays, config):
    """A checkpoint's arrays -> GPT-2 parameters of the config's sizes, as float32.

    Missing, unexpected and misshapen arrays are one InputError that lists them all by the checkpoint's names.
    """
    prefix = PREFIX if any(name.startswith(PREFIX) for name in arrays) else ""
    init = LanguageModel(config).init
    shapes = {path: leaf.shape for path, leaf in flatten_dict(jax.eval_shape(init, jax.random.key(0))).items()}
    names = {path: prefix + _name(path) for path in shapes}
    if problems := list(_problems(arrays, {names[path]: shape for path, shape in shapes.items()}, prefix)):
        raise InputError(f"GPT-2 checkpoint: {'; '.join(problems)}")
    return unflatten_dict({path: np.asarray(arrays[name], np.float32) for path, name in names.items()})


def to_hf(params):
    """GPT-2 parameters (or their gradients) -> arrays by the names that transformers saves a language model under.

    transformers can use them where heads * head_size is the width.
    """
    return {PREFIX + _name(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}


def _name(path):
    """("h_0", "attn", "qkv", "kernel") -> "h.0.attn.c_attn.weight"."""
    return ".".join([path[0].replace("h_", "h."), *(OUR_WORD.get(word, word) for word in path[1:])])


def _problems(arrays, expected_shapes, prefix):
    for name, shape in expected_shapes.items():
        if name not in arrays:
            yield f"{name} is missing"
        elif arrays[name].shape != shape:
            yield f"{name} has shape {arrays[name].shape}, expected {shape}"
    for name in arrays:
        if name not in expected_shapes and name != HEAD and not CAUSAL_MASK.fullmatch(name.removeprefix(prefix)):
            yield f"{name} is unexpected"
    if HEAD in arrays and not np.array_equal(arrays[HEAD], arrays.get(f"{prefix}wte.weight")):
        yield f"{HEAD} is not tied: expected it absent or equal to {prefix}wte.weight"
