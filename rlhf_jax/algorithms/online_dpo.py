"""Online DPO (Guo et al. 2024, arXiv 2402.04792): DPO on pairs that the policy samples and the reward judges.

Of two completions of a prompt, the one with the higher final score is chosen. Trains `policy`.
"""

import dataclasses
import math

import jax.numpy as jnp

from rlhf_jax.algorithms import dpo, policy
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import losses, masked

NEEDS_VALUE = False
SHUFFLES = True  # every epoch has its own order of the pairs


@dataclasses.dataclass(frozen=True)
class Config(policy.Config):
    """Sizes are those of the published TL;DR recipe, beta that of the paper."""

    group: int = number(2, least=2, most=2)  # completions of each prompt: a pair; batch counts both
    epochs: int = number(1, least=1)  # passes over a rollout
    beta: float = number(0.1, above=0)  # reward per nat of log pi - log pi_ref: larger stays closer to the reference
    loss: str = choice("sigmoid", *losses.DPO)  # of a pair: ops/losses.py, dpo
    smoothing: float = number(0.0, least=0, below=0.5)  # share of pairs taken to be swapped
    # Log-prob of a completion: the sum or the mean of its tokens'. auto: mean where loss is ipo, else sum.
    total: str = choice("auto", "auto", *dpo.TOTALS)
    kl: str = choice("off", *policy.KLS)
    whiten_advantages: bool = False
    reduction: str = choice("sequence", *masked.REDUCTIONS)  # must stay: a pair has one loss

    def problems(self):
        """Checks that concern several fields."""
        yield from super().problems()
        if self.reduction != "sequence":
            yield "reduction", "sequence (a pair has one loss)"
        yield from policy.kl_problems(self)

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        for name in ("gamma", "whiten_advantages"):
            yield name, "a completion is the better or the worse of a pair"
        if self.loss not in losses.SMOOTHED:
            yield "smoothing", f"loss is {self.loss}"


def estimate(rollout, kl_coef, *, config):
    """The rollout with an advantage of 1 for the better completion of a pair and -1 for the worse; 0 for equal ones."""
    mask_BR, final_B = rollout.mask_BR, policy.scored(rollout, config)
    final_QO = final_B.reshape(-1, 2)
    better_QO = jnp.sign(final_QO - final_QO[:, ::-1])
    sign_BR = jnp.where(mask_BR, better_QO.reshape(-1, 1), 0.0)
    return rollout.replace(
        returns_BR=jnp.where(mask_BR, final_B[:, None], 0), raw_advantages_BR=sign_BR, advantages_BR=sign_BR
    )


def loss(params, batch, *, config, apply):
    """ops.losses.dpo of the pairs, mean over all of them; equal completions have none: (scalar, metrics)."""
    mask_BR, R = batch.mask_BR, batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(
        params["policy"], batch.tokens_BT, batch.attend_BT, R, temperature=config.temperature
    )
    _, aux = losses.ppo_policy(logp_BR, batch.logp_BR, batch.advantages_BR, mask_BR, clip=math.inf)  # what is logged
    total = masked.mean if dpo.averaged(config.total, config.loss) else masked.sum
    logp_QO, ref_QO = (total(x_BR, mask_BR, axis=1).reshape(-1, 2) for x_BR in (logp_BR, batch.logp_ref_BR))
    sign_Q = batch.advantages_BR[::2, 0]
    first_Q = sign_Q > 0

    def side(x_QO, chosen):
        return jnp.where(first_Q == chosen, x_QO[:, 0], x_QO[:, 1])

    pairs = (side(logp_QO, True), side(logp_QO, False), side(ref_QO, True), side(ref_QO, False))
    pair_Q = losses.dpo(*pairs, beta=config.beta, kind=config.loss, smoothing=config.smoothing)
    pair_BR = jnp.repeat(jnp.where(sign_Q == 0, 0.0, pair_Q), 2)[:, None] * jnp.ones(mask_BR.shape)
    value = masked.mean(pair_BR, mask_BR, weight_B=batch.weight_B)
    numbers = {"policy_loss": value} | {name: aux[name] for name in ("approx_kl", "ratio", "ratio_square")}
    rows = {"logp_BR": logp_BR, "ratio_BR": aux["tokens"]["ratio"], "pair_loss_BR": pair_BR}
    return value, numbers | {"rows": rows}


def metrics(rollout, *, kl_coef, config):
    """The rollout's own statistics, the score of the better completions, and the share of pairs that are equal."""
    return {
        **rollout.statistics(kl_coef),
        **policy.totals(rollout, kl_coef, config),
        "score_chosen": masked.mean(rollout.score_B, rollout.advantages_BR[:, 0] > 0),
        "groups_equal": jnp.mean(rollout.advantages_BR[:, 0] == 0),  # share of pairs that teach nothing
    }
