"""Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): GRPO without its two biases.

    A_i = score_i - mean of the group        loss = mean over rows of
                                                        sum over tokens of -min(A ratio, A clip(ratio)) / length

Without the standard deviation, easy and hard prompts do not weigh more; with a constant length, a long bad completion
is punished by every token as much as a short one. No KL penalty.
"""

import dataclasses

from rlhf_jax.algorithms import group, policy
from rlhf_jax.algorithms.group import NEEDS_VALUE, SHUFFLES, estimate, loss, metrics
from rlhf_jax.fields import choice
from rlhf_jax.ops import masked

__all__ = ["NEEDS_VALUE", "SHUFFLES", "Config", "estimate", "loss", "metrics"]


@dataclasses.dataclass(frozen=True)
class Config(group.Config):
    """The paper's parts (fig. 1)."""

    reduction: str = choice("constant", *masked.REDUCTIONS)
    kl: str = choice("off", *policy.KLS)
