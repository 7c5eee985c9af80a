"""Checkpoints: arrays and JSON notes as one atomic Orbax step, which is verified when it is read.

Every array is stored with a checksum, so a byte that has changed on the disk is detected; Orbax alone does not do that.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import math
import shutil
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.errors import InputError, listed
from rlhf_jax.fields import number
from rlhf_jax.training import crc, sharding

FOLDERS = ("checkpoints", "result")  # of a stage: its states to resume from, and its result
DAMAGED = "damaged"  # beside them: checkpoints that could not be read


@dataclasses.dataclass(frozen=True)
class Config:
    """How many checkpoints of a stage are kept: the newest and the best."""

    last: int = number(2, least=1, neutral=True)  # the newest; a run resumes from the newest undamaged one
    best: int = number(1, least=0, neutral=True)  # those with the best evaluations; 0: none


@dataclasses.dataclass(frozen=True)
class Restored:
    """An undamaged checkpoint, and why newer ones were not used."""

    step: int
    tree: object
    notes: dict  # as they were saved
    damaged: tuple[str, ...]  # a message for each damaged one


class Checkpoints:
    """The checkpoints under `directory`: for each saved step, a tree of arrays and JSON notes.

    `best` is the metric that checkpoints are compared by, and its better direction: ("sft/eval_loss", min). Use it as a
    context manager: leaving it waits for pending writes, which Orbax would lose. Raises InputError if the folder cannot
    be written, or the disk is too full for a checkpoint.
    """

    _saving: Any = None  # of several hosts, the manager that has saved last, whichever object it is of

    def __init__(self, directory, config=Config(), best=("", max), *, read_only=False):
        import orbax.checkpoint as ocp  # half a second, which no config waits for

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
        with self._errors("read" if read_only else "write"):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._ranks = {}  # by step; Orbax has none for pending writes
        for step in self.steps:
            with contextlib.suppress(_Damage), _reading():
                self._ranks[step] = self._rank(self._manager.metrics(step))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with contextlib.suppress(InputError) if kind else contextlib.nullcontext(), self._errors():
            self._manager.close()
        Checkpoints._saving = None

    @property
    def steps(self):
        """The steps saved, oldest first."""
        return sorted(self._manager.all_steps())

    def is_best(self, numbers):
        """Whether these numbers are better than every checkpoint's; False if the best are not kept."""
        if not self._keeps_best or self._metric not in numbers:
            return False
        return self._rank({"best": numbers[self._metric]}) > max(self._ranks.values(), default=-math.inf)

    def save(self, step, tree, notes, numbers=None):
        """Saves a tree of arrays (or None) and JSON notes under this step, in the background.

        numbers, {name: float}, are the metrics of an evaluation: checkpoints are compared by the one in `best`.
        """
        import orbax.checkpoint as ocp

        tree = _keys_as_data(sharding.everywhere(tree))
        notes = {"notes": notes, "checksums": _checksums(tree)}
        notes["checksum"] = _of_json(notes)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), data=ocp.args.JsonSave(notes))
        value = (numbers or {}).get(self._metric)
        metrics = {} if value is None else {"best": value}
        self._ranks[step] = self._rank(metrics)
        with self._errors():
            # Hosts count the saves of all managers together, and would wait for different ones if two went on at once.
            for manager in {self._manager, Checkpoints._saving or self._manager}:
                manager.wait_until_finished()
            Checkpoints._saving = self._manager if hosts.several() else None
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            if size > (free := shutil.disk_usage(self.directory).free):  # Orbax would raise this in its threads
                raise InputError(f"{self.directory}: expected room for {size:,} bytes, there are {free:,}")
            if step in self.steps:  # a result saved again: the run was killed before its summary
                self._manager.delete(step)
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def restore(self, like):
        """The newest undamaged checkpoint as Restored, or None if there are no checkpoints.

        `like` gives structure, shapes, types and placement; its values are not read. Raises InputError if every
        checkpoint is damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps):
            try:
                tree, notes = self._read(step, _keys_as_data(like))
                return Restored(step, _keys_again(tree, like), notes, tuple(damaged))
            except _Damage as error:
                damaged.append(f"{self.directory / str(step)}: {error}")
        if damaged:
            raise InputError(f"no undamaged checkpoint: {listed(damaged, '; ')}")
        return None

    def put_aside(self, step):
        """Moves a damaged checkpoint to DAMAGED beside this folder, where nothing reads or overwrites it."""

        def move():
            folder = self.directory.parent / DAMAGED
            folder.mkdir(exist_ok=True)
            place = next(path for i in range(1_000) if not (path := folder / f"{step}-{i}").exists())
            (self.directory / str(step)).rename(place)
            return str(place)

        place = Path(hosts.from_first(move))
        self._manager.reload()
        self._ranks.pop(step, None)
        return place

    def read(self, step):
        """(nested dicts of NumPy arrays, notes) of a step. Raises InputError if it is damaged."""
        with self._named(step):
            return self._read(step, None)

    def describe(self, step):
        """({array name: its shape and dtype}, the metric it is compared by or None) of a step, without reading arrays.

        Raises InputError if it is damaged.
        """
        with self._named(step), _reading():
            arrays = self._manager.item_metadata(step).state.tree
            return by_name(arrays), (self._manager.metrics(step) or {}).get("best")

    @contextlib.contextmanager
    def _named(self, step):
        try:
            yield
        except _Damage as error:
            raise InputError(f"{self.directory / str(step)}: {error}") from error

    def _read(self, step, like):
        import orbax.checkpoint as ocp

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
                raise ValueError("its notes differ from the saved ones")
            there, saved = _checksums(parts.state), notes["checksums"]
            for name in there if like is not None else saved:
                if saved.get(name) != there.get(name):
                    raise ValueError(f"the array {name} differs from the saved one")
        return parts.state, notes["notes"]

    def _rank(self, metrics):
        value = (metrics or {}).get("best", math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self._better is max else -value

    @contextlib.contextmanager
    def _errors(self, what="write"):
        """Turns errors of a folder that cannot be read or written, or of a full disk, into InputError."""
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or _first_line(error)
            raise InputError(f"{self.directory}: cannot {what} the checkpoint ({reason})") from error


class _Damage(Exception):
    """Why a checkpoint cannot be used."""


@contextlib.contextmanager
def _reading():
    """Turns any error into _Damage, and hides the messages of Orbax's unfinished tasks."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    alone = not gc.get_freeze_count()
    if alone:
        gc.freeze()  # what is collected below is what the reading has left, not all of the program
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                yield
                return
            except Exception as error:  # Orbax and TensorStore raise any kind, down to Exception itself
                reason = _first_line(error)
                traceback.clear_frames(error.__traceback__)
            time.sleep(0.3)  # pending reads write messages, too
            gc.collect()
    finally:
        sys.unraisablehook = hook
        if alone:
            gc.unfreeze()
    raise _Damage(f"damaged ({reason})")


