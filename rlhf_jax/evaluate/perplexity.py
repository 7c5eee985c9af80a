"""How well a language model predicts held-out text."""

import numpy as np

from rlhf_jax.errors import InputError


def nll(logp_BT, mask_BT):
    """Each row's summed negative log-probability and token count, over real tokens only: (nats_B, tokens_B).

    Padding is ignored, even if its log-probs are -inf or NaN.
    """
    mask_BT = np.asarray(mask_BT, bool)
    return -np.where(mask_BT, logp_BT, 0.0).sum(axis=-1, dtype=np.float64), mask_BT.sum(axis=-1)


def perplexity(nats_N, tokens_N):
    """Yields ("loss", nats per token) and ("perplexity", exp of it), from summed nats and token counts.

    An entry is a row or a whole batch. Every token weighs the same, so batching and padding change nothing.
    A model that guesses uniformly has a perplexity of the vocabulary's size; a perfect model has 1.
    Raises InputError if there is no token.
    """
    tokens = np.sum(tokens_N)
    if tokens == 0:
        raise InputError("perplexity: expected at least one token to predict, got none")
    loss = np.sum(nats_N, dtype=np.float64) / tokens
    yield "loss", float(loss)
    yield "perplexity", float(np.exp(loss))
