"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): REINFORCE against the mean of the prompt's other completions.

    A_i = R_i - mean of R_j, j != i,   R = score - kl_coef sum_t KL_t        loss = -mean over rows of sum_t A ratio_t

The baseline does not depend on the completion, so the gradient is the policy gradient's on average.
"""

import dataclasses

from rlhf_jax.algorithms import group
from rlhf_jax.algorithms.group import NEEDS_VALUE, SHUFFLES, estimate, loss, metrics
from rlhf_jax.fields import choice
from rlhf_jax.ops import advantages, masked

__all__ = ["NEEDS_VALUE", "SHUFFLES", "Config", "estimate", "loss", "metrics"]


@dataclasses.dataclass(frozen=True)
class Config(group.Config):
    """The paper's parts; with epochs > 1 the ratio is clipped as in PPO."""

    baseline: str = choice("leave_one_out", *advantages.BASELINES)
    reduction: str = choice("constant", *masked.REDUCTIONS)
