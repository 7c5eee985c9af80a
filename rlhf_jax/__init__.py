"""RLHF for language models as pure functions in JAX.

    supervised fine-tuning -> reward model -> PPO -> evaluate

Array names end in one letter an axis (Shazeer suffixes); a scalar or a pytree has none:

    B batch      P prompt     R response    T = P + R tokens    S cache slots
    V vocabulary D model      F feed-forward
    H heads      K head size  N layers (in data/: rows of a data set)

Prompts are left-padded and responses right-padded, so every prompt ends at column P - 1 and the response is
always the last R columns. Entry i of a `_BR` array belongs to response token i; `values_BR[b, i]` is the value
*before* it. `mask_BR` is 1 on response tokens, EOS included, and 0 after.
"""
