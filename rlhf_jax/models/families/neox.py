"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745); Pythia is one.

Kernels are [out, in]. Queries, keys and values are grouped by head: the first 3K of the 3HK outputs are head 0's.
"""

from typing import Any

import numpy as np

from rlhf_jax.models.decoder import Config
from rlhf_jax.models.families.family import ANY, Family
from rlhf_jax.models.families.gpt2 import GELU

NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "width": "hidden_size",
    "context": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_eps",
    "init_std": "initializer_range",
}
EVEN = "a share of the head that is an even number of its entries, 2 or more"
NEOX: dict[str, Any] = dict(context=2048, rotary_share=0.25, parallel_residual=True, exact_gelu=True, tied=False)


class NeoX(Family):
    """transformers' gpt_neox."""

    TYPE, CLASSES, PREFIX = "gpt_neox", "GPTNeoX", "gpt_neox."
    SETTINGS = NEOX
    CHOICES = {"feed_forward_size": ANY, "parallel_residual": ANY, "rotary_share": ANY}
    WORDS = {
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
    PRESETS = {
        "pythia-160m": Config(layers=12, heads=12, width=768, **NEOX),
        "pythia-410m": Config(layers=24, heads=16, width=1024, **NEOX),
        "pythia-1b": Config(layers=16, heads=8, head_size=256, width=2048, **NEOX),
    }

    def refuses(self, config):
        """A rotary share is needed, too."""
        if not config.rotary_share:
            yield "rotary_share", f"more than 0 ({self.TYPE} of transformers)"
        yield from super().refuses(config)

    def read(self, fields):
        """Rotary positions have their own names; transformers 5 writes one object in place of two fields."""
        fields.fixed("attention_bias", True)
        usual = 4 * fields.size("hidden_size")
        size = fields.size("intermediate_size", usual)
        rope = fields.rope(
            rope_theta=fields.record.get("rotary_emb_base", 10_000),
            partial_rotary_factor=fields.record.get("rotary_pct", 0.25),
        )
        rope.fixed("rope_type", "default")
        rope.fixed("type", "default")
        config = self.config(
            fields,
            NAMES,
            1e-5,
            feed_forward_size=0 if size == usual else size,
            rotary_share=rope.number("partial_rotary_factor"),
            rotary_base=rope.number("rope_theta"),
            parallel_residual=fields.flag("use_parallel_residual", True),
            exact_gelu=GELU.get(fields.one_of("hidden_act", *GELU, default="gelu")),
            tied=fields.flag("tie_word_embeddings", False),
        )
        rotated = int(config.head_size * config.rotary_share)
        rope.expect(0 < rotated <= config.head_size and rotated % 2 == 0, "partial_rotary_factor", EVEN)
        return config

    def write(self, config):
        """Rotary positions as transformers 4 and 5 read them."""
        return {theirs: getattr(config, ours) for ours, theirs in NAMES.items()} | {
            "hidden_act": "gelu" if config.exact_gelu else "gelu_new",
            "hidden_dropout": config.dropout,
            "intermediate_size": config.hidden_size,
            "rotary_pct": config.rotary_share,
            "rotary_emb_base": config.rotary_base,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": True,
        }

    def to_ours(self, path, array, config):
        """Rows by head -> all queries, all keys, all values."""
        if path[-2] == "qkv":
            array = array.reshape(config.heads, 3, config.head_size, *array.shape[1:]).swapaxes(0, 1)
            array = array.reshape(-1, *array.shape[3:])
        return super().to_ours(path, array, config)

    def to_theirs(self, path, array, config):
        """The inverse."""
        array = super().to_theirs(path, array, config)
        if path[-2] == "qkv":
            array = array.reshape(3, config.heads, config.head_size, *array.shape[1:]).swapaxes(0, 1)
            array = array.reshape(-1, *array.shape[3:])
        return np.ascontiguousarray(array)
