"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama with a sliding window."""

from typing import Any

from rlhf_jax.models.decoder import Config
from rlhf_jax.models.families.family import ANY
from rlhf_jax.models.families.llama import LLAMA, Llama

SIZES: dict[str, Any] = dict(layers=32, heads=32, kv_heads=8, head_size=128, width=4096, context=32_768)
SIZES |= LLAMA | {"feed_forward_size": 14_336}


class Mistral(Llama):
    """transformers' mistral."""

    TYPE, CLASSES = "mistral", "Mistral"
    CHOICES = Llama.CHOICES | {"window": ANY, "biases": ("none",)}
    PRESETS = {
        "mistral-7b-v0.1": Config(**SIZES, window=4096),
        "mistral-7b-v0.3": Config(**SIZES, rotary_base=1e6),  # another vocabulary, no window
    }

    def own(self, fields):
        """The window: null is none."""
        window = fields.record.get("sliding_window", 4096)
        return {"window": 0 if window is None else fields.size("sliding_window", 4096)}

    def write_own(self, config):
        """The inverse of `own`."""
        return {"sliding_window": config.window or None}
