"""Checkpoints of a run, from the command line and from Python.

python -m rlhf_jax.checkpoint list runs/demo
python -m rlhf_jax.checkpoint describe runs/demo/ppo --step=50
python -m rlhf_jax.checkpoint load runs/demo/ppo --part=policy --out=policy.safetensors

from rlhf_jax import checkpoint
policy = checkpoint.load("runs/demo/ppo")["policy"]
"""

from rlhf_jax import command

if __name__ == "__main__":
    command.begin()  # the imports below take seconds

import logging
import math
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding
from rlhf_jax.training.checkpoint import FOLDERS, Checkpoints, by_name


def load(path, step=None):
    """A checkpoint as nested dicts of NumPy arrays: a stage's result or, at a step, its whole state.

    path is a stage's folder, its result/ or its checkpoints/. A stage without a result gives its newest checkpoint.
    Raises InputError if the path or the step is missing or damaged.
    """
    folder, step = _find(path, step)
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.read(step)[0]


def find_all(path):
    """[(folder, step)] of all checkpoints at or below a path, in order. Raises InputError if there are none."""
    if not str(path):
        raise InputError("path: expected a folder, got none")
    path = Path(path).expanduser().absolute()
    folders = [path] if path.name in FOLDERS else [p for name in FOLDERS for p in path.rglob(name) if p.is_dir()]
    steps = [(p, int(s.name)) for p in sorted(folders) for s in p.iterdir() if s.name.isdigit()]
    if not steps:
        raise InputError(f"{path}: expected the folder of a run or a stage with checkpoints, there are none")
    return sorted(steps)


def _find(path, step):
    """The (folder, step) of a stage: its result or, at a step, its checkpoint."""
    pairs = find_all(path)
    if len(stages := sorted({folder.parent.name for folder, _ in pairs})) > 1:
        raise InputError(f"{path}: expected the folder of one stage, there are {', '.join(stages)}")
    if step is None:
        return max(pairs, key=lambda pair: (pair[0].name == "result", pair[1]))
    matches = [pair for pair in pairs if pair[1] == step]
    if not matches:
        raise InputError(f"{path}: no checkpoint of step {step}, there are {', '.join(str(s) for _, s in pairs)}")
    return min(matches, key=lambda pair: pair[0].name)  # a checkpoint rather than the result


def main(argv, reporter):
    """The command line: see the top of this file."""
    parser = command.parser(prog="python -m rlhf_jax.checkpoint", description="Checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in (
        ("list", "all checkpoints of a run or a stage"),
        ("describe", "the arrays of a checkpoint"),
        ("load", "read a whole checkpoint and verify it; with --out, write its arrays as safetensors"),
    ):
        each = commands.add_parser(name, help=description)
        each.add_argument("path", help="folder of the run or the stage")
        if name != "list":
            each.add_argument("--step", type=int, help="default: the result of the stage, or the newest")
            each.add_argument("--part", default="", help="policy, value, optimizer/policy, ...; default: all")
        if name == "load":
            each.add_argument("--out", help="new file to write")
    args = parser.parse_args(argv)
    sharding.devices()
    {"list": _list, "describe": _describe, "load": _load}[args.command](args, reporter)


def _part(arrays, part, where):
    chosen = {name: leaf for name, leaf in arrays.items() if not part or f"{name}/".startswith(f"{part}/")}
    if not chosen:
        parts = sorted({name.split("/")[0] for name in arrays})
        raise InputError(f"--part: {where} has no {part}, it has {', '.join(parts)}")
    return chosen


def _list(args, reporter):
    rows, damaged = [], []
    for folder, step in find_all(args.path):
        with Checkpoints(folder, read_only=True) as checkpoints:
            try:
                arrays, best = checkpoints.describe(step)
                size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in arrays.values())
                rows.append((str(folder), str(step), str(len(arrays)), size / 2**20, best))
            except InputError as error:
                rows.append((str(folder), str(step), "damaged", None, None))
                damaged.append(str(error))
    reporter.table(("checkpoints", "step", "arrays", "MiB", "evaluation"), rows)
    for message in damaged:
        reporter.note(message)


def _describe(args, reporter):
    folder, step = _find(args.path, args.step)
    with Checkpoints(folder, read_only=True) as checkpoints:
        arrays, best = checkpoints.describe(step)
    chosen = _part(arrays, args.part, folder / str(step))
    evaluation = "" if best is None else f", evaluation {best}"
    reporter.note(f"{folder / str(step)}: {len(chosen)} arrays{evaluation}")
    rows = [(name, "x".join(map(str, leaf.shape)) or "1", str(np.dtype(leaf.dtype))) for name, leaf in chosen.items()]
    reporter.table(("array", "shape", "type"), rows)


def _load(args, reporter):
    out = Path(args.out).expanduser() if args.out else None
    if out and out.exists():
        raise InputError(f"--out: {out} exists already; expected a new file")
    if out and not out.absolute().parent.is_dir():
        raise InputError(f"--out: expected a file in a folder that exists, got {out}")
    folder, step = _find(args.path, args.step)
    with Checkpoints(folder, read_only=True) as checkpoints:
        arrays = checkpoints.read(step)[0]
    chosen = _part(by_name(arrays), args.part, folder / str(step))
    numbers = sum(array.size for array in chosen.values())
    reporter.note(f"{folder / str(step)}: {len(chosen)} arrays, {numbers:,} numbers, checksums verified")
    if out:
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in chosen.items()}, out)
        except SafetensorError as error:  # a full disk, a folder that cannot be written
            raise InputError(f"--out: cannot write {out} ({error})") from None
        reporter.note(f"written to {out}")


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's: its errors are raised as well
    with command.errors(), Reporter() as reporter:
        main(sys.argv[1:], reporter)
