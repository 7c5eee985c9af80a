"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases of queries, keys and values."""

from typing import Any

from rlhf_jax.models.decoder import Config
from rlhf_jax.models.families.family import ANY
from rlhf_jax.models.families.llama import LLAMA, Llama

VOCABULARY = 151_936  # rows of the tables; the tokenizers have fewer ids
QWEN2: dict[str, Any] = LLAMA | dict(
    biases="qkv", context=32_768, rotary_base=1e6, norm_eps=1e-6, tied=True, vocab_size=VOCABULARY
)


class Qwen2(Llama):
    """transformers' qwen2."""

    TYPE, CLASSES = "qwen2", "Qwen2"
    SETTINGS = LLAMA | {"biases": "qkv"}
    CHOICES = Llama.CHOICES | {"window": ANY, "biases": ("qkv",)}
    PRESETS = {
        "qwen2.5-0.5b": Config(layers=24, heads=14, kv_heads=2, width=896, feed_forward_size=4864, **QWEN2),
        "qwen2.5-1.5b": Config(
            layers=28, heads=12, kv_heads=2, head_size=128, width=1536, feed_forward_size=8960, **QWEN2
        ),
    }

    def own(self, fields):
        """The window, where all layers have it."""
        return {"window": _window(fields, fields.size("num_hidden_layers"))}

    def write_own(self, config):
        """The inverse of `own`."""
        return _write_window(config)


def _window(fields, layers):
    """The window of every layer, or 0."""
    if not fields.flag("use_sliding_window", False):
        return 0
    first, kinds = fields.record.get("max_window_layers", 28), fields.record.get("layer_types")
    if kinds is not None:
        fields.fixed("layer_types", ["sliding_attention"] * layers)
    else:
        fields.expect(first == 0, "max_window_layers", "0 where use_sliding_window is true")
    return fields.size("sliding_window", 4096)


def _write_window(config):
    window = {"sliding_window": config.window, "max_window_layers": 0} if config.window else {"sliding_window": None}
    return window | {"use_sliding_window": config.window > 0}
