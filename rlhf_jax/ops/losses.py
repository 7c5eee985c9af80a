"""Losses to minimize: masked means over tokens, or one number per pair."""

import jax
import jax.numpy as jnp

from rlhf_jax.ops import masked


def cross_entropy(logp, mask):
    """Mean of -log p over the tokens under the mask, in nats per token."""
    return -masked.mean(logp, mask)


def bradley_terry(chosen_B, rejected_B):
    """-log sigmoid(chosen - rejected) for each pair (Bradley-Terry; arXiv 2009.01325, eq. 1), >= 0."""
    return -jax.nn.log_sigmoid(chosen_B - rejected_B)


SMOOTHED = ("sigmoid", "robust")
DPO = (*SMOOTHED, "ipo", "hinge")


def dpo(chosen_B, rejected_B, chosen_ref_B, rejected_ref_B, *, beta, kind="sigmoid", smoothing=0.0):
    """Direct preference optimization: one loss a pair, from log-probs of whole completions (sums or means of tokens).

        h = (chosen - chosen_ref) - (rejected - rejected_ref)        L(x) = -log sigmoid(x)

        sigmoid   (1 - e) L(beta h) + e L(-beta h)                   Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with
                                                                     e = smoothing > 0 conservative (Mitchell 2023)
        robust    ((1 - e) L(beta h) - e L(-beta h)) / (1 - 2 e)     Chowdhury et al. 2024, arXiv 2403.00409, eq. 9:
                                                                     unbiased where a share e of the pairs is swapped
        ipo       (h - 1 / (2 beta))^2                               Azar et al. 2023, arXiv 2310.12036, eq. 17
        hinge     max(0, 1 - beta h)                                 SLiC-HF, Zhao et al. 2023, arXiv 2305.10425

    beta > 0, 0 <= smoothing < 1/2; ipo and hinge have no smoothing. log-probs in nats. beta h is the difference of the
    implicit rewards.
    """
    h_B = (chosen_B - chosen_ref_B) - (rejected_B - rejected_ref_B)
    if kind == "ipo":
        return jnp.square(h_B - 1 / (2 * beta))
    if kind == "hinge":
        return jax.nn.relu(1 - beta * h_B)
    right_B, swapped_B = -jax.nn.log_sigmoid(beta * h_B), -jax.nn.log_sigmoid(-beta * h_B)
    if kind == "robust":
        return ((1 - smoothing) * right_B - smoothing * swapped_B) / (1 - 2 * smoothing)
    return (1 - smoothing) * right_B + smoothing * swapped_B


def policy_gradient(logp, advantages, mask, *, weight_B=None):
    """-A log p: its gradient is minus the policy gradient (REINFORCE; Williams 1992). `weight_B` as in `ppo_policy`."""
    return masked.mean(-advantages * logp, mask, weight_B=weight_B)


def ppo_policy(logp, logp_old, advantages, mask, *, clip, clip_high=None, weight_B=None):
    """Clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), to be minimized.

        ratio = exp(logp - logp_old)        loss = mean max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high))

    clip_high is `clip` if not given; a larger one leaves unlikely tokens more room to rise (DAPO, arXiv 2503.14476, eq.
    10). weight_B, of `masked.row_weights`, makes the mean another one than that over tokens.

    Returns (loss, aux). aux holds masked means: clip_fraction, the share of tokens whose clipped term is the larger,
    which have no gradient; approx_kl, the mean of ratio - 1 - log ratio (k3 of KL(old || new), >= 0); ratio; and
    ratio_square (ratio^2 / ratio_square is the effective sample size of the token weights). aux["tokens"] holds
    ratio and loss of each token, without the weight.
    """
    log_ratio = jnp.where(mask, logp - logp_old, 0)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    aux = {
        "clip_fraction": masked.mean((clipped > plain).astype(ratio.dtype), mask),
        "approx_kl": masked.mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "ratio": masked.mean(ratio, mask),
        "ratio_square": masked.mean(jnp.square(ratio), mask),
    }
    loss = jnp.maximum(plain, clipped)
    return masked.mean(loss, mask, weight_B=weight_B), aux | {"tokens": {"ratio": ratio, "loss": loss}}


def ppo_value(values, values_old, returns, mask, *, clip):
    """Half the larger of the clipped and the unclipped squared error (PPO2; arXiv 2403.17031).

    The clipped value differs by at most `clip` from the value at the rollout. Returns (loss, aux): clip_fraction, and
    in aux["tokens"] the larger square of each token.
    """
    # Not old + clip(new - old): its rounding error would count values within the range as clipped.
    clipped_values = jnp.clip(values, values_old - clip, values_old + clip)
    plain = jnp.square(values - returns)
    clipped = jnp.square(clipped_values - returns)
    aux = {"clip_fraction": masked.mean((clipped > plain).astype(values.dtype), mask)}
    larger = jnp.maximum(plain, clipped)
    return 0.5 * masked.mean(larger, mask), aux | {"tokens": {"square": larger}}
