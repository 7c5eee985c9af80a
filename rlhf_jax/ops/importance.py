"""Importance weights w = pi_new(y) / pi_old(y) of a rollout whose policy has changed since."""

import jax.numpy as jnp

from rlhf_jax.ops import masked


def effective_sample_size(log_weight, mask=None):
    """(sum w)^2 / (n sum w^2), in (0, 1]: the effective share of the n samples (Kish 1965).

    log_weight has any shape; entries with mask 0 are not samples. Equal weights give 1; one weight that dwarfs all
    others gives 1/n; an empty mask gives 0. Weights are taken relative to the largest, so none overflows.
    """
    mask = jnp.ones_like(log_weight, bool) if mask is None else mask
    log_weight = jnp.where(mask, log_weight, -jnp.inf)
    weight = jnp.exp(log_weight - jnp.maximum(jnp.max(log_weight), jnp.finfo(log_weight.dtype).min))
    count = jnp.sum(mask, dtype=log_weight.dtype)
    return jnp.square(jnp.sum(weight)) / jnp.maximum(count * jnp.sum(jnp.square(weight)), jnp.finfo(weight.dtype).tiny)


def statistics(logp_BR, logp_old_BR, mask_BR):
    """How far the policy has moved since its rollout: {name: scalar}, for metrics only.

    ratio_max: the largest token weight. ess_token: effective sample size of the token weights, which a per-token
    surrogate uses. ess: effective sample size of the responses; a response's weight is the product of its tokens'.
    """
    log_ratio_BR = jnp.where(mask_BR, logp_BR - logp_old_BR, 0)
    return {
        "ratio_max": jnp.max(jnp.where(mask_BR, jnp.exp(log_ratio_BR), 0)),
        "ess_token": effective_sample_size(log_ratio_BR, mask_BR),
        "ess": effective_sample_size(masked.sum(log_ratio_BR, mask_BR, axis=1)),
    }
