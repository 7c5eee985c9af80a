"""Best-of-n distillation (rejection-sampling fine-tuning; Llama 2, arXiv 2307.09288, sec. 3.2.3). Trains `policy`.

Of n completions of a prompt, the best that ended is kept (with ended=False, the best); the policy is fine-tuned on the
kept ones, and again:

    loss = mean of -log p over the tokens of the kept completions

The best of n is log n - (n - 1) / n nats from the policy that sampled it, at most (arXiv 2009.01325, app. G.3).
"""

import dataclasses
import math

import jax.numpy as jnp

from rlhf_jax.algorithms import policy
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import losses, masked

NEEDS_VALUE = False
SHUFFLES = True  # every epoch has its own order of the groups


@dataclasses.dataclass(frozen=True)
class Config(policy.Config):
    """Sizes are those of the published TL;DR recipe."""

    group: int = number(4, least=2)  # n, completions of each prompt, in rows next to each other; batch counts them all
    ended: bool = True  # only a completion that ended can be kept; False: the best by its score after missing_eos
    epochs: int = number(1, least=1)  # passes over a rollout
    kl: str = choice("off", *policy.KLS)
    whiten_advantages: bool = False

    def problems(self):
        """Checks that concern several fields."""
        yield from super().problems()
        yield from policy.kl_problems(self)
        if self.reduction != "token":
            yield "reduction", "token (the loss is a mean over the kept tokens)"

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        for name in ("gamma", "whiten_advantages"):
            yield name, "a completion is kept or not"


def estimate(rollout, kl_coef, *, config):
    """The rollout with a weight for each row: of a group, the kept completion has one, the others 0.

    The weights' mean over the tokens of the rollout is 1, so the loss is a mean over the kept tokens.
    """
    mask_BR, final_B = rollout.mask_BR, policy.scored(rollout, config)
    final_QO = final_B.reshape(-1, config.group)
    able_QO = rollout.eos_B.reshape(-1, config.group) | (not config.ended)
    best_QO = jnp.arange(config.group) == jnp.argmax(jnp.where(able_QO, final_QO, -jnp.inf), axis=1, keepdims=True)
    kept_B = (best_QO & able_QO).reshape(-1)
    share = masked.mean(kept_B[:, None] * jnp.ones(mask_BR.shape), mask_BR)
    weight_BR = jnp.where(mask_BR & kept_B[:, None], 1 / jnp.maximum(share, 1e-8), 0.0)
    return rollout.replace(
        returns_BR=jnp.where(mask_BR, final_B[:, None], 0), raw_advantages_BR=weight_BR, advantages_BR=weight_BR
    )


def loss(params, batch, *, config, apply):
    """-log p, mean over the tokens of the kept completions: (scalar, metrics)."""
    mask_BR = batch.mask_BR
    inputs = (batch.tokens_BT, batch.attend_BT, mask_BR.shape[1])
    logp_BR = apply.policy.logprobs(params["policy"], *inputs, temperature=config.temperature)
    _, aux = losses.ppo_policy(logp_BR, batch.logp_BR, batch.advantages_BR, mask_BR, clip=math.inf)  # what is logged
    value = losses.policy_gradient(logp_BR, batch.advantages_BR, mask_BR, weight_B=batch.weight_B)
    numbers = {"policy_loss": value} | {name: aux[name] for name in ("approx_kl", "ratio", "ratio_square")}
    return value, numbers | {"rows": {"logp_BR": logp_BR, "ratio_BR": aux["tokens"]["ratio"]}}


def metrics(rollout, *, kl_coef, config):
    """The rollout's own statistics, the score of what was kept, and the bound of its KL from the sampler."""
    kept_B = rollout.advantages_BR[:, 0] > 0
    return {
        **rollout.statistics(kl_coef),
        **policy.totals(rollout, kl_coef, config),
        "score_kept": masked.mean(rollout.score_B, kept_B),
        "kept": jnp.sum(kept_B) * config.group / len(kept_B),  # share of the prompts
        "kl_bound": jnp.float32(math.log(config.group) - (config.group - 1) / config.group),
    }
