"""Repeats an update that was not finite: is the result the same, and which operation is the first at fault?

    python -m rlhf_jax.replay runs/demo/incident/ppo-17

The stage's own step runs twice from the saved state. It runs operation by operation, up to the first one that turns
finite numbers into numbers that are not; then it runs compiled, as in the run. A stage that was made in Python is in no
config; there it is `replay.replay(folder, stage=stage)`, and the update alone is repeated, on the saved rollout.
"""

from rlhf_jax import command

if __name__ == "__main__":
    command.begin()  # the imports below take seconds

import dataclasses
import functools
import logging
import math
import sys
from pathlib import Path

import jax
import jax.extend.core
import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter, Silent
from rlhf_jax.rollout import Rollout
from rlhf_jax.training import guard, loop, sharding
from rlhf_jax.training.workdir import Workdir

PACKAGE = Path(__file__).parent


def replay(folder, reporter=None, stage=None):
    """Repeats the incident in `folder`, a folder of WORKDIR/incident: (names not finite, message or None).

    The message is about the first operation whose result is not finite. `stage` is the Stage that was trained, where it
    was not one of a config. Raises InputError if the folder has no incident or is not in the workdir of its run.
    """
    folder, reporter = Path(folder).expanduser().absolute(), reporter or Silent()
    record, watch, made = guard.read(folder), Watch(), stage
    stage = stage or _stage(folder, record, watch, reporter)
    state, batch, rollout = guard.read_arrays(folder, stage.state)
    batch = sharding.shard(batch, sharding.mesh_of(stage.state))
    reported = guard.message(record["names"])
    reporter.note(f"{record['stage']} step {record['step']}: {reported} not finite, as in the run")
    if made:
        update = watch.jit(stage.learn.__wrapped__)  # not compiled, without donation
        given = Rollout(**rollout) if rollout else batch
    elif int(state.applied):  # the policy has moved since it wrote the rollout, which is at hand
        update, given = stage.learn, Rollout(**rollout)
    else:
        update, given = _update_of(stage), batch
    place = watch.first(update, state, given)  # before the compiled update, which takes the state's buffers
    scalars = {name: value for name, value in update(state, given)[1].items() if name != "record"}
    numbers = {f"{stage.name}/{name}": float(value) for name, value in scalars.items()}
    names = loop.not_finite(numbers)
    taken = not numbers[f"{stage.name}/skipped"]
    reporter.note("repeated: " + ("all finite" if taken else f"{guard.message(names)} not finite"))
    reporter.note(place or "operation by operation, all numbers are finite: only the compiled program is at fault")
    return names, place


def _stage(folder, record, watch, reporter):
    """The stage of an incident, made of the config in its record."""
    if not isinstance(record["config"], dict) or "task" not in record["config"]:
        raise InputError(f"{folder}: of a stage that was made in Python; expected replay.replay(folder, stage=...)")
    config, workdir, seed = configs.parse(_numbers(record["config"])), folder.parents[1], 0
    config = dataclasses.replace(config, mesh=sharding.Config())  # of this machine
    if record["stage"] == configs.rl_name(config) and config.seeds > 1:  # the workdir is RUN/seeds/INDEX
        workdir, seed = workdir.parents[1], int(workdir.name)
    stages = pipeline.Stages(config, Workdir(workdir), reporter, jit=watch.jit)
    if record["stage"] not in stages.names:
        raise InputError(f"{folder}: expected the incident of {' or '.join(stages.names)}, got {record['stage']!r}")
    return stages.make(record["stage"], seed)


def _numbers(value):
    """A value of a record, with NaN where it has null: numbers that are not finite are written so."""
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    return math.nan if value is None else value


def _update_of(stage):
    """The stage's whole step as (state, batch) -> (state, numbers)."""
    return lambda state, batch: stage.step(state, batch)[:2]


