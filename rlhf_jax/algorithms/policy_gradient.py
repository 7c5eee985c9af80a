"""Vanilla policy gradient (REINFORCE; Williams 1992) with a KL-shaped reward. Trains `policy`.

An iteration samples a Rollout from the policy, scores it, estimates each token's advantage, and takes one gradient
step. With `epochs` > 1 it takes several steps on the same rollout, and weights tokens by pi_new / pi_old. That is PPO
without its clip; the variance of the gradient grows with every step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import policy
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import advantages, losses, masked
from rlhf_jax.training import optim

NEEDS_VALUE = False
SHUFFLES = False
BASELINES = ("none", "mean", "leave_one_out")


@dataclasses.dataclass(frozen=True)
class Config(policy.Config):
    """Defaults are the article's happy tweets. Reward-to-go and the baseline are ours: the article has neither."""

    lr: float = number(3e-4, above=0, most=10)
    schedule: str = choice("constant", *optim.SCHEDULES)
    steps: int = number(100, least=1)  # rollouts
    batch: int = number(32, least=1)  # episodes a rollout
    epochs: int = number(1, least=1)  # gradient steps a rollout; importance-weighted when more than 1
    importance: bool = True  # False: reused rollouts are not weighted (biased; to compare)
    temperature: float = number(1.0, above=0, most=100)  # of sampling, and of every log-prob
    kl_coef: float = number(0.1, least=0)  # reward subtracted per nat of KL from the reference
    missing_eos: str = choice("subtract", "replace", "subtract")
    missing_eos_penalty: float = number(0.0, least=0)
    # False: each token's return is the score minus its own KL penalty, as in the article.
    reward_to_go: bool = True
    # Subtracted from the returns. mean: the batch's mean return; leave_one_out: the mean return of the other rows.
    baseline: str = choice("leave_one_out", *BASELINES)
    whiten_advantages: bool = False  # scale the advantages of a rollout to mean 0, variance 1
    eval_every: int = number(10, least=0)  # rollouts between evaluations; 0: only at the end
    save_every: int = number(50, least=0, neutral=True)  # rollouts between checkpoints; 0: only at the end

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        if self.epochs == 1:
            yield "importance", "epochs is 1"
        if not self.reward_to_go:
            yield "gamma", "reward_to_go is False"


def baseline(returns_B, kind):
    """What to subtract from each episode: 0, the mean return, or the mean return of the others (Kool et al. 2019).

    Only the last is independent of the episode itself, so that it keeps the gradient of a sum over episodes unbiased.
    The loss here is a mean over tokens, and with responses of unequal lengths that is a ratio estimator: its bias is
    O(1/B). A batch of one has no others, and no baseline. Equal returns are their own baseline, without a rounding
    error.
    """
    if kind == "none":
        return jnp.zeros_like(returns_B)
    if kind == "mean":
        mean_B = jnp.full_like(returns_B, jnp.mean(returns_B))
    elif len(returns_B) == 1:
        return jnp.zeros_like(returns_B)
    else:
        mean_B = (jnp.sum(returns_B) - returns_B) / (len(returns_B) - 1)
    return jnp.where(jnp.ptp(returns_B) == 0, returns_B, mean_B)


def estimate(rollout, kl_coef, *, config):
    """The rollout with returns and advantages: from here on they are constants.

    reward-to-go:  G_t = sum_{k >= t} gamma^(k - t) r_k,  r_k = -kl_coef KL_k + [k is last] score
                   baseline: a mean over episodes of score - kl_coef sum_t KL_t
    without:       G_t = score - kl_coef KL_t
                   baseline: a mean over episodes of the mean of G_t over the episode's tokens
    advantage:     A_t = G_t - baseline
    """
    mask_BR, score_B = rollout.mask_BR, policy.scored(rollout, config)
    penalty_BR = kl_coef * rollout.kl_BR
    rewards_BR = None
    if config.reward_to_go:
        shape = jax.vmap(lambda score, kl_R, mask_R: advantages.shape_rewards(score, kl_R, mask_R, kl_coef=kl_coef))
        to_go = jax.vmap(lambda r, m: advantages.discounted_returns(r, m, gamma=config.gamma))
        rewards_BR = shape(score_B, rollout.kl_BR, mask_BR)
        returns_BR = to_go(rewards_BR, mask_BR)
        total_B = score_B - masked.sum(penalty_BR, mask_BR, axis=1)
    else:
        returns_BR = jnp.where(mask_BR, score_B[:, None] - penalty_BR, 0)
        total_B = masked.mean(returns_BR, mask_BR, axis=1)
    raw_BR = jnp.where(mask_BR, returns_BR - baseline(total_B, config.baseline)[:, None], 0)
    advantages_BR = masked.whiten(raw_BR, mask_BR) if config.whiten_advantages else raw_BR
    estimated = {"rewards_BR": rewards_BR, "raw_advantages_BR": raw_BR}
    return rollout.replace(advantages_BR=advantages_BR, returns_BR=returns_BR, **estimated)


def loss(params, batch, *, config, apply):
    """-A log pi, or -A pi / pi_old where rollouts are reused, mean over tokens: (scalar, metrics).

    params is {"policy"}; batch a Rollout with advantages.
    """
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(
        params["policy"], batch.tokens_BT, batch.attend_BT, R, temperature=config.temperature
    )
    how = {"mask": batch.mask_BR, "weight_B": batch.weight_B}
    weighted, aux = losses.ppo_policy(logp_BR, batch.logp_BR, batch.advantages_BR, clip=math.inf, **how)
    plain = losses.policy_gradient(logp_BR, batch.advantages_BR, **how)
    value = weighted if config.epochs > 1 and config.importance else plain
    numbers = {"policy_loss": value} | {name: aux[name] for name in ("approx_kl", "ratio", "ratio_square")}
    return value, numbers | {"rows": {"logp_BR": logp_BR, "ratio_BR": aux["tokens"]["ratio"]}}


def metrics(rollout, *, kl_coef, config):
    """The rollout's own statistics, the total that is maximized, and the spread of the advantages."""
    return {
        **rollout.statistics(kl_coef),
        **policy.totals(rollout, kl_coef, config),
        "returns": masked.mean(rollout.returns_BR, rollout.mask_BR),
        "advantage_std": jnp.sqrt(masked.var(rollout.advantages_BR, rollout.mask_BR)),
    }
