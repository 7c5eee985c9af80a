"""The algorithms, one a file. POLICY lists those that `--config.algorithm=...` chooses from."""

from rlhf_jax.algorithms import policy_gradient, ppo
from rlhf_jax.algorithms.policy import Algorithm

POLICY: dict[str, Algorithm] = {"ppo": ppo, "policy_gradient": policy_gradient}
