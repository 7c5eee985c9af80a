"""GRPO (Shao et al. 2024, arXiv 2402.03300): scores in units of their group's spread, the KL in the loss.

    A_i = (score_i - mean) / std of the group        loss = mean over rows of the mean over tokens of
                                                        -min(A ratio, A clip(ratio)) + kl_coef k3

The standard deviation is the unbiased one (ddof 1), as in the paper's code; a group of equal scores teaches nothing.
"""

import dataclasses

from rlhf_jax.algorithms import group, policy
from rlhf_jax.algorithms.group import NEEDS_VALUE, SHUFFLES, estimate, loss, metrics
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import advantages, masked

__all__ = ["NEEDS_VALUE", "SHUFFLES", "Config", "estimate", "loss", "metrics"]


@dataclasses.dataclass(frozen=True)
class Config(group.Config):
    """The paper's parts (eq. 3) and its kl_coef."""

    scale: str = choice("group_std", *advantages.SCALES)
    reduction: str = choice("sequence", *masked.REDUCTIONS)
    kl: str = choice("k3", *policy.KLS)
    kl_coef: float = number(0.04, least=0)  # added to the loss per nat of k3
