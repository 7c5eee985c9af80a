"""Llama (Touvron et al. 2023, arXiv 2307.09288; 3: arXiv 2407.21783); SmolLM2 and TinyLlama are ones.

Kernels are [out, in]; queries, keys and values are three arrays, and the feed-forward gate and what it gates are two.
"""

from typing import Any

from rlhf_jax.models.decoder import Config
from rlhf_jax.models.families.family import ANY, Family

NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "width": "hidden_size",
    "context": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
LLAMA: dict[str, Any] = dict(norm="rms", feed_forward="swiglu", biases="none", rotary_share=1.0, tied=False)
SMOLLM2 = LLAMA | dict(context=8192, rotary_base=100_000.0, tied=True)
LLAMA3 = LLAMA | dict(context=8192, rotary_base=500_000.0)
LLAMA3_2 = LLAMA3 | dict(context=131_072, rotary_factor=32.0, tied=True)
SCALING = {  # our field: theirs, and the type of its value
    "rotary_factor": ("factor", float),
    "rotary_context": ("original_max_position_embeddings", int),
    "rotary_slow": ("low_freq_factor", float),
    "rotary_fast": ("high_freq_factor", float),
}


class Llama(Family):
    """transformers' llama."""

    TYPE, CLASSES, PREFIX, HEAD_SIZE, NORM_BIAS = "llama", "Llama", "model.", True, False
    SETTINGS = LLAMA
    CHOICES = {name: (value,) for name, value in LLAMA.items() if name != "tied"}
    CHOICES |= {"kv_heads": ANY, "feed_forward_size": ANY, "rotary_factor": ANY}
    CHOICES |= {"biases": ("none", "attention", "all")}
    WORDS = {
        "wte": "embed_tokens",
        "h": "layers",
        "ln_1": "input_layernorm",
        "attn": "self_attn",
        "out": "o_proj",
        "ln_2": "post_attention_layernorm",
        "proj": "down_proj",
        "ln_f": "norm",
        "unembed": "lm_head",
    }
    PRESETS = {
        "smollm2-135m": Config(layers=30, heads=9, kv_heads=3, width=576, feed_forward_size=1536, **SMOLLM2),
        "smollm2-360m": Config(layers=32, heads=15, kv_heads=5, width=960, feed_forward_size=2560, **SMOLLM2),
        "smollm2-1.7b": Config(
            layers=24, heads=32, width=2048, feed_forward_size=8192, **SMOLLM2 | {"rotary_base": 130_000.0}
        ),
        "tinyllama-1.1b": Config(
            layers=22, heads=32, kv_heads=4, width=2048, feed_forward_size=5632, context=2048, **LLAMA
        ),
        "llama-2-7b": Config(
            layers=32, heads=32, head_size=128, width=4096, feed_forward_size=11_008, context=4096, **LLAMA
        ),
        "llama-3-8b": Config(
            layers=32, heads=32, kv_heads=8, head_size=128, width=4096, feed_forward_size=14_336, **LLAMA3
        ),
        "llama-3.2-1b": Config(layers=16, heads=32, kv_heads=8, width=2048, feed_forward_size=8192, **LLAMA3_2),
        "llama-3.2-3b": Config(
            layers=28, heads=24, kv_heads=8, head_size=128, width=3072, feed_forward_size=8192, **LLAMA3_2
        ),
    }

    def read(self, fields):
        """Sizes, rotary positions, and where biases are."""
        fields.fixed("hidden_act", "silu")
        heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
        usual = width // heads if width % heads == 0 else None
        kv_heads = fields.size("num_key_value_heads", heads)
        fields.expect(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        size = fields.size("intermediate_size")
        return self.config(
            fields,
            NAMES,
            1e-6,
            **self.SETTINGS
            | {
                "head_size": fields.size("head_dim", usual),
                "kv_heads": 0 if kv_heads == heads else kv_heads,
                "feed_forward_size": 0 if size == 4 * width else size,
                "tied": fields.flag("tie_word_embeddings", False),
            }
            | self.rotary(fields)
            | self.own(fields),
        )

    def rotary(self, fields):
        """The Config's fields of rotary positions."""
        rope = fields.rope(rope_theta=fields.record.get("rope_theta", 10_000.0))
        for name in ("rope_type", "type"):
            rope.fixed(name, "default", "llama3")
        rope.fixed("partial_rotary_factor", 1.0)
        read = {"rotary_share": 1.0, "rotary_base": rope.number("rope_theta")}
        if "llama3" in (rope.record.get("rope_type"), rope.record.get("type")):
            read |= {ours: kind(rope.number(theirs)) for ours, (theirs, kind) in SCALING.items()}
            rope.expect(read["rotary_factor"] >= 1, "factor", "at least 1")
            rope.expect(read["rotary_fast"] > read["rotary_slow"], "high_freq_factor", "more than low_freq_factor")
        return read

    def own(self, fields):
        """The Config's fields that the architectures like Llama do not share."""
        attention, feed_forward = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
        fields.expect(attention or not feed_forward, "mlp_bias", "false where attention_bias is")
        return {"biases": "all" if feed_forward else "attention" if attention else "none"}

    def write(self, config):
        """Rotary positions as transformers 4 and 5 read them."""
        scaling = {theirs: getattr(config, ours) for ours, (theirs, _) in SCALING.items()}
        return {theirs: getattr(config, ours) for ours, theirs in NAMES.items()} | {
            "hidden_act": "silu",
            "head_dim": config.head_size,
            "num_key_value_heads": config.cached_heads,
            "intermediate_size": config.hidden_size,
            "rope_theta": config.rotary_base,
            "rope_scaling": None if config.rotary_factor == 1 else {"rope_type": "llama3"} | scaling,
            **self.write_own(config),
        }

    def write_own(self, config):
        """The inverse of `own`."""
        return {"attention_bias": config.biases != "none", "mlp_bias": config.biases == "all"}

    def parts(self, path, config):
        """Where our array holds several of theirs, side by side."""
        if path[-2] == "qkv":
            q, k = config.heads * config.head_size, config.cached_heads * config.head_size
            columns = {"q_proj": slice(q), "k_proj": slice(q, q + k), "v_proj": slice(q + k, q + 2 * k)}
        elif path[-2] == "fc":
            size = config.hidden_size
            columns = {"gate_proj": slice(size), "up_proj": slice(size, 2 * size)}
        else:
            return super().parts(path, config)
        return {self.name((*path[:-2], name, path[-1])): each for name, each in columns.items()}
