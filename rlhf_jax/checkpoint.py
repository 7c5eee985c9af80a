"""Checkpoints: arrays, and what goes with them, as one atomic Orbax step that is checked when it is read.

    python -m rlhf_jax.checkpoint list runs/demo
    python -m rlhf_jax.checkpoint describe runs/demo/ppo --step=50
    python -m rlhf_jax.checkpoint load runs/demo/ppo --part=policy --out=policy.safetensors

    from rlhf_jax import checkpoint
    policy = checkpoint.load("runs/demo/ppo")["policy"]

Every array is stored with a checksum: a byte that has changed on the disk is found, which Orbax alone does not do.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gc
import io
import json
import logging
import math
import shutil
import sys
import time
import traceback
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from rlhf_jax.console import Reporter
from rlhf_jax.errors import InputError

FOLDERS = ("checkpoints", "result")  # of a stage: what it goes on from, and what it is for
DAMAGED = "damaged"  # beside them: what could not be read


@dataclasses.dataclass(frozen=True)
class Config:
    """Which checkpoints of a stage stay: these, together."""

    last: int = 2  # the newest
    best: int = 1  # those with the best evaluation, each saved when it was made; 0: none


@dataclasses.dataclass(frozen=True)
class Restored:
    """A sound checkpoint, and what was wrong with those after it."""

    step: int
    tree: object
    notes: dict  # as they were saved
    damaged: tuple[str, ...]


class Checkpoints:
    """The checkpoints under `directory`: one of a tree of arrays and JSON notes for every step saved.

    `best` names the number by which checkpoints are compared and whether its least or its most is wanted:
    ("sft/eval_loss", min). Use it as a context manager: leaving it waits for the writes under way, which Orbax would
    lose. Raises InputError where the folder cannot be written, or is too small for what shall be saved.
    """

    def __init__(self, directory, config=Config(), best=("", max), *, read_only=False):
        self.directory = Path(directory).absolute()
        self._metric, self._better = best
        last = ocp.checkpoint_managers.LatestN(config.last)
        most = ocp.checkpoint_managers.BestN(
            get_metric_fn=self._rank, n=config.best, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([last, most]),
            best_fn=self._rank,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._keeps_best = config.best > 0 and bool(self._metric)
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        with self._errors():
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._ranks = {}  # by step; Orbax tells them of those alone that it has written
        for step in self.steps:
            with contextlib.suppress(_Damage), _reading():
                self._ranks[step] = self._rank(self._manager.metrics(step))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with contextlib.suppress(InputError) if kind else contextlib.nullcontext(), self._errors():
            self._manager.close()

    @property
    def steps(self):
        """The steps saved, oldest first."""
        return sorted(self._manager.all_steps())

    def is_best(self, numbers):
        """True where these numbers are better than those of every checkpoint, if the best shall be kept."""
        if not self._keeps_best or self._metric not in numbers:
            return False
        return self._rank({"best": numbers[self._metric]}) > max(self._ranks.values(), default=-math.inf)

    def save(self, step, tree, notes, numbers=None):
        """Saves arrays (None where there are none) and JSON notes under this step, in the background.

        numbers, {name: float} of an evaluation, is where the number to compare by is found, if it is there.
        """
        tree = _keys_as_data(tree)
        notes = {"notes": notes, "checksums": _checksums(tree)}
        notes["checksum"] = _of_json(notes)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), data=ocp.args.JsonSave(notes))
        value = (numbers or {}).get(self._metric)
        metrics = {} if value is None else {"best": value}
        self._ranks[step] = self._rank(metrics)
        with self._errors():
            self._manager.wait_until_finished()
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            if size > (free := shutil.disk_usage(self.directory).free):  # Orbax would say so from its threads
                raise InputError(f"{self.directory}: expected room for {size:,} bytes, there are {free:,}")
            if step in self.steps:  # a result again, of a run that was killed before its summary
                self._manager.delete(step)
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, like):
        """The newest sound checkpoint as Restored, or None where there is none at all.

        `like` gives structure, shapes, types and placement, and is not read. Raises InputError where every checkpoint
        is damaged.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                tree, notes = self._read(step, _keys_as_data(like))
                return Restored(step, _keys_again(tree, like), notes, tuple(damaged))
            except _Damage as error:
                damaged.append(f"{self.directory / str(step)}: {error}")
        if damaged:
            raise InputError(f"no sound checkpoint: {'; '.join(damaged)}")
        return None

    def put_aside(self, step):
        """Moves a damaged checkpoint to DAMAGED beside this folder, where nothing reads or overwrites it."""
        folder = self.directory.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        place = next(path for i in range(1_000) if not (path := folder / f"{step}-{i}").exists())
        (self.directory / str(step)).rename(place)
        self._manager.reload()
        self._ranks.pop(step, None)
        return place

    def read(self, step):
        """(nested dicts of NumPy arrays, notes) of a step. Raises InputError where it is damaged."""
        with self._named(step):
            return self._read(step, None)

    def describe(self, step):
        """({array: what has its shape and dtype}, the number it was compared by or None) of a step, without its arrays.

        Raises InputError where it is damaged.
        """
        with self._named(step), _reading():
            arrays = self._manager.item_metadata(step).state.tree
            return _by_name(arrays), (self._manager.metrics(step) or {}).get("best")

    @contextlib.contextmanager
    def _named(self, step):
        try:
            yield
        except _Damage as error:
            raise InputError(f"{self.directory / str(step)}: {error}") from error

    def _read(self, step, like):
        with _reading():
            if like is None:
                metadata = self._manager.item_metadata(step).state.tree
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
                state = ocp.args.PyTreeRestore(restore_args=args)
            else:
                like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                args = ocp.checkpoint_utils.construct_restore_args(like)
                state = ocp.args.PyTreeRestore(like, restore_args=args, partial_restore=True)
            parts = self._manager.restore(step, args=ocp.args.Composite(state=state, data=ocp.args.JsonRestore()))
            notes = dict(parts.data)
            if notes.pop("checksum", None) != _of_json(notes):
                raise ValueError("its notes are not those that were saved")
            there, saved = _checksums(parts.state), notes["checksums"]
            for name in there if like is not None else saved:
                if saved.get(name) != there.get(name):
                    raise ValueError(f"the array {name} is not the one that was saved")
        return parts.state, notes["notes"]

    def _rank(self, metrics):
        value = (metrics or {}).get("best", math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self._better is max else -value

    @contextlib.contextmanager
    def _errors(self):
        """A folder that cannot be written or a disk that is full, as one line."""
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError) as error:
            told = getattr(error, "strerror", None) or _first_line(error)
            raise InputError(f"{self.directory}: cannot write the checkpoint ({told})") from error


