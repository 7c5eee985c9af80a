"""Numbers that are not finite: the update that they come from is not made, and what is needed to make it again is kept.

The compiled update itself leaves the parameters alone (training/optim.py: step). The host learns of it one step later,
from the count of updates left out, and keeps an `Incident`; `python -m rlhf_jax.replay` takes it from there.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import fields
from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics
from rlhf_jax.training.checkpoint import Checkpoints

FOLDER = "incident"  # in the workdir


class NonFinite(ArithmeticError):
    """A number is NaN or infinite, and the run has ended; parameters and checkpoints are from before."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What happens when an update is not finite."""

    # stop: the run ends with exit code 4. skip: it goes on with the next batch; each step is awaited. off: no check.
    action: str = fields.choice("stop", "stop", "skip", "off")
    limit: int = fields.number(10, least=0)  # updates that may be skipped


def message(names):
    """The names of the numbers that are not finite, for one line; without any, the gradients were not."""
    return ", ".join(names) or "the gradients"


@dataclasses.dataclass(frozen=True)
class Incident:
    """An update that was not made.

    `state` is what the update found, but for optimizer steps of it that were taken already: state.applied counts them.
    `batch` is the batch of the step, and `rollout` what the policy algorithm was given, if there was one.
    """

    stage: str
    step: int
    names: tuple[str, ...]  # numbers that were not finite
    config: dict
    state: object
    batch: dict
    rollout: object = None


def write(workdir, incident):
    """Keeps an incident in the workdir and returns its folder; those of earlier ones stay."""
    folder = Path(workdir, FOLDER, f"{incident.stage}-{incident.step}")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(incident.step, {"state": incident.state, "rollout": incident.rollout}, {})
    np.savez(folder / "batch.npz", **jax.device_get(incident.batch))
    record = {name: getattr(incident, name) for name in ("stage", "step", "names", "config")}
    record["key"] = np.asarray(jax.random.key_data(incident.state.key))
    metrics.summarize(folder / "incident.json", record | metrics.environment())  # last: the incident is whole
    return folder


def read(folder):
    """The record in incident.json of the folder. InputError where there is none."""
    path = Path(folder, "incident.json")
    try:
        record = json.loads(path.read_text())
        record["stage"], record["step"], record["names"], record["config"]
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the record of an incident, a folder in WORKDIR/{FOLDER}") from error


def read_arrays(folder, like):
    """(state, batch, rollout or None) of an incident; `like` is a state of the same structure and placement."""
    with Checkpoints(Path(folder, "checkpoints"), read_only=True) as checkpoints:
        state = checkpoints.restore({"state": like}).tree["state"]
        rollout = checkpoints.read(checkpoints.steps[-1])[0].get("rollout")
    with np.load(Path(folder, "batch.npz")) as arrays:
        return state, dict(arrays), rollout
