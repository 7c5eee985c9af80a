"""Importance weights of a rollout that the policy has moved away from: w = pi_new(y) / pi_old(y)."""

import jax.numpy as jnp

from rlhf_jax.ops import masked


def effective_sample_size(log_weight, mask=None):
    """(sum w)^2 / (n sum w^2), in (0, 1]: the share of the n samples that the weights leave (Kish 1965).

    log_weight has any shape; entries where mask is 0 are not samples. 1 where all weights are equal, 1/n where one
    has all the weight. Weights are taken relative to the largest, so none overflows.
    """
    mask = jnp.ones_like(log_weight, bool) if mask is None else mask
    log_weight = jnp.where(mask, log_weight, -jnp.inf)
    weight = jnp.exp(log_weight - jnp.maximum(jnp.max(log_weight), jnp.finfo(log_weight.dtype).min))
    count = jnp.sum(mask, dtype=log_weight.dtype)
    return jnp.square(jnp.sum(weight)) / jnp.maximum(count * jnp.sum(jnp.square(weight)), jnp.finfo(weight.dtype).tiny)


def statistics(logp_BR, logp_old_BR, mask_BR):
    """How far a policy is from its rollout, without gradient: {name: scalar}.

    ratio_max: the largest token weight. ess_token: effective sample size of token weights, which is what a per-token
    surrogate uses. ess: that of whole responses, whose weight is the product of their tokens' weights.
    """
    log_ratio_BR = jnp.where(mask_BR, logp_BR - logp_old_BR, 0)
    return {
        "ratio_max": jnp.max(jnp.where(mask_BR, jnp.exp(log_ratio_BR), 0)),
        "ess_token": effective_sample_size(log_ratio_BR, mask_BR),
        "ess": effective_sample_size(masked.sum(log_ratio_BR, mask_BR, axis=1)),
    }
