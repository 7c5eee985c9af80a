"""A run's metrics: metrics.jsonl (the record), TensorBoard events (a view of it), summary.json (the result).

metrics.jsonl has one JSON object per line: {"step": 12, "time": 3.4, "ppo/score": 0.5}. `time` is in seconds of
training; a resumed run continues from its last kept line. JSON has no NaN, so a value that is not finite is written as
null and read back as NaN: the name is never left out, and a curve shows the gap.
"""

import importlib.metadata
import json
import math
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError

EVENTS_EVERY = 10.0  # seconds between flushes of the TensorBoard file: each one waits for the disk
PACKAGES: tuple[str, ...] = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
PACKAGES += ("numpy", "tensorflow-datasets", "tokenizers")


class Writer:
    """Appends the metrics of one run to workdir/metrics.jsonl and workdir/tensorboard.

        with Writer(workdir, resume_step=120) as log:
            log.write(121, {"sft/loss": loss})

    `resume_step` is the last step of the restored checkpoint. Lines after it are dropped, because the run repeats these
    steps; so is a last line cut short by a kill. None is a new run, which keeps no lines. Raises InputError if the
    workdir cannot be written or has a damaged file.
    """

    def __init__(self, workdir, *, resume_step=None):
        workdir = Path(workdir).absolute()
        self._path = workdir / "metrics.jsonl"
        first_step = 0 if resume_step is None else resume_step + 1
        try:
            resumed = resume_step is not None and self._path.exists()
            kept = [row for row in read(self._path) if row["step"] < first_step] if resumed else []
            (workdir / "tensorboard").mkdir(parents=True, exist_ok=True)
            replace(self._path, "".join(_line(row) for row in kept))
            # The step in the name keeps a run that resumes within a second from overwriting the earlier file.
            self._events = EventsWriter(str(workdir / "tensorboard" / "events"), f".{first_step}")
        except OSError as error:
            raise InputError(f"workdir {workdir}: expected a folder that can be written ({error.strerror})") from error
        # This event makes TensorBoard hide the steps of earlier files from this step on.
        self._events.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = time.monotonic()
        self._started = time.monotonic() - (kept[-1]["time"] if kept else 0.0)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def write(self, step, values):
        """Records {name: float or 0-d array} at `step`; the names "step" and "time" are reserved."""
        values = {name: float(value) for name, value in values.items()}
        now = time.monotonic()
        row = {"step": int(step), "time": round(now - self._started, 3), **values}
        with open(self._path, "ab", buffering=0) as file:
            file.write(_line(row).encode())  # unbuffered: a line is one write, which a kill cannot split
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=int(step), summary=Summary(value=scalars)))
        if now - self._flushed > EVENTS_EVERY:
            self._events.flush()
            self._flushed = now

    def close(self):
        self._events.close()


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


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # rlhf_jax, when it runs from a checkout


def _line(row):
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value):
    """The value in JSON's types: an array as a number or lists, a number that is not finite as None."""
    if hasattr(value, "tolist"):  # numpy and jax, scalars and arrays
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def replace(path, text):
    """Writes `text` to `path` whole or not at all: a reader or a crash finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
