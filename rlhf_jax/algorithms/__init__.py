"""The algorithms, one a file. POLICY lists those that `--config.algorithm=...` chooses from; each has a section."""

from rlhf_jax.algorithms import dapo, dr_grpo, grpo, policy_gradient, ppo, reinforce_pp, rloo
from rlhf_jax.algorithms.policy import Algorithm

POLICY: dict[str, Algorithm] = {
    "ppo": ppo,
    "policy_gradient": policy_gradient,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
}
