"""What wrappers and old versions add to the names of a checkpoint's arrays; the names are in families/."""

import re

# Parts that wrappers of a model add to its names: torch.compile, DistributedDataParallel and DataParallel, FSDP,
# activation checkpointing, and trainers that keep the model in a field of their own.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}

# Constants in old checkpoints: the causal mask, and the frequencies of rotary positions.
BUFFER = re.compile(r"(h|layers)\.\d+\.(attn|attention|self_attn)\.((masked_)?bias|rotary_emb\.inv_freq)")


def unwrapped(name):
    """transformers' name of an array, without what WRAPPERS have added; Llama's own `model.` goes, too."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
