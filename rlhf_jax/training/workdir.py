"""A run's folder, and everything that is written to it: lock, configs, metrics, checkpoints, samples, summaries.

In a stage's folder, config.json has what its numbers depend on, checkpoints/ the states to resume from, and result/ the
trained parameters. summary.json is written last and marks the stage as finished.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

from rlhf_jax import hosts, jsonfile
from rlhf_jax.errors import InputError, short
from rlhf_jax.report import metrics
from rlhf_jax.training.checkpoint import Checkpoints

MAY_CHANGE = ("steps", "eval_every", "save_every")  # of a stage's own section, from one start to the next


@dataclasses.dataclass
class Workdir:
    """The folder of a run. Raises InputError, in one line, where it cannot be written or read.

    Of several hosts, all read and the first one writes.
    """

    path: Path
    name: str = ""  # of the run, as people call it; default: the folder's
    defaults: dict = dataclasses.field(default_factory=dict)  # of fields, which a record may lack: see `check`
    _lock: int | None = None

    def __post_init__(self):
        if re.match(r"[a-z0-9]+:/", str(self.path)):
            raise InputError(f"workdir: {self.path}: expected a folder; a bucket is mounted as one (docs/tpu.md)")
        self.path = Path(self.path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"workdir: {self.path}: expected a folder, got a file")
        self.name = self.name or self.path.name

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def lock(self) -> None:
        """Makes the folder if needed, and locks it until the process ends, however it ends."""
        if self._lock is not None or not hosts.first():
            return
        with self._writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            path = self.path / "lock"
            file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            owner = f"{self.path} is in use by process {path.read_text() or 'unknown'}"
            raise InputError(f"workdir: {owner}; choose another --workdir") from None
        self._lock = file  # stays open: closing it would release the lock
        os.truncate(path, 0)
        os.write(file, str(os.getpid()).encode())

    def open(self, stage: str, depends: dict) -> Path:
        """Locks the workdir, writes the stage's config and returns the stage's folder."""
        self.lock()
        folder = self.path / stage
        if hosts.first():
            with self._writing(folder):
                (folder / "plots").mkdir(parents=True, exist_ok=True)
                metrics.summarize(folder / "config.json", depends)
        hosts.wait(f"open {stage}")
        if not folder.is_dir():
            raise InputError(f"workdir: {folder}: expected a folder that all hosts share; host 0 has made it")
        return folder

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file of the run, completely or not at all."""
        if not hosts.first():
            return
        self.lock()
        with self._writing(self.path / name):
            metrics.summarize(self.path / name, value)

    def write_lines(self, name: str, rows: list[dict]) -> None:
        """Writes a JSONL file of the run, completely or not at all."""
        if not hosts.first():
            return
        with self._writing(self.path / name):
            metrics.replace(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def append_line(self, name: str, row: dict) -> None:
        """Adds a row to a JSONL file of the run, whole and on disk when this returns; needs no lock."""
        line = json.dumps(row).encode() + b"\n"
        with self._writing(self.path / name), open(self.path / name, "ab+", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # another process died while it wrote
            file.write(line)
            os.fsync(file.fileno())

    def save_tokenizer(self, tokenizer: Any, made_of: dict) -> None:
        """Writes the tokenizer and what it was made of to text/."""
        if not hosts.first():
            return
        self.lock()
        with self._writing(self.path / "text"):
            tokenizer.save(self.path / "text")
            record = {"made_of": made_of, "fingerprint": tokenizer.fingerprint()}
            metrics.summarize(self.path / "text" / "made_of.json", record)

    def read_json(self, name: str, remove: Path | None = None) -> dict:
        """The object in a JSON file of the run. `remove`: what the error says to remove (default: the file)."""
        path = self.path / name
        try:
            return jsonfile.read(path, "an object in JSON", f"; remove {remove or path} to make it again")
        except InputError as error:
            raise InputError(f"workdir: {error}") from None

    def started(self, stage: str) -> bool:
        """True if the stage has been started."""
        return (self.path / stage / "config.json").exists()

    def finished(self, stage: str, steps: int) -> bool:
        """True if the stage is finished and has this number of steps."""
        path = self.path / stage / "summary.json"
        return path.exists() and self.summary(stage).get(f"{stage}/steps") == steps

    def summary(self, stage: str) -> dict:
        """The finished stage's summary.json."""
        summary = self.read_json(f"{stage}/summary.json")
        if f"{stage}/steps" in summary and type(summary.get("seconds")) not in (int, float):
            path = self.path / stage / "summary.json"
            raise InputError(f"workdir: {path}: seconds: expected a number; remove {path} to make it again")
        return summary

    def rows(self, stage: str) -> list[dict]:
        """The rows of the finished stage's metrics.jsonl."""
        path = self.path / stage / "metrics.jsonl"
        if not path.exists():
            again = f"remove {self.path / stage / 'summary.json'} to write its last row again"
            raise InputError(f"workdir: {path}: expected the metrics of the stage, found none; {again}")
        return metrics.read(path)

    def samples(self, stage: str) -> list[dict]:
        """The rows of the finished stage's samples.jsonl."""
        path = self.path / stage / "samples.jsonl"
        try:
            rows = [jsonfile.parse(line) for line in jsonfile.text(path).splitlines()]
            if not all(isinstance(row, dict) and isinstance(row.get("completion", ""), str) for row in rows):
                raise ValueError("not an object with a completion on each line")
        except (OSError, ValueError) as error:
            again = f"remove {self.path / stage / 'summary.json'} to make it again"
            raise InputError(
                f"workdir: {path}: expected the samples of the stage ({jsonfile.why(error)}); {again}"
            ) from None
        return rows

    def check(self, stage: str, depends: dict) -> None:
        """Refuses a stage's folder that was made with something else; the message has both values.

        A field that the record lacks did not exist when the stage was made: it has its default, {"ppo.lr": 1e-5, ...}.
        A field that only the record has, of a section that both have, no longer concerns the stage.
        """
        folder, path = self.path / stage, self.path / stage / "config.json"
        if not path.exists():
            if any((folder / name).exists() for name in ("checkpoints", "result", "summary.json")):
                raise InputError(f"workdir: {folder}: expected config.json, what it was made with; remove {folder}")
            return
        there = flat(self.read_json(f"{stage}/config.json", remove=folder))
        if "section" not in there:
            raise InputError(
                f"workdir: {path}: expected what the stage was made with; remove {folder} to make it again"
            )
        here = flat(json.loads(json.dumps(depends), parse_constant=lambda _: None))  # as NaN is written
        section = depends["section"]
        free = {f"{section}.{field}" for field in MAY_CHANGE}
        there = {name: value for name, value in self.defaults.items() if name in here} | there
        there = {name: value for name, value in there.items() if name in here or not _dropped(name, here)}
        # Contents come last: a place that is another one has other contents, too.
        for name in sorted((there | here).keys() - free, key=lambda name: (name.startswith("sha256."), name)):
            if there.get(name) != here.get(name):
                raise InputError(f"workdir: {path} was made with {_differing(name, there, here)}")
        before, now = there.get(f"{section}.steps"), here.get(f"{section}.steps")
        if before != now and here.get(f"{section}.schedule") != "constant":
            schedule = here.get(f"{section}.schedule")
            raise InputError(
                f"{section}.steps: {path} was made with {before} steps of a {schedule} schedule, and with {now} the "
                f"learning rate would jump; expected {before}, or another --workdir"
            )

    def parameters(self, stage: str, steps: int, field: str, like: Any) -> Any:
        """A parameter tree of a finished stage, shaped like `like`. A damaged result is an error, not an older one."""
        if not self.finished(stage, steps):
            raise InputError(f"workdir: expected a finished {stage} stage in {self.path / stage}; run it first")
        folder = self.path / stage / "result"
        restored, what = None, f"{folder}: no step {steps}"
        if folder.exists():
            try:
                with Checkpoints(folder, read_only=True) as checkpoints:
                    restored = checkpoints.restore({field: like})
            except InputError as error:
                what = str(error)
        if restored is None or restored.damaged or restored.step != steps:
            what = "; ".join(restored.damaged) if restored and restored.damaged else what
            again = f"remove {self.path / stage / 'summary.json'} to make it again"
            raise InputError(f"workdir: expected the result of {stage} ({what}); {again}")
        return restored.tree[field]

    @contextlib.contextmanager
    def _writing(self, path):
        try:
            yield
        except OSError as error:
            remedy = ""
            if error.errno == errno.EISDIR:  # a folder where a file should be
                path, remedy = error.filename2 or error.filename, "; remove it"
            raise InputError(f"workdir: cannot write {path} ({error.strerror}){remedy}") from error


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    values: dict = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return values


def _dropped(name, here) -> bool:
    """Whether a recorded name, or the field whose file was hashed, has left a section that is in `here`."""
    field = name.removeprefix("sha256.").split(" = ")[0]
    section = field.split(".")[0] + "."
    return field not in here and any(other.startswith(section) for other in here)


def _differing(name, there, here):
    """A message about the field, or the file, that has changed."""
    if name.startswith("sha256."):
        place = name.removeprefix("sha256.")
        was, now = (str(values.get(name))[:12] for values in (there, here))
        return f"other contents of {place} (sha256 {was}..., now {now}...); restore them, or choose another --workdir"
    was, now = (short(repr(values.get(name))) for values in (there, here))
    return f"{short(name)} = {was}, not {now}; choose another --workdir"
