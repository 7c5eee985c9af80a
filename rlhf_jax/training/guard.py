"""Numbers that are not finite: the update that they come from is not made, and what is needed to make it again is kept.

A stage's update runs `guarded`. The host learns of it from the count of updates left out, a step late, and writes an
`Incident`; `python -m rlhf_jax.replay` takes it from there.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics
from rlhf_jax.training.checkpoint import Checkpoints

FOLDER = "incident"  # in the workdir


class NonFinite(ArithmeticError):
    """A number is NaN or infinite, and the run has ended; parameters and checkpoints are from before."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to do about an update that is not finite."""

    action: str = "stop"  # stop: the run ends, exit code 4; skip: it goes on with the next batch, and waits for each
    limit: int = 10  # updates that may be skipped


def guarded(step, config):
    """step(state, *args) -> (state, numbers), for an update that changes nothing unless all is finite.

    Looked at are the arguments, the numbers (losses, gradient norms) and what is new in the state. `numbers` gain
    "skipped", the updates left out so far. Where the policy is to stop, the first is the last: the state stays as it
    was for the host to find, however many steps are dispatched after it.
    """

    def guarded_update(state, *args):
        new, numbers = step(state, *args)
        # What passes through, as the reference does, is neither read nor copied.
        changed = jax.tree.map(lambda old, now: None if now is old else now, state, new)
        finite = _finite((args, numbers, changed))
        take = finite if config.action == "skip" else finite & (state.skipped == 0)
        kept = jax.tree.map(lambda old, now: now if now is old else jnp.where(take, now, old), state, new)
        if config.action == "skip":
            kept = kept.replace(step=new.step)
        kept = kept.replace(skipped=state.skipped + ~take)
        return kept, numbers | {f"{next(iter(numbers)).split('/')[0]}/skipped": kept.skipped}

    return guarded_update


def _finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # A barrier, because XLA on a CPU would write all of it out again in each kernel that depends on the result.
    finite = jax.lax.optimization_barrier(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    return jnp.all(finite)


def told(names):
    """The names of what was not finite, for a line; without any it was what the update would have written."""
    return ", ".join(names) or "the new parameters"


@dataclasses.dataclass(frozen=True)
class Incident:
    """An update that was not made: `state` as it was before it, the batch, and which numbers were not finite."""

    stage: str
    step: int
    names: tuple[str, ...]
    kind: str  # of the run
    config: dict
    state: object
    batch: dict


def write(workdir, incident):
    """Keeps an incident in the workdir and returns its folder; those of earlier ones stay."""
    folder = Path(workdir, FOLDER, f"{incident.stage}-{incident.step}")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(incident.step, incident.state, {})
    np.savez(folder / "batch.npz", **jax.device_get(incident.batch))
    record = {name: getattr(incident, name) for name in ("stage", "step", "names", "kind", "config")}
    record["key"] = np.asarray(jax.random.key_data(incident.state.key))
    metrics.summarize(folder / "incident.json", record | metrics.environment())  # last: it is whole
    return folder


def read(folder):
    """What incident.json in the folder says."""
    path = Path(folder, "incident.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the record of an incident, a folder in WORKDIR/{FOLDER}") from error


def read_arrays(folder, like):
    """(state, batch) of an incident; `like` gives the state's structure and placement."""
    with Checkpoints(Path(folder, "checkpoints")) as checkpoints:
        state = checkpoints.restore(like).tree
    with np.load(Path(folder, "batch.npz")) as arrays:
        return state, dict(arrays)
