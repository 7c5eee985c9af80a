"""A run's metrics: metrics.jsonl (the record; trackers.py has views of it) and summary.json (the result).

metrics.jsonl has one JSON object per line: {"step": 12, "time": 3.4, "ppo/score": 0.5}. `time` is in seconds of
training; a resumed run continues from its last kept line. JSON has no NaN, so a value that is not finite is written as
null and read back as NaN: the name is never left out, and a curve shows the gap.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError
from rlhf_jax.report import trackers

SAMPLES = "samples"  # name of the texts of an evaluation
TRACKERS = "trackers.json"  # in the workdir: the keys of runs that other programs keep
PACKAGES: tuple[str, ...] = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
PACKAGES += ("numpy", "tensorflow-datasets", "tokenizers")


class Writer:
    """Appends the metrics of one run to workdir/metrics.jsonl, and to the trackers of `log` (trackers.py).

        with Writer(workdir, resume_step=120) as log:
            log.write(121, {"sft/loss": loss})

    `resume_step` is the last step whose lines are kept. Those after it are dropped, because the run repeats these
    steps; so is a last line cut short by a kill. None is a new run, which keeps no lines. name, config ({"ppo.lr":
    3e-4}) and note (shows a line) are for the trackers. Raises InputError if the workdir cannot be written or has a
    damaged file, or a tracker cannot start.
    """

    def __init__(self, workdir, *, resume_step=None, log=trackers.DEFAULT, name="", config=None, note=str):
        workdir = Path(workdir).absolute()
        self._path, keys = workdir / "metrics.jsonl", workdir / TRACKERS
        first_step = 0 if resume_step is None else resume_step + 1
        resumed = resume_step is not None and self._path.exists()
        try:
            rows = read(self._path) if resumed else []
            kept = [row for row in rows if row["step"] < first_step]
            known = jsonfile.read(keys, "the keys of trackers") if resumed and keys.exists() else {}
            workdir.mkdir(parents=True, exist_ok=True)
            seen = frozenset(_seen(rows[len(kept) :]))
            run = trackers.Run(workdir, name, config or {}, first_step, seen, note)
            self._trackers = trackers.start(log, run, known)
            if found := {name: tracker.key for name, tracker in self._trackers.items() if tracker.key}:
                summarize(keys, known | found)
            replace(self._path, "".join(_line(row) for row in kept))
        except OSError as error:
            raise InputError(f"workdir {workdir}: expected a folder that can be written ({error.strerror})") from error
        self._started = time.monotonic() - (kept[-1]["time"] if kept else 0.0)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(failed=kind is not None)

    def write(self, step, values):
        """Records {name: float or 0-d array} at `step`; the names "step" and "time" are reserved."""
        values = {name: float(value) for name, value in values.items()}
        row = {"step": int(step), "time": round(time.monotonic() - self._started, 3), **values}
        with open(self._path, "ab", buffering=0) as file:
            file.write(_line(row).encode())  # unbuffered: a line is one write, which a kill cannot split
        for tracker in self._trackers.values():
            tracker.write(int(step), values)

    def samples(self, step, stage, rows):
        """Records the texts of an evaluation, before its numbers: a step that has those has its texts."""
        for tracker in self._trackers.values() if rows else ():
            tracker.samples(int(step), f"{stage}/{SAMPLES}", rows)

    def flush(self):
        """Waits until everything is written: before a checkpoint, so that a resumed run loses no step before it."""
        for tracker in self._trackers.values():
            tracker.flush()

    def close(self, failed=False):
        for tracker in self._trackers.values():
            tracker.close(failed)


class Unwritten(contextlib.nullcontext):
    """A Writer that writes nothing, for all processes but the first one of a run on several hosts."""

    def __init__(self, *_args, **_options):
        super().__init__(self)

    def write(self, step, values):
        pass

    def samples(self, step, stage, rows):
        pass

    def flush(self):
        pass


def _seen(rows):
    """(step, name) of what is in the rows, and of the samples of their evaluations."""
    for row in rows:
        for name in row:
            yield row["step"], name
            stage, _, metric = name.rpartition("/")
            if metric.startswith("eval_"):
                yield row["step"], f"{stage}/{SAMPLES}"


def read(path):
    """The rows of a metrics.jsonl, oldest first, with null as NaN and without an unfinished last line.

    Raises InputError if the file is missing, or damaged (naming the line).
    """
    path = Path(path)
    if not path.is_file():
        there = "something else; remove it" if path.exists() else "none"
        raise InputError(f"{path}: expected a metrics file, found {there}")
    *lines, _unfinished = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = {name: math.nan if value is None else value for name, value in jsonfile.parse(line.decode()).items()}
            if not {"step", "time"} <= row.keys() or any(type(value) not in (int, float) for value in row.values()):
                raise ValueError("not numbers, or not all")
        except (ValueError, AttributeError) as error:
            expected = 'expected a JSON object of numbers with "step" and "time"'
            raise InputError(f"{path} line {number}: {expected}; remove the line") from error
        rows.append(row)
    return rows


def series(rows, name):
    """(steps, values) of one metric, as arrays over the rows that have it; both are empty if none has."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64)


def summarize(path, summary):
    """Writes a nested dict of results as sorted JSON, whole or not at all; a value that is not finite is null."""
    replace(Path(path), json.dumps(_plain(summary), indent=2, sort_keys=True, allow_nan=False) + "\n")


def environment():
    """What a result depends on besides config and seed: {"versions": {package: version}, "machine": {...}}."""
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "devices": len(devices),
            "device_kind": devices[0].device_kind,
            "backend": devices[0].platform,
        },
    }


def peak_memory():
    """(bytes of this process, bytes of its fullest device), each the most until now; None where it is not counted."""
    kilo = 1 if sys.platform == "darwin" else 1024
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo, max(peaks, default=None)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # rlhf_jax, when it runs from a checkout


def _line(row):
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value):
    """The value in JSON's types: an array as a number or lists, a number that is not finite as None."""
    if type(value) is float:  # first, as rows of metrics hold little else
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and jax, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def replace(path, text):
    """Writes `text` to `path` whole or not at all: a reader or a crash finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
