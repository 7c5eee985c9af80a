"""Token rewards, discounted returns and GAE for one response (`jax.vmap` them over a batch); advantages of groups.

mask_R is 1 on the response tokens and 0 elsewhere; every output is 0 where mask_R is 0.
"""

import jax
import jax.numpy as jnp


def shape_rewards(score, kl_R, mask_R, *, kl_coef):
    """Reward of each response token: -kl_coef * kl, plus the score on the last one (EOS if there is one).

        r_t = -kl_coef * kl_t + [t is last] * score        (arXiv 1909.08593, eq. 2; 2009.01325, sec. 3.4)

    score is a scalar, kl_R the k1 estimate in nats. An empty response gets no reward.
    """
    index_R = jnp.arange(mask_R.shape[0])
    last = jnp.max(jnp.where(mask_R, index_R, -1))
    return jnp.where(mask_R, -kl_coef * kl_R, 0) + jnp.where(index_R == last, score, 0)


def discounted_returns(rewards_R, mask_R, *, gamma):
    """Reward-to-go G_t = r_t + gamma G_{t+1}; tokens with mask 0 are skipped."""

    def backward(later, token):
        reward, mask = token
        here = reward + gamma * later
        return jnp.where(mask, here, later), jnp.where(mask, here, 0)

    _, returns_R = jax.lax.scan(backward, jnp.zeros((), rewards_R.dtype), (rewards_R, mask_R), reverse=True)
    return returns_R


def gae(rewards_R, values_R, mask_R, *, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    values_R[t] is the value *before* response token t; after the last token it is 0. t + 1 is the next token
    with mask 1: tokens with mask 0 in between (a tool's output, say) are skipped, whatever their values.
    Returns (advantages_R, returns_R) with returns = advantages + values.
    """

    def backward(later, token):
        reward, value, mask = token
        next_advantage, next_value = later
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        here = (advantage, value)
        return jax.tree.map(lambda new, old: jnp.where(mask, new, old), here, later), jnp.where(mask, advantage, 0)

    end = (jnp.zeros((), values_R.dtype), jnp.zeros((), values_R.dtype))
    _, advantages_R = jax.lax.scan(backward, end, (rewards_R, values_R, mask_R), reverse=True)
    return advantages_R, jnp.where(mask_R, advantages_R + values_R, 0)


BASELINES = ("none", "mean", "leave_one_out", "batch_mean")
SCALES = ("none", "group_std", "batch_std")


def group(scores_QO, *, baseline, scale):
    """Advantages [Q, O] of O completions of each of Q prompts: (score - baseline) / scale.

    baseline: 0; the group's mean (GRPO, arXiv 2402.03300, eq. 3); the mean of the group's other completions (RLOO,
    arXiv 2402.14740, eq. 8), which keeps the policy gradient unbiased; or the mean of the batch.
    scale: 1; or the standard deviation (unbiased, ddof 1) of the group's or of the batch's scores.

    Scores that are all equal (largest = smallest) have the advantage 0 exactly, with any baseline but "none". They are
    compared as they are: a standard deviation of equal scores may be a rounding error above 0.
    """

    def centred(scores, others=False):
        """Scores minus their mean, or the mean of the others, along the last axis."""
        apart = scores - scores[..., :1]  # equal scores are 0, not a rounding error apart
        count = max(scores.shape[-1] - others, 1)
        total = jnp.sum(apart, axis=-1, keepdims=True)
        return apart - (total - apart if others else total) / count

    def deviation(scores):
        """Standard deviation along the last axis; 1 where the scores are all equal."""
        spread = jnp.ptp(scores, axis=-1, keepdims=True)
        spread = jnp.where(spread > 0, spread, 1)
        square = jnp.sum(jnp.square(centred(scores / spread)), axis=-1, keepdims=True)
        std = spread * jnp.sqrt(square / max(scores.shape[-1] - 1, 1))
        return jnp.where(std > 0, std, 1)

    advantages_QO = {
        "none": lambda: scores_QO,
        "mean": lambda: centred(scores_QO),
        "leave_one_out": lambda: centred(scores_QO, others=True),
        "batch_mean": lambda: centred(scores_QO.reshape(1, -1)).reshape(scores_QO.shape),
    }[baseline]()
    if scale == "group_std":
        return advantages_QO / deviation(scores_QO)
    return advantages_QO / deviation(scores_QO.reshape(1, -1)) if scale == "batch_std" else advantages_QO
