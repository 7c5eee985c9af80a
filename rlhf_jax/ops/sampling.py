"""Samples a token from a row of logits. Top-k and top-p are for evaluation and the playground, never for training."""

import jax
import jax.numpy as jnp

from rlhf_jax.ops import logprobs


def top_k(logits_V, k):
    """Sets all logits but the k largest to -inf; k = 0 keeps all. Ties with the k-th stay."""
    if k == 0 or k >= logits_V.shape[-1]:
        return logits_V
    return jnp.where(logits_V < jax.lax.top_k(logits_V, k)[0][-1], -jnp.inf, logits_V)


def top_p(logits_V, p):
    """Keeps the smallest set of most likely tokens whose probability reaches p (0 < p <= 1); other logits become -inf.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751). p = 1 keeps all; the most likely token always stays.
    """
    if p == 1:
        return logits_V
    order = jnp.argsort(-logits_V)
    probs = jax.nn.softmax(logits_V[order])
    keep = jnp.cumsum(probs) - probs < p
    return jnp.where(jnp.zeros_like(keep).at[order].set(keep), logits_V, -jnp.inf)


def keep(logits_V, k, p):
    """`top_k`, then `top_p`, where k and p may be arguments of a compiled function."""
    order_V = jnp.argsort(-logits_V)
    sorted_V = logits_V[order_V]
    least = sorted_V[jnp.clip(k, 1, len(sorted_V)) - 1]
    sorted_V = jnp.where((k > 0) & (sorted_V < least), -jnp.inf, sorted_V)
    probs_V = jax.nn.softmax(sorted_V)
    keep_V = (sorted_V > -jnp.inf) & ((jnp.cumsum(probs_V) - probs_V < p) | (p >= 1))
    return jnp.where(jnp.zeros_like(keep_V).at[order_V].set(keep_V), logits_V, -jnp.inf)


def draw(key, logits_V, *, temperature=1.0, k=0, p=1.0):
    """Samples a token from softmax(logits / temperature) after top-k, then top-p: (token, logp).

    logp, in nats, is under the distribution sampled from; with k = 0 and p = 1 it is what the learner computes.
    temperature = 0 takes the most likely token, and its logp is at temperature 1.
    """
    if temperature == 0:
        token = jnp.argmax(logits_V).astype(jnp.int32)
        return token, logprobs.gather(logits_V, token)
    kept_V = top_p(top_k(logprobs.scale(logits_V, temperature), k), p)
    token = jax.random.categorical(key, kept_V).astype(jnp.int32)
    return token, logprobs.gather(kept_V, token)
