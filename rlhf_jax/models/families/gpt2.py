"""GPT-2 (Radford et al. 2019). Kernels are [in, out] as ours, with queries, keys and values side by side."""

from rlhf_jax.models.decoder import Config
from rlhf_jax.models.families.family import ANY, Family

NAMES = {
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
    "context": "n_positions",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "init_std": "initializer_range",
}
GELU = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu": True}  # whether an activation is the exact GELU


class GPT2(Family):
    """transformers' gpt2."""

    TYPE, CLASSES, PREFIX, ROWS = "gpt2", "GPT2", "transformer.", False
    CHOICES = {"feed_forward_size": ANY}
    WORDS = {"h": "h", "qkv": "c_attn", "out": "c_proj", "fc": "c_fc", "proj": "c_proj", "unembed": "lm_head"}
    PRESETS = {
        "nano": Config(layers=3, heads=3, head_size=16, width=48),
        "micro": Config(layers=4, heads=3, head_size=48, width=128),  # the article's; 128 / 3 is no whole number
        "mini": Config(layers=6, heads=6, head_size=32, width=192),
        "gpt2": Config(layers=12, heads=12, width=768),
        "gpt2-medium": Config(layers=24, heads=16, width=1024),
        "gpt2-large": Config(layers=36, heads=20, width=1280),
        "gpt2-xl": Config(layers=48, heads=25, width=1600),
    }

    @property
    def architectures(self):
        """The language model's class has a name of its own."""
        return super().architectures | {"language_model": "GPT2LMHeadModel"}

    def read(self, fields):
        """What is fixed: attention's scale, and no cross-attention."""
        fields.fixed("scale_attn_weights", True)
        fields.fixed("scale_attn_by_inverse_layer_idx", False)
        fields.fixed("add_cross_attention", False)
        usual = 4 * fields.size("n_embd")
        size = fields.size("n_inner", usual)
        return self.config(
            fields,
            NAMES,
            1e-5,
            feed_forward_size=0 if size == usual else size,
            exact_gelu=GELU.get(fields.one_of("activation_function", *GELU, default="gelu_new")),
            tied=fields.flag("tie_word_embeddings", True),
        )

    def write(self, config):
        """Dropout is that of training here, which leaves attention's out."""
        return {theirs: getattr(config, ours) for ours, theirs in NAMES.items()} | {
            "activation_function": "gelu" if config.exact_gelu else "gelu_new",
            "n_inner": config.feed_forward_size or None,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
