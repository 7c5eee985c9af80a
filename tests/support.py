"""What several test files use: comparisons, errors, reporters that remember, what a run left, golden numbers."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.ops import logprobs
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent

GOLDENS = Path(__file__).parent / "goldens"
# Real people's writing is here at most, and never in the repository.
SHARED = Path(os.environ.get("RLHF_JAX_DATA", Path(__file__).parents[2] / "shared" / "data"))


def golden(name):
    """The content of a JSON file in tests/goldens."""
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


def shared(name):
    """The path of a file of the shared data; the test is skipped where it is absent, as it is in a clone."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared data has no {name} here")
    return path


# Numbers


def f32(*numbers):
    """A float32 array of these numbers."""
    return jnp.array(numbers, jnp.float32)


def assert_close(actual, expected, atol=1e-6):
    """Arrays that differ by at most atol, however large they are."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def assert_trees_close(actual, expected, atol, rtol=0):
    """Trees of the same structure whose leaves are close; the leaf that is not is named."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(actual, expected):
    """Trees of the same structure whose leaves have the same numbers."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Errors


def error(function, *args, **kwargs):
    """The message of the InputError that the call raises: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Configs and policies


def changed(config, **sections):
    """The config with other fields in its sections: changed(config, ppo={"steps": 3})."""
    sections = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **sections)


class TablePolicy:
    """A policy that is a table: params[v] are the logits of the token after token v."""

    @staticmethod
    def logprobs(table, tokens_BT, attend_BT, count, *, temperature):
        return logprobs.gather(logprobs.before(table[tokens_BT], count), tokens_BT[:, -count:], temperature=temperature)


# Reporters


class Recorder(Silent):
    """Remembers what was reported; `compiled_by` is how many programs were in `compiled` at (stage, step)."""

    def __init__(self, compiled=()):
        self.compiled, self.compiled_by = compiled, {}
        self.stages, self.notes, self.shown, self.tables = [], [], [], []

    def stage(self, name, total_steps, start=0):
        self.stages.append((name, total_steps, start))

    def update(self, step, metrics):
        self.compiled_by[self.stages[-1][0], step] = len(self.compiled)

    def note(self, text):
        self.notes.append(text)

    def samples(self, rows):
        self.shown.append(rows)

    def before_after(self, table):
        self.tables.append(table)


class StopsAt(Silent):
    """Sends SIGTERM, as a cluster does, when this step of this stage is reported."""

    def __init__(self, stage, step):
        self.when = (stage, step)

    def stage(self, name, total_steps, start=0):
        self.name = name

    def update(self, step, metrics):
        if (self.name, step) == self.when:
            self.when = None  # a second signal ends the program at once
            os.kill(os.getpid(), signal.SIGTERM)


# What a run leaves


def logged(workdir, stage):
    """The rows of metrics.jsonl, without the time they took."""
    rows = metrics.read(workdir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def samples(workdir, stage):
    """The rows of samples.jsonl."""
    return [json.loads(line) for line in (workdir / stage / "samples.jsonl").read_text().splitlines()]


def numbers(summary):
    """A summary without what the clock says."""
    return {name: value for name, value in summary.items() if not name.endswith("seconds")}


def on_disk(folder):
    """{path: bytes} of all files below the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
