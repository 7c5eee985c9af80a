"""An update that was not finite, made again: does it come out the same, and where does it begin?

    python -m rlhf_jax.replay runs/demo/incident/ppo-17

The stage's own step runs twice from the state that was kept: operation by operation, up to the first that makes a
number that is not finite from numbers that are; and compiled, as it ran.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.extend.core
import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.rollout import Rollout
from rlhf_jax.training import guard, loop, sharding
from rlhf_jax.training.workdir import Workdir

PACKAGE = Path(__file__).parent


def replay(folder, reporter):
    """Makes the update of the incident in `folder` again: (names not finite, where it begins or None).

    `folder` is in WORKDIR/incident. Raises InputError where it holds no incident or is not in the workdir of its run.
    """
    folder = Path(folder).absolute()
    record = guard.read(folder)
    watch = Watch()
    stages = pipeline.Stages(configs.parse(record["config"]), Workdir(folder.parents[1]), reporter, jit=watch.jit)
    stage = stages.make(record["stage"])
    state, batch, rollout = guard.read_arrays(folder, stage.state)
    reported = guard.message(record["names"])
    reporter.note(f"{record['stage']} step {record['step']}: {reported} not finite, as it was reported")
    if int(state.applied):  # the policy has moved since it wrote the rollout, which is at hand
        update, given = stage.learn, Rollout(**rollout)
    else:
        update, given = _update_of(stage), sharding.shard(batch, stages.setup.mesh)
    place = watch.first(update, state, given)  # before the compiled update, which takes the state's buffers
    numbers = {f"{stage.name}/{name}": float(value) for name, value in update(state, given)[1].items()}
    names = loop.not_finite(numbers)
    taken = not numbers[f"{stage.name}/skipped"]
    reporter.note("made again: " + ("all finite" if taken else f"{guard.message(names)} not finite"))
    reporter.note(place or "operation by operation all is finite: it comes from how the program was compiled")
    return names, place


def _update_of(stage):
    """The stage's whole step as (state, batch) -> (state, numbers)."""
    return lambda state, batch: stage.step(state, batch)[:2]


class Watch:
    """Stands in for jax.jit, and can run what was given to it an operation at a time."""

    def __init__(self):
        self._on = False

    def jit(self, function, **options):
        """The compiled function; while `first` runs, its operations one by one."""
        compiled = jax.jit(function, **options)

        @functools.wraps(function)
        def call(*args):
            if not self._on:
                return compiled(*args)
            program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
            return jax.tree.unflatten(jax.tree.structure(shape), _run(program, jax.tree.leaves(args)))

        return call

    def first(self, step, *args):
        """A line about the first operation of step(*args) whose result is not finite, or None."""
        self._on = True
        try:
            step(*args)
        except _Found as found:
            return str(found)
        finally:
            self._on = False
        return None


class _Found(Exception):
    """The operation."""


def _run(program, args):
    """The results of a jaxpr. Raises _Found at its first operation that makes not finite of finite."""
    jaxpr, values = program.jaxpr, {}
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
            raise _Found(_told(operation, results))
        values.update(zip(operation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _within(operation, given):
    """Goes into an operation that is a program of its own; a loop is run a round at a time."""
    kind, params = operation.primitive.name, operation.params
    if kind == "scan":
        # How many are fixed, carried and taken row by row goes by another name in each JAX; a row has an axis less.
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


def _told(operation, results):
    """The operation, how much of its result is not finite, and the line of ours that it stands for."""
    wrong = next(result for result in results if not _finite([result]))
    count = int(np.sum(~np.isfinite(np.asarray(wrong, np.float32))))
    shape = "x".join(map(str, wrong.shape)) or "scalar"
    told = (
        f"begins in {operation.primitive.name}: {count} of {wrong.size} numbers of its result ({shape}) are not finite"
    )
    stack = operation.source_info.traceback
    for frame in stack.frames if stack else ():
        path = Path(frame.file_name)
        if path.is_relative_to(PACKAGE):
            return f"{told}; {path.relative_to(PACKAGE.parent)}:{frame.line_num} in {frame.function_name}"
    return told


def main(argv, reporter):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_jax.replay", description="Makes an incident's update again.")
    parser.add_argument("folder", help="a folder of WORKDIR/incident")
    replay(parser.parse_args(argv).folder, reporter)


if __name__ == "__main__":
    with Reporter() as reporter:
        try:
            main(sys.argv[1:], reporter)
        except InputError as error:
            sys.exit(str(error))
