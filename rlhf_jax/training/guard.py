"""Numbers that are not finite: their update is not taken, and everything that repeats it is saved.

The compiled update itself leaves the parameters unchanged (training/optim.py: step). The host sees that one step later,
in the count of skipped updates, and saves an `Incident`, which `python -m rlhf_jax.replay` repeats.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import fields, hosts, jsonfile
from rlhf_jax.errors import NOT_FINITE, InputError
from rlhf_jax.report import metrics
from rlhf_jax.training import sharding
from rlhf_jax.training.checkpoint import Checkpoints

FOLDER = "incident"  # in the workdir


class NonFinite(ArithmeticError):
    """A number is NaN or infinite, and the run has ended. Parameters and checkpoints are those before it."""

    exit_code = NOT_FINITE


@dataclasses.dataclass(frozen=True)
class Config:
    """What happens if an update is not finite."""

    # stop: the run ends with exit code 4. skip: it continues with the next batch; each step is awaited. off: no check.
    action: str = fields.choice("stop", "stop", "skip", "off")
    limit: int = fields.number(10, least=0)  # updates that may be skipped

    def unused(self):
        """Fields without effect, and why."""
        if self.action != "skip":
            yield "limit", f"action is {self.action}"


def message(names):
    """The names of the numbers that are not finite, in one line. Without names, it is the gradients."""
    return ", ".join(names) or "the gradients"


@dataclasses.dataclass(frozen=True)
class Incident:
    """An update that was not taken, or not to its end.

    `state` is the state before the update; if the update had taken some of its optimizer steps, they are in it, and
    state.applied counts them. `batch` is the batch of the step, `rollout` what a policy algorithm learned from.
    """

    stage: str
    step: int
    names: tuple[str, ...]  # numbers that were not finite
    config: dict
    state: object
    batch: dict
    rollout: object = None


def write(workdir, incident):
    """Saves an incident in the workdir and returns its folder; earlier ones stay."""
    folder = Path(workdir, FOLDER, f"{incident.stage}-{incident.step}")
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(incident.step, {"state": incident.state, "rollout": incident.rollout}, {})
    batch = sharding.gather(incident.batch)
    if hosts.first():
        np.savez(folder / "batch.npz", **batch)
        record = {name: getattr(incident, name) for name in ("stage", "step", "names", "config")}
        record["key"] = np.asarray(jax.random.key_data(incident.state.key))
        metrics.summarize(folder / "incident.json", record | metrics.environment())  # last: the incident is complete
    hosts.wait("incident")
    return folder


def read(folder):
    """The record in incident.json of the folder. InputError where there is none."""
    path = Path(folder, "incident.json")
    try:
        record = jsonfile.read(path)
        record["stage"], record["step"], record["names"], record["config"]
        return record
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: expected the record of an incident, a folder in WORKDIR/{FOLDER}") from error


def read_arrays(folder, like):
    """(state, batch, rollout or None) of an incident; `like` is a state of the same structure and placement."""
    with Checkpoints(Path(folder, "checkpoints"), read_only=True) as checkpoints:
        state = checkpoints.restore({"state": like}).tree["state"]
        rollout = checkpoints.read(checkpoints.steps[-1])[0].get("rollout")
    with np.load(Path(folder, "batch.npz")) as arrays:
        return state, dict(arrays), rollout
