"""Names and layouts of our arrays in transformers.

GPT-2 stores its dense kernels as Flax does, [in, out] (transformers' Conv1D), with queries, keys and values side by
side in one [D, 3HK]: only the names change. GPT-NeoX stores them as [out, in] (PyTorch's Linear), and groups queries,
keys and values by head: the first 3K of the 3HK outputs are head 0's.
"""

import re

import numpy as np

GPT2 = {"h": "h", "qkv": "c_attn", "out": "c_proj", "fc": "c_fc", "proj": "c_proj", "unembed": "lm_head"}
NEOX = {
    "wte": "embed_in",
    "h": "layers",
    "ln_1": "input_layernorm",
    "attn": "attention",
    "qkv": "query_key_value",
    "out": "dense",
    "ln_2": "post_attention_layernorm",
    "fc": "dense_h_to_4h",
    "proj": "dense_4h_to_h",
    "ln_f": "final_layer_norm",
    "unembed": "embed_out",
}
WORDS = {"gpt2": GPT2, "gpt_neox": NEOX}
PREFIX = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # of the trunk's names in a model with a head
HEADS = ("unembed", "score")  # arrays outside the trunk
# Parts that wrappers of a model add to its names: torch.compile, DistributedDataParallel and DataParallel, FSDP,
# activation checkpointing, and trainers that keep the model in a field of their own.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}

# Constants in old checkpoints: the causal mask, and the frequencies of rotary positions.
BUFFER = re.compile(r"(h|layers)\.\d+\.(attn|attention)\.((masked_)?bias|rotary_emb\.inv_freq)")


def model_type(config):
    """transformers' name of the architecture: gpt_neox if positions are rotary, else gpt2."""
    return "gpt_neox" if config.rotary_share else "gpt2"


def unwrapped(name):
    """transformers' name of an array, without what WRAPPERS have added."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def name(path, config):
    """("h_0", "attn", "qkv", "kernel") -> "transformer.h.0.attn.c_attn.weight"."""
    words = WORDS[model_type(config)] | dict.fromkeys(("kernel", "scale", "embedding"), "weight")
    prefix = "" if path[0] in HEADS else PREFIX[model_type(config)]
    layer, *number = path[0].split("_") if path[0].startswith("h_") else [path[0]]
    return prefix + ".".join(words.get(word, word) for word in (layer, *number, *path[1:]))


def shape(path, ours, config):
    """The shape in transformers of an array that has the shape `ours` in our tree."""
    return ours[::-1] if path[-1] == "kernel" and model_type(config) == "gpt_neox" else ours


def to_ours(path, array, config):
    """An array of transformers in our layout; a view where possible."""
    if model_type(config) == "gpt2":
        return array
    if path[-2] == "qkv":
        array = array.reshape(config.heads, 3, config.head_size, *array.shape[1:]).swapaxes(0, 1)
        array = array.reshape(-1, *array.shape[3:])
    return array.T if path[-1] == "kernel" else array


def to_theirs(path, array, config):
    """Our array in the layout of transformers: the inverse of to_ours."""
    if model_type(config) == "gpt2":
        return array
    array = array.T if path[-1] == "kernel" else array
    if path[-2] == "qkv":
        array = array.reshape(3, config.heads, config.head_size, *array.shape[1:]).swapaxes(0, 1)
        array = array.reshape(-1, *array.shape[3:])
    return np.ascontiguousarray(array)  # safetensors writes the raw memory and ignores strides
