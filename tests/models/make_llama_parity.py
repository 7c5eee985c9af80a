"""Makes tests/models/llama_parity/, mistral_parity/, qwen2_parity/ and qwen3_parity/, as make_gpt2_parity.py its own.

    parity/bin/python tests/models/make_llama_parity.py

In all of them two heads of queries read one of keys and values. Llama is untied, with Llama 3.1's rotary scaling and
biases; Mistral has a window of 5 tokens; Qwen3 has heads whose sizes do not add up to the width.
"""

from pathlib import Path

import transformers
from make_gpt2_parity import OF_BOTH, spread, write

SIZES = dict(num_hidden_layers=2, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=32, attn_implementation="sdpa")
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=1000.0)
LLAMA3 |= dict(original_max_position_embeddings=16)
FAMILIES = {  # the seed of each is one whose greedy continuation has no near ties
    "llama": ("Llama", 0, dict(head_dim=6, rope_parameters=LLAMA3, attention_bias=True, rms_norm_eps=1e-5)),
    "mistral": ("Mistral", 1, dict(head_dim=6, sliding_window=5)),
    "qwen2": ("Qwen2", 1, dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", 1, dict(head_dim=8, tie_word_embeddings=True)),
}


def tiny(name):
    """The model of a family with random weights."""
    classes, seed, fields = FAMILIES[name]
    config = getattr(transformers, f"{classes}Config")(**OF_BOTH, **SIZES, **fields)
    return spread(getattr(transformers, f"{classes}ForCausalLM")(config), seed)


if __name__ == "__main__":
    for name in FAMILIES:
        write(tiny(name), Path(__file__).with_name(f"{name}_parity"))
