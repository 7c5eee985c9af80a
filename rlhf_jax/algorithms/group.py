"""What RLOO, GRPO and their kin share: a completion is judged against the others of its prompt. Trains `policy`.

The algorithms differ in the parts that they name, and every part is a field: baseline, scale, reduction, clip, KL. A
completion is one action: all of its tokens have the same advantage. There is no value model.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import policy
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import advantages, losses, masked

NEEDS_VALUE = False
SHUFFLES = True  # every epoch has its own order of the groups


@dataclasses.dataclass(frozen=True)
class Config(policy.Config):
    """Sizes are those of the published TL;DR recipe; each algorithm's file has its own parts."""

    group: int = number(4, least=2)  # completions of each prompt, in rows next to each other; batch counts them all
    # What is subtracted from a completion's score. mean: its group's mean; leave_one_out: the mean of the others in its
    # group; batch_mean: the mean of the rollout.
    baseline: str = choice("mean", *advantages.BASELINES)
    scale: str = choice("none", *advantages.SCALES)  # what divides it: the group's or the rollout's standard deviation
    clip: float = number(0.2, above=0)  # of the probability ratio, downwards: 1 - clip
    clip_high: float = number(0.0, least=0)  # upwards: 1 + clip_high; 0: as clip
    whiten_advantages: bool = False  # scale the advantages of a rollout to mean 0, variance 1 over its tokens

    def problems(self):
        """Checks that concern several fields."""
        yield from super().problems()
        yield from clip_problems(self)

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        yield "gamma", "a completion is one action, with one advantage"


def clip_problems(config):
    """Checks of the clip's two sides."""
    if 0 < config.clip_high < config.clip:
        yield "clip_high", f"0, or at least clip = {config.clip:g}"


def estimate(rollout, kl_coef, *, config):
    """The rollout with advantages and returns: from here on they are constants.

    R = score - kl_coef sum_t KL_t, the sum of the token rewards, is the return of every token; the advantage is R
    against the other completions of the prompt (ops.advantages.group).
    """
    score_B, mask_BR = policy.scored(rollout, config), rollout.mask_BR
    shape = jax.vmap(lambda score, kl_R, mask_R: advantages.shape_rewards(score, kl_R, mask_R, kl_coef=kl_coef))
    total_B = score_B - kl_coef * masked.sum(rollout.kl_BR, mask_BR, axis=1)
    total_QO = total_B.reshape(-1, config.group)
    advantage_QO = advantages.group(total_QO, baseline=config.baseline, scale=config.scale)
    raw_BR = jnp.where(mask_BR, advantage_QO.reshape(-1, 1), 0)
    return rollout.replace(
        rewards_BR=shape(score_B, rollout.kl_BR, mask_BR),
        returns_BR=jnp.where(mask_BR, total_B[:, None], 0),
        raw_advantages_BR=raw_BR,
        advantages_BR=masked.whiten(raw_BR, mask_BR) if config.whiten_advantages else raw_BR,
    )


def loss(params, batch, *, config, apply):
    """The clipped surrogate of one minibatch, a mean as config.reduction has it: (scalar, metrics).

    params is {"policy"}; batch a Rollout with advantages.
    """
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(
        params["policy"], batch.tokens_BT, batch.attend_BT, R, temperature=config.temperature
    )
    clips = {"clip": config.clip, "clip_high": config.clip_high or config.clip}
    value, aux = losses.ppo_policy(
        logp_BR, batch.logp_BR, batch.advantages_BR, batch.mask_BR, **clips, weight_B=batch.weight_B
    )
    names = ("clip_fraction", "approx_kl", "ratio", "ratio_square")
    tokens = {"ratio_BR": aux["tokens"]["ratio"], "policy_loss_BR": aux["tokens"]["loss"]}
    numbers = {"policy_loss": value} | {name: aux[name] for name in names}
    return value, numbers | {"rows": {"logp_BR": logp_BR} | tokens}


def metrics(rollout, *, kl_coef, config):
    """The rollout's own statistics, the total that is maximized, and how many groups teach nothing."""
    score_QO = policy.scored(rollout, config).reshape(-1, config.group)
    return {
        **rollout.statistics(kl_coef),
        **policy.totals(rollout, kl_coef, config),
        "groups_equal": jnp.mean(jnp.ptp(score_QO, axis=1) == 0),  # share of prompts whose scores are all the same
        "advantage_std": jnp.sqrt(masked.var(rollout.advantages_BR, rollout.mask_BR)),
    }
