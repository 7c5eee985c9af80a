"""The reward model as a reward: the score that it reads at a completion's last token, on the device."""

import functools
from typing import Any

import jax

from rlhf_jax import rollout
from rlhf_jax.rewards import Completions


class Learned:
    """A trained reward model; `params` are its parameters, `sampling` says how many rows are scored at a time."""

    name, metric, on_host = "learned", "score", False

    def __init__(self, apply: rollout.Apply, params: Any, sampling: Any, jit=jax.jit):
        self.params = params
        self.score = jit(functools.partial(rollout.score, apply, sampling=sampling))  # (params, Rollout) -> [B]

    def __call__(self, params: Any, completions: Completions) -> dict[str, Any]:
        """{"score": [B]}, without waiting for the device."""
        return {"score": self.score(params, completions.rollout)}
