"""Scores the recorded tokens of an iteration again, with the parameters that sampled them.

    python -m rlhf_jax.viz replay runs/demo --iter 1

The parameters are those of the checkpoint after the iteration before; iteration 1 and the reference need none, as
earlier stages have them. Logits are computed for every position, and the shift by one is made here, in NumPy: nothing
of ops/logprobs.py is used.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import config as configs
from rlhf_jax.errors import InputError
from rlhf_jax.pipeline import Stages
from rlhf_jax.report.console import Silent
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.workdir import Workdir
from rlhf_jax.viz.trace import File, Trace

TOLERANCE = 1e-4  # in float32


@dataclasses.dataclass(frozen=True)
class Replayed:
    """The largest difference of one recorded array."""

    array: str
    numbers: int
    error: float
    where: str = ""  # file, index and both values, where the error is above the tolerance


def replay(workdir, iteration: int) -> list[Replayed]:
    """Compares log-probs, values and scores of a recorded iteration with those that the parameters give now.

    Raises InputError where the iteration was not recorded, or has no checkpoint before it.
    """
    trace, config = Trace(workdir), configs.read(workdir)
    name = configs.rl_name(config)
    steps = [trace.manifest["files"][each]["step"] for each in trace.names(name, "iter")]
    if iteration not in steps:
        raise InputError(f"--iter: expected a recorded iteration of {name}, one of {steps}, got {iteration}")
    file = trace.read(trace.names(name, "iter")[steps.index(iteration)])
    stages = Stages(config, Workdir(workdir), Silent())
    apply, reference = stages.setup.apply, stages._policy(name)
    found = {"policy": reference} if iteration == 1 else _checkpoint(stages.workdir / name, iteration - 1)
    temperature, mask = config.rl.temperature, file["rollout.mask_BR"].astype(bool)
    arrays = {}
    for array, params in (("logp_BR", found["policy"]), ("logp_ref_BR", reference)):
        arrays[array] = np.where(mask, _logprobs(apply.policy, params, file, temperature), 0)
    if "value" in found and "rollout.values_BR" in file.arrays:
        arrays["values_BR"] = np.where(mask, _values(apply.scalar, found["value"], file), 0)
    if config.learned:
        params = stages.parameters("reward", "reward", apply.scalar.zero_head(reference))
        arrays["score_B"] = np.asarray(apply.scalar.score(params, *_tokens(file)))
    return [_compare(file, name, array) for name, array in arrays.items()]


def _checkpoint(folder, step):
    """The parameters after a step: {"policy", "value"}."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        if step not in checkpoints.steps:
            there = ", ".join(str(each + 1) for each in checkpoints.steps)
            why = f"--iter: expected 1, or an iteration after a checkpoint ({there}), got {step + 1}"
            raise InputError(f"{why}; --config.keep.last keeps more checkpoints")
        tree = checkpoints.read(step)[0]
    return {name: tree[name] for name in ("policy", "value") if tree.get(name) is not None}


def _tokens(file: File):
    """(ids, which of them are real), each [B, T]."""
    ids = np.concatenate([file["rollout.prompt_BP"], file["rollout.response_BR"]], axis=1)
    real = np.concatenate([file["rollout.prompt_mask_BP"], file["rollout.mask_BR"]], axis=1)
    return jnp.asarray(ids), jnp.asarray(real.astype(bool))


def _logprobs(model, params, file, temperature):
    """Log-probs [B, R] in float64; token i of the response is scored by the position before it."""
    ids, real = _tokens(file)
    P, response = file["rollout.prompt_BP"].shape[1], file["rollout.response_BR"]
    logits = jax.jit(lambda params, ids, real: model.logits(params, model.hidden(params, ids, real)))
    rows = []
    for b in range(len(ids)):  # a row at a time: all logits of a batch would be gigabytes
        row = np.asarray(logits(params, ids[b : b + 1], real[b : b + 1])[0], np.float64) / temperature
        row = row[P - 1 : P - 1 + response.shape[1]]
        top = row.max(axis=-1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(row - top).sum(axis=-1))
        rows.append(row[np.arange(len(row)), response[b]] - total)
    return np.stack(rows)


def _values(model, params, file):
    ids, real = _tokens(file)
    return np.asarray(model.values(params, ids, real, file["rollout.mask_BR"].shape[1]))


def _compare(file, name, array):
    recorded = file[f"rollout.{name}"].astype(np.float64)
    error = np.abs(recorded - array)
    index = np.unravel_index(int(error.argmax()), error.shape)
    where = ""
    if not error.max() <= TOLERANCE:
        values = f"recorded {recorded[index]:.9g}, scored again {array[index]:.9g}"
        where = f"{file.name}: rollout.{name}[{', '.join(map(str, index))}]: {values}"
    return Replayed(f"rollout.{name}", recorded.size, float(error.max()), where)