class _Damage(Exception):
    """Why a checkpoint cannot be used."""


@contextlib.contextmanager
def _reading():
    """Any error is _Damage; what Orbax's tasks say of it when they are collected is kept from the terminal."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
                return
            except Exception as error:  # Orbax and TensorStore raise any kind, down to Exception itself
                told = _first_line(error)
                traceback.clear_frames(error.__traceback__)
            time.sleep(0.3)  # reads that are still under way complain too
            gc.collect()
    finally:
        sys.unraisablehook = hook
    raise _Damage(f"damaged ({told})")


def _first_line(error):
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _checksums(tree):
    """{"policy/wte/embedding": CRC-32 of its bytes}, of every array that this process holds the whole of."""
    leaves = {name: leaf for name, leaf in _by_name(tree).items() if _is_here(leaf)}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter
        return dict(zip(leaves, pool.map(_checksum, leaves.values()), strict=True))


def _by_name(tree):
    """{"policy/wte/embedding": leaf}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_here(leaf):
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _checksum(leaf):
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        # A view of its own: one kept by the array would keep its buffer from being donated.
        leaf = leaf.addressable_data(0)
    array = np.ascontiguousarray(leaf)
    return zlib.crc32(array.reshape(-1).view(np.uint8))


def _of_json(value):
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _keys_as_data(tree):
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _keys_again(tree, like):
    return jax.tree.map(lambda leaf, like: jax.random.wrap_key_data(leaf) if _is_key(like) else leaf, tree, like)


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
    chosen = _part(_by_name(arrays), asked.part, folder / str(step))
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
