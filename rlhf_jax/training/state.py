"""TrainState: every array that training reads or writes, so that one checkpoint is the whole run."""

from typing import Any

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """Parameters as separate pytrees; those a stage does not have are None.

    `optimizer` holds an optax state for each of the parameter trees that the stage trains, by field name. All
    randomness of step i comes from fold_in(key, i), so a run restored at i samples what it would have sampled.
    """

    step: jax.Array  # () int32, steps done
    key: jax.Array
    policy: Any = None
    reference: Any = None
    value: Any = None
    reward: Any = None
    optimizer: Any = None
    kl_coef: jax.Array | None = None  # () float32, the KL controller's state
    best: Any = None  # {"policy", "score", "step"} of the best policy seen
    alarms: Any = None  # alarms.py: running means, and whether an alarm has tripped
    skipped: jax.Array | None = None  # () int32, updates that were left out because a number was not finite
    applied: jax.Array | None = None  # () int32, optimizer steps already taken at `step`; 0 except in an incident

    @classmethod
    def create(cls, key, **parts):
        """The state at step 0. Counts are arrays from the start: a Python int would cause a second compilation."""
        counts = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "applied")}
        return cls(key=key, **counts, **parts)

    @property
    def step_key(self):
        """The key of the step about to be taken."""
        return jax.random.fold_in(self.key, self.step)
