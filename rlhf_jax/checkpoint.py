"""Checkpoints of a stage: the TrainState and the data position as one atomic Orbax step, and finished parameters.

Use `Checkpoints` as a context manager: leaving it waits for the writes under way (Orbax would lose them).
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints under `directory`, the newest `keep` of them."""

    def __init__(self, directory, *, keep=2):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    @property
    def latest(self):
        """The newest step saved, or None."""
        return self._manager.latest_step()

    def save(self, step, state, position):
        """Saves the state and the data position (JSON) under this step, in the background."""
        state = state.replace(key=jax.random.key_data(state.key))
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(position))
        self._manager.save(step, args=args, force=True)

    def restore(self, state):
        """The newest (state, data position); `state` gives shapes, types and placement, and is not read."""
        restored = self._restore(state.replace(key=jax.random.key_data(state.key)), data=ocp.args.JsonRestore())
        return restored.state.replace(key=jax.random.wrap_key_data(restored.state.key)), restored.data

    def restore_field(self, field, like):
        """One field of the newest TrainState, a parameter tree shaped and placed as `like` is."""
        return self._restore({field: like}, partial_restore=True).state[field]

    def _restore(self, like, data=None, **options):
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        options["restore_args"] = ocp.checkpoint_utils.construct_restore_args(like)
        parts = {"state": ocp.args.PyTreeRestore(like, **options)} | ({"data": data} if data else {})
        return self._manager.restore(self.latest, args=ocp.args.Composite(**parts))