def _first_line(error):
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def fingerprint(tree):
    """sha256 (hex) of the names and bytes of all arrays of a tree."""
    digest = hashlib.sha256()
    for name, leaf in sorted(by_name(_keys_as_data(tree)).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _checksums(tree):
    """{"policy/wte/embedding": CRC-32 of its bytes}, the same however the arrays lie on devices and hosts."""
    leaves = by_name(tree)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # zlib releases the interpreter lock
        found = dict(zip(leaves, pool.map(_checksum, leaves.values()), strict=True))
    spread = [name for name, leaf in leaves.items() if not _is_here(leaf)]
    if spread:  # a share from each host
        shares = sharding.of_each_host(np.array([found[name] for name in spread], np.uint32))
        found |= dict(zip(spread, map(int, np.bitwise_xor.reduce(shares)), strict=True))
    return found


def by_name(tree):
    """{"policy/wte/embedding": leaf}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_here(leaf):
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _checksum(leaf):
    """CRC-32 of the bytes of an array; of one that other hosts have a part of, this host's share in it."""
    if not _is_here(leaf):
        shards = [(shard.index, shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        first = jax.process_index() == 0
        return crc.of_shards(leaf.shape, leaf.dtype.itemsize, shards) ^ first * crc.of_zeros(leaf.nbytes)
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        # A separate view: one that the array caches would keep its buffer from being donated.
        leaf = leaf.addressable_data(0)
    array = np.ascontiguousarray(leaf)
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _of_json(value):
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _keys_as_data(tree):
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _keys_again(tree, like):
    return jax.tree.map(lambda leaf, like: jax.random.wrap_key_data(leaf) if _is_key(like) else leaf, tree, like)
