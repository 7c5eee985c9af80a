"""Checkpoints of a run, from the command line and from Python.

python -m rlhf_jax.checkpoint list runs/demo
python -m rlhf_jax.checkpoint describe runs/demo/ppo --step=50
python -m rlhf_jax.checkpoint load runs/demo/ppo --part=policy --out=policy.safetensors

from rlhf_jax import checkpoint
policy = checkpoint.load("runs/demo/ppo")["policy"]
"""

import argparse
import logging
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.training.checkpoint import FOLDERS, Checkpoints, by_name


def load(path, step=None):
    """A checkpoint as nested dicts of NumPy arrays: of a stage's folder its result, at a step its whole state.

    path is a stage's folder, its result/ or its checkpoints/. Raises InputError where it, or the step, is not there
    or is damaged.
    """
    folder, step = _find(path, step)
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.read(step)[0]


def found(path):
    """[(folder, step)] of all checkpoints at or below a path, in order. InputError where there are none."""
    path = Path(path).absolute()
    folders = [path] if path.name in FOLDERS else [p for name in FOLDERS for p in path.rglob(name) if p.is_dir()]
    steps = [(p, int(s.name)) for p in sorted(folders) for s in p.iterdir() if s.name.isdigit()]
    if not steps:
        raise InputError(f"{path}: expected the folder of a run or a stage with checkpoints, there are none")
    return sorted(steps)


def _find(path, step):
    """The (folder, step) of a stage: its result or, at a step, its checkpoint."""
    there = found(path)
    if len(stages := sorted({folder.parent.name for folder, _ in there})) > 1:
        raise InputError(f"{path}: expected the folder of one stage, there are {', '.join(stages)}")
    if step is None:
        return max(there, key=lambda pair: (pair[0].name == "result", pair[1]))
    found_steps = [pair for pair in there if pair[1] == step]
    if not found_steps:
        raise InputError(f"{path}: no checkpoint of step {step}, there are {', '.join(str(s) for _, s in there)}")
    return min(found_steps, key=lambda pair: pair[0].name)  # checkpoints before result


def main(argv, reporter):
    """The command line: see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_jax.checkpoint", description="Checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in (
        ("list", "all checkpoints of a run or a stage"),
        ("describe", "the arrays of one"),
        ("load", "read one whole and check it; with --out, write its arrays as safetensors"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("path", help="folder of the run or the stage")
        if name != "list":
            command.add_argument("--step", type=int, help="default: the result of the stage, or the newest")
            command.add_argument("--part", default="", help="policy, value, optimizer/policy, ...; default: all")
        if name == "load":
            command.add_argument("--out", help="file to write, new")
    asked = parser.parse_args(argv)
    {"list": _list, "describe": _describe, "load": _load}[asked.command](asked, reporter)


def _part(arrays, part, where):
    chosen = {name: leaf for name, leaf in arrays.items() if not part or f"{name}/".startswith(f"{part}/")}
    if not chosen:
        parts = sorted({name.split("/")[0] for name in arrays})
        raise InputError(f"--part: {where} has no {part}, it has {', '.join(parts)}")
    return chosen


def _list(asked, reporter):
    rows, damaged = [], []
    for folder, step in found(asked.path):
        with Checkpoints(folder, read_only=True) as checkpoints:
            try:
                arrays, best = checkpoints.describe(step)
                size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in arrays.values())
                rows.append((str(folder), str(step), str(len(arrays)), size / 2**20, best))
            except InputError as error:
                rows.append((str(folder), str(step), "damaged", None, None))
                damaged.append(str(error))
    reporter.table(("checkpoints", "step", "arrays", "MiB", "evaluation"), rows)
    for told in damaged:
        reporter.note(told)


def _describe(asked, reporter):
    folder, step = _find(asked.path, asked.step)
    with Checkpoints(folder, read_only=True) as checkpoints:
        arrays, best = checkpoints.describe(step)
    chosen = _part(arrays, asked.part, folder / str(step))
    told = "" if best is None else f", evaluation {best}"
    reporter.note(f"{folder / str(step)}: {len(chosen)} arrays{told}")
    rows = [(name, "x".join(map(str, leaf.shape)) or "1", str(np.dtype(leaf.dtype))) for name, leaf in chosen.items()]
    reporter.table(("array", "shape", "type"), rows)


def _load(asked, reporter):
    folder, step = _find(asked.path, asked.step)
    with Checkpoints(folder, read_only=True) as checkpoints:
        arrays = checkpoints.read(step)[0]
    chosen = _part(by_name(arrays), asked.part, folder / str(step))
    numbers = sum(array.size for array in chosen.values())
    reporter.note(f"{folder / str(step)}: {len(chosen)} arrays, {numbers:,} numbers, all as they were saved")
    if asked.out:
        if Path(asked.out).exists():
            raise InputError(f"--out: {asked.out} exists already; expected a new file")
        save_file({name: np.ascontiguousarray(array) for name, array in chosen.items()}, asked.out)
        reporter.note(f"written to {asked.out}")


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's: its errors are raised as well
    with Reporter() as reporter:
        try:
            main(sys.argv[1:], reporter)
        except InputError as error:
            sys.exit(str(error))
