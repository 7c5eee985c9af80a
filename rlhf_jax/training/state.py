"""TrainState: every array that training reads or writes, so that one checkpoint is the whole run."""

from typing import Any

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """Parameters as separate pytrees; those a stage does not have are None.

    `optimizer` holds an optax state for each of the parameter trees that the stage trains, by field name. All
    randomness of step i comes from fold_in(key, i), so a run restored at i draws what it would have drawn.
    """

    step: jax.Array  # () int32, steps done
    key: jax.Array
    policy: Any = None
    reference: Any = None
    value: Any = None
    reward: Any = None
    optimizer: Any = None
    kl_coef: jax.Array | None = None  # () float32, the KL controller's state
    best: Any = None  # {"policy", "reward", "step"} of the best policy seen
    alarms: Any = None  # alarms.py: running means, and whether they are out of bounds
    skipped: jax.Array | None = None  # () int32, updates left out because they were not finite: guard.py

    @classmethod
    def create(cls, key, **parts):
        """Step 0. Counts are arrays from the start: a Python int would cost a second compilation."""
        return cls(step=jnp.zeros((), jnp.int32), key=key, skipped=jnp.zeros((), jnp.int32), **parts)

    @property
    def step_key(self):
        """The key of the step about to be taken."""
        return jax.random.fold_in(self.key, self.step)