class Watch:
    """Replaces jax.jit, and can run the functions given to it one operation at a time."""

    def __init__(self):
        self._on = False

    def jit(self, function, **options):
        """The compiled function; while `first` runs, it runs its operations one by one instead."""
        compiled = jax.jit(function, **options)

        @functools.wraps(function)
        def call(*args):
            if not self._on:
                return compiled(*args)
            program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
            return jax.tree.unflatten(jax.tree.structure(shape), _run(program, jax.tree.leaves(args)))

        return call

    def first(self, step, *args):
        """A message about the first operation of step(*args) whose result is not finite, or None."""
        self._on = True
        try:
            step(*args)
        except _NotFinite as error:
            return str(error)
        finally:
            self._on = False
        return None


class _NotFinite(Exception):
    """A message about the first operation whose result is not finite."""


def _run(program, args):
    """The results of a jaxpr. Raises _NotFinite at the first operation whose result, not its input, is not finite."""
    jaxpr = program.jaxpr
    values: dict = {}
    values.update(zip(jaxpr.constvars, program.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def value(atom):
        return atom.val if hasattr(atom, "val") else values[atom]

    for operation in jaxpr.eqns:
        given = [value(atom) for atom in operation.invars]
        results = operation.primitive.bind(*given, **operation.primitive.get_bind_params(operation.params))
        results = results if operation.primitive.multiple_results else [results]
        if _finite(given) and not _finite(results):
            _within(operation, given)
            raise _NotFinite(_message(operation, results))
        values.update(zip(operation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _within(operation, given):
    """Runs the program inside an operation, if there is one; a loop runs one iteration at a time."""
    kind, params = operation.primitive.name, operation.params
    if kind == "scan":
        # JAX versions name the numbers of constants, carries and rows differently, but a row always has one axis less.
        body = params["jaxpr"]
        carried = sum(out.aval.ndim == inner.ndim for out, inner in zip(operation.outvars, body.out_avals, strict=True))
        taken = sum(var.aval.ndim > inner.ndim for var, inner in zip(operation.invars, body.in_avals, strict=True))
        fixed = len(given) - carried - taken
        constant, carry, rows = given[:fixed], given[fixed : fixed + carried], given[fixed + carried :]
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            carry = _run(body, [*constant, *carry, *(row[i] for row in rows)])[:carried]
    elif kind == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        test, constant, carry = given[:first], given[first : first + second], given[first + second :]
        while _run(params["cond_jaxpr"], [*test, *carry])[0]:
            carry = _run(params["body_jaxpr"], [*constant, *carry])
    elif kind == "cond":
        _run(params["branches"][int(given[0])], given[1:])
    elif program := next((params[name] for name in ("jaxpr", "call_jaxpr") if name in params), None):
        _run(program if hasattr(program, "jaxpr") else jax.extend.core.ClosedJaxpr(program, ()), given)


def _finite(values):
    arrays = [value for value in values if jax.numpy.issubdtype(jax.numpy.result_type(value), jax.numpy.floating)]
    return all(bool(jax.numpy.all(jax.numpy.isfinite(array))) for array in arrays)


def _message(operation, results):
    """The operation, how much of its result is not finite, and the line of our code that it comes from."""
    wrong = next(result for result in results if not _finite([result]))
    count = int(np.sum(~np.isfinite(np.asarray(wrong, np.float32))))
    shape = "x".join(map(str, wrong.shape)) or "scalar"
    message = (
        f"begins in {operation.primitive.name}: {count} of {wrong.size} numbers of its result ({shape}) are not finite"
    )
    stack = operation.source_info.traceback
    for frame in stack.frames if stack else ():
        path = Path(frame.file_name)
        if path.is_relative_to(PACKAGE):
            return f"{message}; {path.relative_to(PACKAGE.parent)}:{frame.line_num} in {frame.function_name}"
    return message


def main(argv, reporter):
    """The command line."""
    parser = command.parser(prog="python -m rlhf_jax.replay", description="Repeats the update of an incident.")
    parser.add_argument("folder", help="a folder of WORKDIR/incident")
    folder = parser.parse_args(argv).folder
    sharding.devices()
    replay(folder, reporter)


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's: its errors are raised as well
    with command.errors(), Reporter() as reporter:
        main(sys.argv[1:], reporter)
