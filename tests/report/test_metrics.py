import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics


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


def test_tensorboard_is_flushed_while_the_run_goes_on(tmp_path, clock):
    with metrics.Writer(tmp_path) as log:
        clock[0] += metrics.EVENTS_EVERY + 1
        log.write(1, {"x": 1.0})
        assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [1]


def test_summary_is_sorted_json(tmp_path):
    path = tmp_path / "summary.json"
    metrics.summarize(path, {"b": jnp.float32(0.5), "a": {"ci95": (np.float64(0.25), math.inf), "n": 3, "name": "x"}})
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
