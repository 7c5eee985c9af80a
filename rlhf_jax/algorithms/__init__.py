"""The algorithms, one a file. `--config.algorithm=...` chooses from ALGORITHMS; each has a section of the config."""

from typing import Any

from rlhf_jax.algorithms import (
    best_of_n,
    dapo,
    dpo,
    dr_grpo,
    grpo,
    online_dpo,
    policy_gradient,
    ppo,
    reinforce_pp,
    rloo,
)
from rlhf_jax.algorithms.policy import Algorithm

# They learn from their own samples and a reward.
POLICY: dict[str, Algorithm] = {
    "ppo": ppo,
    "policy_gradient": policy_gradient,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "online_dpo": online_dpo,
    "best_of_n": best_of_n,
}

ALGORITHMS: dict[str, Any] = POLICY | {"dpo": dpo}  # DPO learns from preference pairs
