"""Adapters as a folder that peft loads onto a model of transformers: adapter_config.json, adapter_model.safetensors.

Ours stand on one product where transformers may have several matrices, such as queries, keys and values. Theirs then
have the same A, and the columns of B that are their own: the same function exactly.
"""

from flax.traverse_util import flatten_dict

from rlhf_jax.models import families, hf

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"


def save(folder, adapters, model, lora, *, base, beside=None):
    """Writes a policy's adapters; the folder must be new or empty. Raises InputError.

    model and lora are Configs; base is where transformers finds the base; beside holds more files, as in hf.save.
    """
    hf.write(folder, to_peft(adapters, model), {CONFIG: record(adapters, model, lora, base)} | (beside or {}), FILE)


def to_peft(adapters, model):
    """Adapters -> {peft's name: array}: lora_A [rank, in] and lora_B [out, rank] of each matrix."""
    family, parts, arrays = families.of(model), flatten_dict(adapters), {}
    for (*path, name), b in parts.items():
        if name != "b":
            continue
        kernel = (*path, "kernel")
        for theirs, columns in family.parts(kernel, model).items():
            module = f"base_model.model.{theirs.removesuffix('.weight')}"
            arrays[f"{module}.lora_A.weight"] = hf.contiguous(parts[(*path, "a")].T)
            turned = family.to_theirs(kernel, b[:, columns], model)
            arrays[f"{module}.lora_B.weight"] = hf.contiguous(turned if family.ROWS else turned.T)
    return arrays


def record(adapters, model, lora, base):
    """adapter_config.json, as a dict."""
    family = families.of(model)
    kernels = {(*path, "kernel") for (*path, _) in flatten_dict(adapters)}
    names = {name for kernel in kernels for name in family.parts(kernel, model)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not family.ROWS,
        "inference_mode": True,
        "target_modules": sorted({".".join(name.rsplit(".", 3)[1:3]) for name in names}),  # such as mlp.up_proj
    }
