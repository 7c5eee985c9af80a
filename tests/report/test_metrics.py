import importlib.machinery
import json
import math
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from rlhf_jax import config as configs
from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics, trackers
from tests.support import error


def events(workdir):
    """Every TensorBoard event, file by file. A TFRecord: length (8 bytes), checksum (4), the event, checksum (4)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:])):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, in seconds, as a list of one number to set."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_a_line_is_one_json_object(tmp_path, clock):
    with metrics.Writer(tmp_path / "new" / "sft") as log:
        clock[0] = 102.5
        log.write(1, {"sft/loss": jnp.float32(0.5), "sft/lr": np.float64(0.1), "sft/accuracy": 1})
    text = (tmp_path / "new" / "sft" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "time": 2.5, "sft/loss": 0.5, "sft/lr": 0.1, "sft/accuracy": 1.0}\n'


def test_a_line_is_on_disk_before_the_run_ends(tmp_path):
    with metrics.Writer(tmp_path) as log:
        log.write(1, {"sft/loss": 2.0})
        assert [row["sft/loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [2.0]


@given(st.lists(st.floats(width=64), max_size=8))
def test_numbers_come_back_exactly_and_not_finite_as_nan(tmp_path_factory, values):
    workdir = tmp_path_factory.mktemp("run")
    with metrics.Writer(workdir) as log:
        for step, value in enumerate(values):
            log.write(step, {"x": value})
    text = (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text  # neither is JSON
    rows = metrics.read(workdir / "metrics.jsonl")
    assert all(isinstance(row["x"], float) for row in rows)
    steps, read = metrics.series(rows, "x")
    assert steps.tolist() == list(range(len(values)))
    np.testing.assert_array_equal(read, [value if math.isfinite(value) else math.nan for value in values])


def test_series_takes_the_rows_that_have_the_name():
    rows = [{"step": 0, "time": 0, "a": 1.0}, {"step": 5, "time": 1, "b": 2.0}, {"step": 9, "time": 2, "a": 3.0}]
    steps, values = metrics.series(rows, "a")
    assert steps.tolist() == [0, 9] and values.tolist() == [1, 3]
    steps, values = metrics.series(rows, "c")
    assert steps.shape == values.shape == (0,)


def test_resuming_drops_the_steps_that_will_be_repeated_and_an_unfinished_line(tmp_path, clock):
    with metrics.Writer(tmp_path) as log:
        for step in (1, 2, 3):
            clock[0] += 1
            log.write(step, {"x": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "ti')
    clock[0] += 1000  # no training between the kill and the resume
    with metrics.Writer(tmp_path, resume_step=2) as log:
        kept = metrics.read(tmp_path / "metrics.jsonl")
        clock[0] += 1
        log.write(3, {"x": 30})
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in kept] == [1, 2]
    assert [(row["step"], row["time"], row["x"]) for row in rows] == [(1, 1, 1), (2, 2, 2), (3, 3, 30)]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_keeps_nothing(tmp_path):
    for step in (7, 8):
        with metrics.Writer(tmp_path) as log:
            log.write(step, {"x": 0.0})
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [8]


def test_a_new_run_ignores_the_files_of_an_old_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    metrics.Writer(tmp_path).close()
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_resuming_before_the_first_line_was_written(tmp_path):
    with metrics.Writer(tmp_path, resume_step=3) as log:
        log.write(4, {"x": 1.0})
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [4]


def test_a_reader_does_not_see_the_line_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0.1}\n{"step": 2, "time": 0.2, "x": 1')
    assert metrics.read(path) == [{"step": 1, "time": 0.1}]


@pytest.mark.parametrize(
    "bad",
    ["{", "[1]", '{"step": 1}', "\0\0", "[" * 9_999, '{"step": "1", "time": 1}', '{"step": 1, "time": 1, "x": []}'],
)
def test_a_damaged_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0.1}\n' + bad + "\n")
    with pytest.raises(
        InputError, match=r"metrics\.jsonl line 2: expected a JSON object of numbers .*; remove the line$"
    ):
        metrics.read(path)
    with pytest.raises(InputError, match="line 2"):
        metrics.Writer(tmp_path, resume_step=1)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.jsonl: expected a metrics file"):
        metrics.read(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match=": expected a metrics file, found something else; remove it$"):
        metrics.read(tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"workdir .*file/run: expected a folder that can be written"):
        metrics.Writer(tmp_path / "file" / "run")


def test_tensorboard_has_the_same_numbers(tmp_path, capfd):
    with metrics.Writer(tmp_path) as log:
        log.write(3, {"ppo/score": 0.5, "ppo/kl": math.nan})
    (event,) = [event for event in events(tmp_path) if event.HasField("summary")]
    score, kl = event.summary.value
    assert event.step == 3 and event.wall_time > 0
    assert (score.tag, score.simple_value, kl.tag) == ("ppo/score", 0.5, "ppo/kl") and math.isnan(kl.simple_value)
    assert capfd.readouterr() == ("", "")


def test_tensorboard_hides_the_steps_that_are_repeated(tmp_path):
    with metrics.Writer(tmp_path) as log:
        log.write(1, {"x": 1.0})
    with metrics.Writer(tmp_path, resume_step=0) as log:  # within the same second: the first file must survive
        log.write(1, {"x": 2.0})
    marks = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    values = [event.summary.value[0].simple_value for event in events(tmp_path) if event.HasField("summary")]
    assert marks == [0, 1] and values == [1, 2]


def test_tensorboard_has_a_text_once(tmp_path):
    """On the disk before the numbers of its evaluation, it is not written by a run that repeats the step."""
    rows = [{"completion": "c"}]
    with metrics.Writer(tmp_path) as log:
        log.samples(2, "a", rows)
        assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [2]
        log.write(2, {"a/eval_x": 1.0})
        log.write(3, {"a/x": 1.0})
    with metrics.Writer(tmp_path, resume_step=1) as log:
        for step in (2, 3):
            log.samples(step, "a", rows)
    assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [2, 2, 3, 3]
    metrics.Writer(tmp_path).close()
    assert not [event for event in events(tmp_path) if event.HasField("summary")]  # a new run is not the old one's


def test_tensorboard_is_flushed_while_the_run_goes_on(tmp_path, clock):
    with metrics.Writer(tmp_path) as log:
        clock[0] += trackers.FLUSH_EVERY + 1
        log.write(1, {"x": 1.0})
        assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [1]


def test_tensorboard_has_all_that_is_before_a_checkpoint(tmp_path):
    with metrics.Writer(tmp_path) as log:
        log.write(1, {"x": 1.0})
        log.flush()
        assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [1]


def test_tensorboard_has_samples_as_text_and_the_config_as_hyperparameters(tmp_path):
    config = {"ppo.lr": 0.5, "model.remat": False, "task": "write", "seed": 3}
    rows = [{"prompt": "a\n\nb", "completion": "*c*\ud800", "score": 1.25}, {"prompt": "", "completion": "d"}]
    with metrics.Writer(tmp_path, config=config) as log:
        log.samples(4, "ppo", rows)
        log.samples(5, "ppo", [])
    first, second = [event for event in events(tmp_path) if event.HasField("summary")]
    (value,) = first.summary.value
    assert value.metadata.plugin_data.plugin_name == "hparams"
    start = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()} == config
    (value,) = second.summary.value
    assert (second.step, value.tag, value.metadata.plugin_data.plugin_name) == (4, "ppo/samples/text_summary", "text")
    assert value.tensor.string_val[0].decode() == (
        "score 1.25\n\nprompt\n\n    a\n    \n    b\n\ncompletion\n\n    *c*\\ud800"
        "\n\n---\n\nprompt\n\n    \n\ncompletion\n\n    d"
    )


# Programs that may be installed


class Service:
    """Stands in for the modules wandb and mlflow: remembers what it is given, run by run."""

    def __init__(self, monkeypatch):
        self.runs, self.fails = {}, False
        wandb = types.SimpleNamespace(init=self.init, Settings=dict, Table=lambda columns, rows: (columns, rows))
        entities = types.SimpleNamespace(
            Metric=lambda name, number, now, step: (step, name, number), Param=lambda field, value: (field, value)
        )
        mlflow = types.SimpleNamespace(MlflowClient=lambda: self, entities=entities, get_tracking_uri=lambda: "here")
        for name, module in (("wandb", wandb), ("mlflow", mlflow)):
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
            monkeypatch.setitem(sys.modules, name, module)

    def begin(self, key, name, config):
        self.runs.setdefault(key, {"name": name, "config": config, "rows": [], "texts": [], "ended": []})
        return key

    # wandb

    def init(self, *, project, name, id, resume, dir, config, settings):
        assert (project, resume) == ("rlhf_jax", "allow")
        run = types.SimpleNamespace(
            id=self.begin(id or f"wandb{len(self.runs)}", name, config), offline=True, dir=f"{dir}/files"
        )
        run.define_metric = lambda name, step_metric: None
        run.log = lambda values: self.add(
            run.id, values["step"], {name: values[name] for name in values.keys() - {"step"}}
        )
        run.finish = lambda exit_code: self.runs[run.id]["ended"].append(exit_code)
        return run

    def add(self, key, step, values):
        if self.fails:
            raise ConnectionError("no network\nat all")
        for name, value in values.items():
            self.runs[key]["texts" if isinstance(value, tuple) else "rows"].append((step, name, value))

    # mlflow

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment, run_name):
        assert experiment == "rlhf_jax"
        key = self.begin(f"mlflow{len(self.runs)}", run_name, {})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=key))

    def update_run(self, key, status):
        assert key in self.runs

    def log_batch(self, key, metrics=(), params=()):
        self.add(key, None, {})
        self.runs[key]["rows"] += metrics
        self.runs[key]["config"] |= params

    def log_text(self, key, text, path):
        self.add(key, 0, {path: (text,)})

    def set_terminated(self, key, status):
        self.runs[key]["ended"].append(status)


@pytest.fixture
def service(monkeypatch):
    return Service(monkeypatch)


SAMPLE = [{"prompt": "p", "completion": "c", "score": 1.0}]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_another_program_gets_each_number_once(name, service, tmp_path):
    """The rows that a resumed run repeats are there already; a new run in the folder is another one there."""
    parts = {"log": name, "name": "demo/a", "config": {"ppo.lr": 0.5}}
    with pytest.raises(KeyboardInterrupt), metrics.Writer(tmp_path, **parts) as log:
        for step in range(3):
            log.write(step, {"a/x": step} | ({"a/eval_x": 0} if step == 2 else {}))
        log.samples(2, "a", SAMPLE)
        raise KeyboardInterrupt
    with metrics.Writer(tmp_path, resume_step=0, **parts) as log:
        for step in range(1, 5):
            log.write(step, {"a/x": step, "a/y": 9})
            log.samples(step, "a", SAMPLE)
    (run,) = service.runs.values()
    assert run["name"] == "demo/a" and {field: str(value) for field, value in run["config"].items()} == {
        "ppo.lr": "0.5"
    }
    assert [row for row in run["rows"] if row[1] == "a/x"] == [(step, "a/x", step) for step in range(5)]
    assert [step for step, name, _ in run["rows"] if name == "a/y"] == [1, 2, 3, 4]
    assert len(run["texts"]) == 4 and len(run["ended"]) == 2 and run["ended"][0] != run["ended"][1]
    metrics.Writer(tmp_path, **parts).close()
    assert len(service.runs) == 2


def test_a_program_that_fails_ends_no_run(service, tmp_path):
    notes = []
    with metrics.Writer(tmp_path, log="tensorboard,wandb, mlflow", note=notes.append) as log:
        service.fails = True
        for step in range(3):
            log.write(step, {"x": 1.0})
        log.samples(2, "a", SAMPLE)
    failed = [note for note in notes if "failed" in note]
    assert failed == [
        f"log: {name} failed (ConnectionError: no network); metrics.jsonl has everything"
        for name in ("wandb", "mlflow")
    ]
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 3 and (tmp_path / "tensorboard").exists()


def test_a_program_that_does_not_start_is_an_error(service, tmp_path):
    service.init = None
    sys.modules["wandb"].init = service.init
    message = error(metrics.Writer, tmp_path, log="wandb")
    assert message == "log: wandb did not start (TypeError: 'NoneType' object is not callable)"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("tensorbord", "log: expected tensorboard, wandb, mlflow, or several of them with commas, got 'tensorbord'"),
        ("tensorboard,wandb", "log: expected wandb to be installed (pip install wandb), got 'tensorboard,wandb'"),
        ("mlflow", "log: expected mlflow to be installed (pip install mlflow), got 'mlflow'"),
    ],
)
def test_what_cannot_be_logged_to_is_an_error_before_anything_is_written(log, expected, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder that wandb has left is no module
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", absent(trackers.importlib.util.find_spec))
    assert error(configs.check, configs.Config(log=log)) == expected
    assert error(metrics.Writer, tmp_path / "run", log=log) == expected
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def absent(find_spec):
    """find_spec where neither is installed; a folder is still found."""
    return lambda name: found if (found := find_spec(name)) and not found.origin else None


def test_several_trackers_and_none(tmp_path):
    assert trackers.chosen(" tensorboard,tensorboard ,wandb,") == ["tensorboard", "wandb"]
    with metrics.Writer(tmp_path, log="") as log:
        log.write(1, {"x": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_peak_of_the_fullest_device(monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: n and {"peak_bytes_in_use": n}) for n in (3, 7, None)]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)
    process, device = metrics.peak_memory()
    assert process > 1e7 and device == 7
    devices[:2] = []
    assert metrics.peak_memory()[1] is None


def test_summary_is_sorted_json(tmp_path):
    path = tmp_path / "summary.json"
    interval = np.float64(0.25), np.float64("inf")
    metrics.summarize(path, {"b": jnp.float32(0.5), "a": {"ci95": interval, "n": 3, "name": "x"}})
    text = path.read_text()
    assert json.loads(text) == {"a": {"ci95": [0.25, None], "n": 3, "name": "x"}, "b": 0.5}
    assert text.index('"a"') < text.index('"b"') and len(text.splitlines()) > 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_summary_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    metrics.summarize(path, {"a": 1})
    monkeypatch.setattr(metrics.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        metrics.summarize(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_environment_names_versions_and_machine(tmp_path):
    environment = metrics.environment()
    versions, machine = environment["versions"], environment["machine"]
    assert {"python", "rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= versions.keys()
    assert {"numpy", "tensorflow-datasets", "tokenizers"} <= versions.keys()
    assert versions["numpy"] == np.__version__
    assert machine["cpus"] >= 1 and machine["devices"] >= 1 and machine["device_kind"] and machine["platform"]
    metrics.summarize(tmp_path / "summary.json", environment)  # it is JSON


def test_a_checkout_has_an_environment_too(monkeypatch):
    monkeypatch.setattr(metrics, "PACKAGES", ("no-such-package",))
    assert metrics.environment()["versions"]["no-such-package"] == "not installed"
