"""Proximal policy optimization (Schulman et al. 2017) for language models. Trains `policy` and `value`.

An iteration samples a Rollout from the policy, scores it, estimates advantages, then learns for some epochs of
minibatches on the frozen rollout. This file has what only PPO does; policy.py has the rest.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import policy
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import advantages, losses, masked

NEEDS_VALUE = True
SHUFFLES = True  # every epoch has its own order of the rows


@dataclasses.dataclass(frozen=True)
class Config(policy.Config):
    """Defaults are the published TL;DR recipe (arXiv 2403.17031): about 1M episodes."""

    lam: float = number(0.95, least=0, most=1)  # GAE's lambda; 1: returns, 0: TD errors
    clip: float = number(0.2, above=0)  # of the probability ratio: 1 - clip to 1 + clip
    value_clip: float = number(0.2, above=0)  # how far a value may move from the rollout's, in units of reward
    value_coef: float = number(0.1, least=0)  # weight of the value loss
    # auto: reward where there is a reward model, else zero; reward: trunk and head of the reward model;
    # zero: the policy's trunk under a zero head
    value_init: str = choice("auto", "auto", "reward", "zero")
    whiten_rewards: bool = False  # scale the token rewards of a rollout to variance 1; their mean stays


def estimate(rollout, kl_coef, *, config):
    """The rollout with advantages and returns: from here on they are constants."""
    score_B = policy.scored(rollout, config)
    shape = jax.vmap(lambda score, kl_R, mask_R: advantages.shape_rewards(score, kl_R, mask_R, kl_coef=kl_coef))
    rewards_BR = shape(score_B, rollout.kl_BR, rollout.mask_BR)
    if config.whiten_rewards:
        rewards_BR = masked.whiten(rewards_BR, rollout.mask_BR, shift_mean=False)
    gae = jax.vmap(lambda r, v, m: advantages.gae(r, v, m, gamma=config.gamma, lam=config.lam))
    raw_BR, returns_BR = gae(rewards_BR, rollout.values_BR, rollout.mask_BR)
    advantages_BR = masked.whiten(raw_BR, rollout.mask_BR) if config.whiten_advantages else raw_BR
    estimated = {"rewards_BR": rewards_BR, "raw_advantages_BR": raw_BR}
    return rollout.replace(advantages_BR=advantages_BR, returns_BR=returns_BR, **estimated)


def loss(params, batch, *, config, apply):
    """Clipped surrogate plus clipped value loss over one minibatch: (scalar, metrics).

    params is {"policy", "value"}; batch a Rollout with advantages.
    """
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(
        params["policy"], batch.tokens_BT, batch.attend_BT, R, temperature=config.temperature
    )
    values_BR = apply.scalar.values(params["value"], batch.tokens_BT, batch.attend_BT, R)
    policy_loss, policy_aux = losses.ppo_policy(
        logp_BR, batch.logp_BR, batch.advantages_BR, batch.mask_BR, clip=config.clip, weight_B=batch.weight_B
    )
    value_loss, value_aux = losses.ppo_value(
        values_BR, batch.values_BR, batch.returns_BR, batch.mask_BR, clip=config.value_clip
    )
    return policy_loss + config.value_coef * value_loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clip_fraction": policy_aux["clip_fraction"],
        "approx_kl": policy_aux["approx_kl"],
        "ratio": policy_aux["ratio"],
        "ratio_square": policy_aux["ratio_square"],
        "value_clip_fraction": value_aux["clip_fraction"],
        "rows": {
            "logp_BR": logp_BR,
            "values_BR": values_BR,
            "ratio_BR": policy_aux["tokens"]["ratio"],
            "policy_loss_BR": policy_aux["tokens"]["loss"],
            "value_square_BR": value_aux["tokens"]["square"],
        },
    }


def metrics(rollout, *, kl_coef, config):
    """The rollout's own statistics, the total that PPO maximizes, and how well the value explains the returns."""
    mask_BR = rollout.mask_BR
    residual_BR = rollout.returns_BR - rollout.values_BR
    explained = 1 - masked.var(residual_BR, mask_BR) / jnp.maximum(masked.var(rollout.returns_BR, mask_BR), 1e-8)
    return {
        **rollout.statistics(kl_coef),
        **policy.totals(rollout, kl_coef, config),
        "value": masked.mean(rollout.values_BR, mask_BR),
        "returns": masked.mean(rollout.returns_BR, mask_BR),
        "explained_variance": explained,
    }
