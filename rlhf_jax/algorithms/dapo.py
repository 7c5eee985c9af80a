"""DAPO-style (Yu et al. 2025, arXiv 2503.14476): GRPO with a mean over all tokens and more room upwards.

    A_i = (score_i - mean) / std of the group        loss = mean over tokens of -min(A ratio, A clip(ratio, .8, 1.28))

Without a KL penalty. Not here: its dynamic sampling; a group without spread has the advantage 0, and `groups_equal`
counts these. Nor its soft limit of the length, which a reward function can have.
"""

import dataclasses

from rlhf_jax.algorithms import group, policy
from rlhf_jax.algorithms.group import NEEDS_VALUE, SHUFFLES, estimate, loss, metrics
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import advantages

__all__ = ["NEEDS_VALUE", "SHUFFLES", "Config", "estimate", "loss", "metrics"]


@dataclasses.dataclass(frozen=True)
class Config(group.Config):
    """The paper's parts (eq. 8)."""

    scale: str = choice("group_std", *advantages.SCALES)
    clip_high: float = number(0.28, least=0)  # upwards: 1 + clip_high; 0: as clip
    kl: str = choice("off", *policy.KLS)
