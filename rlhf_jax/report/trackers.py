"""A run's metrics in other programs: TensorBoard, Weights & Biases, MLflow. The record itself is metrics.jsonl.

`--config.log=tensorboard,wandb` chooses them. wandb and mlflow must be installed; their own environment variables say
where to: WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI (default: the current folder), MLFLOW_EXPERIMENT_NAME.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlhf_jax.errors import InputError

FLUSH_EVERY = 10.0  # seconds between flushes of the TensorBoard file: each one waits for the disk
MOST_PARAMS = 100  # that MLflow takes at once
PROJECT = "rlhf_jax"  # of wandb and mlflow, unless their variables name another one


class Run(NamedTuple):
    """What a tracker knows of a run."""

    folder: Path
    name: str
    config: dict[str, Any]  # {"ppo.lr": 3e-4}
    first_step: int = 0  # of what is written from now on; 0: a new run
    seen: frozenset[tuple[int, str]] = frozenset()  # (step, name) of what is written for the second time
    note: Callable[[str], Any] = str  # shows a line


class Tracker(Protocol):
    """Where metrics go. `key` is what a resumed run finds it by."""

    key: str

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records numbers."""

    def samples(self, step: int, name: str, rows: list[dict]) -> None:
        """Records completions: rows of texts and numbers."""

    def flush(self) -> None:
        """Whatever comes now, what was written is kept."""

    def close(self, failed: bool) -> None:
        """Ends the record."""


class TensorBoard:
    """An event file in folder/tensorboard. It hides the numbers that earlier files have from `first_step` on."""

    key = ""

    def __init__(self, run: Run):
        self._seen, folder = run.seen, run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("events.out.tfevents.*") if run.first_step == 0 else ():
            path.unlink()  # of a start that came to no checkpoint: this one repeats it
        # The step in the name keeps a run that resumes within a second from overwriting the earlier file.
        self._events = EventsWriter(str(folder / "events"), f".{run.first_step}")
        self._events.write_event(Event(step=run.first_step, session_log=SessionLog(status=SessionLog.START)))
        if run.config:
            # Without tensorboardX's `experiment`, the table has every hyperparameter and every number as a column.
            self._write(run.first_step, summary.hparams(run.config, {})[1])
        self._flushed = time.monotonic()

    def write(self, step, values):
        scalars = [summary.Summary.Value(tag=name, simple_value=number) for name, number in values.items()]
        self._write(step, summary.Summary(value=scalars))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self.flush()

    def samples(self, step, name, rows):
        if (step, name) not in self._seen:  # texts are not hidden
            self._write(step, summary.text(name, markdown(rows)))
            self.flush()

    def flush(self):
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self, failed):
        self._events.close()

    def _write(self, step, summary):
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))


class Wandb:
    """A run of Weights & Biases; offline, it is in folder/wandb."""

    def __init__(self, run: Run, key: str = ""):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=key or None,
            resume="allow",
            dir=run.folder,
            config=run.config,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.key = self._run.id
        # Our own steps on the x axis: wandb's only go up, and hold back a row until the next step.
        self._run.define_metric("*", step_metric="step")
        run.note(f"log: wandb: {Path(self._run.dir).parent if self._run.offline else self._run.url}")

    def write(self, step, values):
        self._run.log({"step": step} | values)

    def samples(self, step, name, rows):
        columns = list(rows[0])
        table = self._table(columns, [[row[column] for column in columns] for row in rows])
        self._run.log({"step": step, name: table})

    def flush(self):
        pass  # another process has it, which keeps it within seconds

    def close(self, failed):
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of an MLflow experiment."""

    def __init__(self, run: Run, key: str = ""):
        import mlflow

        self._metric, self._client, self.key = mlflow.entities.Metric, mlflow.MlflowClient(), key
        if key:
            self._client.update_run(key, "RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self._client.create_experiment(name)
            self.key = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [mlflow.entities.Param(field, str(value)) for field, value in run.config.items()]
            for i in range(0, len(params), MOST_PARAMS):
                self._client.log_batch(self.key, params=params[i : i + MOST_PARAMS])
        run.note(f"log: mlflow: run {self.key} at {mlflow.get_tracking_uri()}")

    def write(self, step, values):
        now = int(1000 * time.time())
        metrics = [self._metric(name, number, now, step) for name, number in values.items()]
        self._client.log_batch(self.key, metrics=metrics)

    def samples(self, step, name, rows):
        self._client.log_text(self.key, markdown(rows), f"{name}/{step}.md")

    def flush(self):
        pass  # every call is answered

    def close(self, failed):
        self._client.set_terminated(self.key, "FAILED" if failed else "FINISHED")


class _Service:
    """A tracker that is a program of its own. It keeps what it got, so that a resumed run sends it only what is new.

    A failure after its start is noted once, and ends no run: metrics.jsonl has everything.
    """

    def __init__(self, name: str, run: Run, key: str):
        self._name, self._run, self._failed = name, run, False
        try:
            self._tracker = SERVICES[name](run, key)
        except Exception as error:
            raise InputError(f"log: {name} did not start ({_line(error)})") from error
        self.key = self._tracker.key

    def write(self, step, values):
        if new := {name: number for name, number in values.items() if (step, name) not in self._run.seen}:
            self._try(self._tracker.write, step, new)

    def samples(self, step, name, rows):
        if (step, name) not in self._run.seen:
            self._try(self._tracker.samples, step, name, rows)

    def flush(self):
        self._try(self._tracker.flush)

    def close(self, failed):
        self._try(self._tracker.close, failed)

    def _try(self, function, *args):
        try:
            function(*args)
        except Exception as error:
            if not self._failed:
                self._run.note(f"log: {self._name} failed ({_line(error)}); metrics.jsonl has everything")
            self._failed = True


SERVICES: dict[str, Callable[[Run, str], Tracker]] = {"wandb": Wandb, "mlflow": MLflow}
DEFAULT = "tensorboard"
NAMES = (DEFAULT, *SERVICES)


def chosen(log: str) -> list[str]:
    """The names in a config's `log`, each once."""
    return list(dict.fromkeys(name for name in log.replace(" ", "").split(",") if name))


def problems(log: str) -> Iterator[tuple[str, str]]:
    """("log", what was expected) where one of the trackers is unknown or not installed."""
    if set(chosen(log)) - set(NAMES):
        yield "log", f"{', '.join(NAMES)}, or several of them with commas"
    for name in chosen(log):
        if name in SERVICES and not _installed(name):
            yield "log", f"{name} to be installed (pip install {name})"


def start(log: str, run: Run, keys: dict[str, str]) -> dict[str, Tracker]:
    """{name: the tracker} of a config's `log`. keys: {name: its key} of a run that is resumed."""
    for field, expected in problems(log):
        raise InputError(f"{field}: expected {expected}, got {log!r}")
    started: dict[str, Tracker] = {}
    for name in chosen(log):
        started[name] = _Service(name, run, keys.get(name, "")) if name in SERVICES else TensorBoard(run)
    return started


def _installed(name):
    """Whether there is such a module. A folder of that name, as wandb leaves one, is not enough."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def markdown(rows: list[dict]) -> str:
    """Samples as Markdown: the numbers of each, then its texts as they are."""
    text = "\n\n---\n\n".join(map(_sample, rows))
    return text.encode(errors="backslashreplace").decode()  # a model may write half a surrogate pair


def _sample(row):
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if not isinstance(value, str))
    texts = [f"{name}\n\n{_indented(value)}" for name, value in row.items() if isinstance(value, str)]
    return "\n\n".join(filter(None, [numbers, *texts]))


def _indented(text):
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
