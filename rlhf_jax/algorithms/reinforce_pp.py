"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): PPO's clip without a critic, advantages whitened over the batch.

    A_t = score - kl_coef sum of KL_k, k >= t, then (A - mean) / std over the tokens of the batch

One completion a prompt: no group, no baseline but the whitening's mean.
"""

import dataclasses

from rlhf_jax.algorithms import group, policy_gradient
from rlhf_jax.algorithms.group import SHUFFLES, loss
from rlhf_jax.algorithms.policy_gradient import NEEDS_VALUE, estimate, metrics
from rlhf_jax.fields import choice, number

__all__ = ["NEEDS_VALUE", "SHUFFLES", "Config", "estimate", "loss", "metrics"]


@dataclasses.dataclass(frozen=True)
class Config(policy_gradient.Config):
    """The paper's parts on the policy gradient's defaults."""

    epochs: int = number(2, least=1)  # passes over a rollout
    baseline: str = choice("none", *policy_gradient.BASELINES)
    whiten_advantages: bool = True  # scale the advantages of a rollout to mean 0, variance 1
    clip: float = number(0.2, above=0)  # of the probability ratio, downwards: 1 - clip
    clip_high: float = number(0.0, least=0)  # upwards: 1 + clip_high; 0: as clip

    def problems(self):
        """Checks that concern several fields."""
        yield from super().problems()
        yield from group.clip_problems(self)

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        yield "importance", "the clip is one of importance weights"
