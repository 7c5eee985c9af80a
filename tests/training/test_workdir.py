"""Files of a workdir that were damaged or edited: one line that names the file and the remedy."""

import json
import types

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Silent
from rlhf_jax.training import fit
from rlhf_jax.training.workdir import Workdir
from tests.support import error

DAMAGED = {"": "Expecting value", "[]": "got list", "[" * 5_000: "more than 100 levels deep", "\0": "Expecting value"}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "sft").mkdir()
    return Workdir(tmp_path)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_summary(content, workdir):
    path = workdir / "sft" / "summary.json"
    path.write_text(content)
    expected = f"workdir: {path}: expected an object in JSON ({DAMAGED[content]}); remove {path} to make it again"
    assert error(workdir.finished, "sft", 2) == expected


@pytest.mark.parametrize("seconds", [{}, {"seconds": None}, {"seconds": "3"}, {"seconds": True}])
def test_a_summary_without_its_seconds(seconds, workdir):
    path = workdir / "sft" / "summary.json"
    path.write_text(json.dumps({"sft/steps": 2} | seconds))
    assert (
        error(workdir.summary, "sft") == f"workdir: {path}: seconds: expected a number; remove {path} to make it again"
    )
    path.write_text(json.dumps({"sft/steps": 2, "seconds": 3}))
    assert workdir.finished("sft", 2) and not workdir.finished("sft", 3)


def test_metrics_that_are_gone(workdir):
    remedy = f"remove {workdir.path}/sft/summary.json to write its last row again"
    expected = f"workdir: {workdir.path}/sft/metrics.jsonl: expected the metrics of the stage, found none; {remedy}"
    assert error(workdir.rows, "sft") == expected
    (workdir / "sft" / "metrics.jsonl").write_text('{"step": 1, "time": 2}\n')
    assert workdir.rows("sft") == [{"step": 1, "time": 2}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"completion": "a"}\n{"comp', "Unterminated string starting at"),
        ("[]\n", "not an object with a completion on each line"),
        ('{"completion": 3}\n', "not an object with a completion on each line"),
        ("[" * 5_000, "more than 100 levels deep"),
        (None, "No such file or directory"),
    ],
)
def test_damaged_samples(content, why, workdir):
    path = workdir / "sft" / "samples.jsonl"
    if content is not None:
        path.write_text(content)
    again = f"remove {workdir.path}/sft/summary.json to make it again"
    assert error(workdir.samples, "sft") == f"workdir: {path}: expected the samples of the stage ({why}); {again}"


@pytest.mark.parametrize(
    ("content", "why"), [("{}", "what the stage was made with"), ("[1]", "an object in JSON .got l")]
)
def test_a_damaged_config_of_a_stage(content, why, workdir):
    (workdir / "sft" / "config.json").write_text(content)
    message = error(workdir.check, "sft", {"section": "sft", "sft": {"steps": 2}})
    assert message.startswith(f"workdir: {workdir.path}/sft/config.json: expected {why.split(' .')[0]}")
    assert message.endswith(f"; remove {workdir.path}/sft to make it again")


def test_checkpoints_that_are_all_damaged(tmp_path):
    def restore(like):
        raise InputError("no undamaged checkpoint: 2: damaged")

    state = types.SimpleNamespace(replace=lambda **_: None)
    stage = types.SimpleNamespace(name="sft", frozen=(), state=state)
    message = error(fit._resume, stage, types.SimpleNamespace(restore=restore), tmp_path, Silent())
    again = f"remove {tmp_path}/checkpoints to train sft again"
    assert message == f"workdir: no undamaged checkpoint: 2: damaged; {again}"


def test_a_folder_in_the_place_of_a_file(workdir):
    for name, write in (
        ("config.json", lambda: workdir.write_json("config.json", {})),
        ("samples.jsonl", lambda: workdir.write_lines("samples.jsonl", [])),
    ):
        (workdir / name).mkdir()
        assert error(write) == f"workdir: cannot write {workdir / name} (Is a directory); remove it"


def test_a_record_of_before_a_field_existed_has_its_default(tmp_path):
    """It is refused only where the field is another one now; what is no field is never made up."""
    there = Workdir(tmp_path, defaults={"sft.lr": 1.0, "sft.warmup": 5, "lora.rank": 0})
    older = {"sft": {"lr": 2.0, "schedule": "constant"}, "section": "sft", "sha256": {}}
    there.open("sft", older)
    now = {"sft": older["sft"] | {"warmup": 5}, "lora": {"rank": 0}}
    there.check("sft", older | now)
    for changes, words in (
        ({"lora": {"rank": 8}}, "lora.rank = 0, not 8"),
        ({"sft": now["sft"] | {"lr": 1.0}}, "sft.lr = 2.0, not 1.0"),
        ({"new": {"x": 1}}, "new.x = None, not 1"),
    ):
        assert words in error(there.check, "sft", older | now | changes)


def test_a_bucket_is_no_folder():
    assert error(Workdir, "gs://bucket/run") == (
        "workdir: gs://bucket/run: expected a folder; a bucket is mounted as one (docs/tpu.md)"
    )
