"""The algorithms, one a file. POLICY lists those that `--config.algorithm=...` chooses from."""

from rlhf_jax.algorithms import policy_gradient, ppo

POLICY = {"ppo": ppo, "policy_gradient": policy_gradient}
