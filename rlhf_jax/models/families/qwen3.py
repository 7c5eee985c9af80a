"""Qwen3 (arXiv 2505.09388): Llama with a norm of each query and key, and a head size of its own."""

from rlhf_jax.models.decoder import Config
from rlhf_jax.models.families.family import ANY
from rlhf_jax.models.families.llama import LLAMA, Llama
from rlhf_jax.models.families.qwen2 import QWEN2, Qwen2

QWEN3 = QWEN2 | dict(biases="none", qk_norm=True, head_size=128, context=40_960)


class Qwen3(Qwen2):
    """transformers' qwen3."""

    TYPE, CLASSES = "qwen3", "Qwen3"
    SETTINGS = LLAMA | {"qk_norm": True}
    CHOICES = Llama.CHOICES | {"window": ANY, "biases": ("none", "attention"), "qk_norm": (True,)}
    PRESETS = {
        "qwen3-0.6b": Config(layers=28, heads=16, kv_heads=8, width=1024, feed_forward_size=3072, **QWEN3),
        "qwen3-1.7b": Config(layers=28, heads=16, kv_heads=8, width=2048, feed_forward_size=6144, **QWEN3),
    }

    def own(self, fields):
        """The window, and attention's biases."""
        return super().own(fields) | {"biases": "attention" if fields.flag("attention_bias", False) else "none"}

    def write_own(self, config):
        """The inverse of `own`."""
        return super().write_own(config) | {"attention_bias": config.biases == "attention"}
