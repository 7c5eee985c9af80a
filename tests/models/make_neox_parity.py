"""Makes tests/models/neox_parity/ and neox_sequential_parity/, as make_gpt2_parity.py beside this file makes its own.

    parity/bin/python tests/models/make_neox_parity.py

The first has the settings of Pythia. The second differs in all that can be set, and is tied.
In both more than two entries of a head are turned: with two, a half and every other one would be the same.
"""

from pathlib import Path

from make_gpt2_parity import OF_BOTH, spread, write
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

SIZES = dict(max_position_embeddings=32, num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
SIZES |= dict(intermediate_size=128, attn_implementation="sdpa")  # "eager" gives NaN where a row begins with padding


def tiny_neox(seed, **fields):
    """Two layers of width 32. The seed is one whose greedy continuation has no near ties."""
    return spread(GPTNeoXForCausalLM(GPTNeoXConfig(**OF_BOTH, **SIZES, **fields)), seed)


if __name__ == "__main__":
    write(tiny_neox(4, rotary_pct=0.25), Path(__file__).with_name("neox_parity"))
    sequential = dict(rotary_pct=0.5, rotary_emb_base=100, layer_norm_eps=1e-3, hidden_act="gelu_new")
    sequential |= dict(use_parallel_residual=False, tie_word_embeddings=True)
    write(tiny_neox(32, **sequential), Path(__file__).with_name("neox_sequential_parity"))
