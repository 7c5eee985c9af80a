"""Estimators of KL(policy || reference) per token, in nats (Schulman 2020, "Approximating KL divergence").

k1, k2 and k3 take log-probs, at the sampling temperature, of tokens that the policy sampled.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.ops import logprobs

LARGEST_ERROR = 0.2  # of the controller, relative to its target


def k1(logp, logp_ref):
    """log p - log q: unbiased, of either sign. The reward's KL penalty uses it."""
    return logp - logp_ref


def k2(logp, logp_ref):
    """(log p - log q)^2 / 2: biased, >= 0."""
    return jnp.square(k1(logp, logp_ref)) / 2


def k3(logp, logp_ref):
    """q/p - 1 - log(q/p): unbiased, >= 0, low variance."""
    log_ratio = -k1(logp, logp_ref)
    return jnp.expm1(log_ratio) - log_ratio


def exact(logits_TV, logits_ref_TV, *, temperature=1.0):
    """KL(p || q) of the full distributions, sum_v p_v (log p_v - log q_v), >= 0, shape [..., T].

    Each term is computed as q - p - p log(q/p): the sum is the same, and no term is negative. Near p = q the term is
    p (expm1(d) - d) with d = log(q/p), so that equal models give exactly 0 and not a rounding error.
    """
    logp_TV = jax.nn.log_softmax(logprobs.scale(logits_TV, temperature), axis=-1)
    logq_TV = jax.nn.log_softmax(logprobs.scale(logits_ref_TV, temperature), axis=-1)
    p_TV = jnp.exp(logp_TV)
    d_TV = logq_TV - logp_TV
    near_TV = p_TV * (jnp.expm1(jnp.clip(d_TV, -1, 1)) - d_TV)
    far_TV = jnp.exp(logq_TV) - p_TV - p_TV * d_TV
    return jnp.sum(jnp.maximum(jnp.where(jnp.abs(d_TV) < 1, near_TV, far_TV), 0), axis=-1)


def adapt(kl_coef, sequence_kl, *, target, horizon, episodes):
    """The KL coefficient after `episodes` with a mean KL of sequence_kl nats: a proportional controller in log space.

        error = clip(KL / target - 1, -0.2, 0.2)        kl_coef <- kl_coef max(1 + error episodes / horizon, 0)

    (arXiv 1909.08593, sec. 2.2.) A target of 0 keeps the coefficient fixed. The factor is positive where
    horizon > 0.2 episodes; the maximum keeps the coefficient >= 0 for any horizon.
    """
    if not target:
        return kl_coef
    error = jnp.clip(sequence_kl / target - 1, -LARGEST_ERROR, LARGEST_ERROR)
    return kl_coef * jnp.maximum(1 + error * episodes / horizon, 0)
