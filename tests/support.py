"""What several test files use: comparisons, errors, reporters that remember, runs, what they leave, golden numbers."""

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax import checkpoint
from rlhf_jax import config as configs
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.ops import logprobs
from rlhf_jax.pipeline import Stages
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent
from rlhf_jax.training import sharding
from rlhf_jax.training.workdir import Workdir

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


def needed(program, how):
    """The path of a program. Without it a test is skipped, or fails where nothing may be skipped: in CI."""
    path = shutil.which(program)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is missing: {how}")
    return path


# A program ends at once where XLA_FLAGS has an unknown flag, and JAX 0.11 removed the one on the kernels of fusions.
FUSION_EMITTERS = jax.version.__version_info__ < (0, 11)

# jax.jit(compiler_options=OPTIMIZED): for tests that compare the bits of two programs, whatever the flags of the tests
OPTIMIZED = {"xla_backend_optimization_level": 1}


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


def differ(ours, theirs):
    """Whether any number of two trees is another."""
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), ours, theirs)))


# Errors


def error(function, *args, **kwargs):
    """The message of the InputError that the call raises: one line."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Configs, runs and policies


def changed(config, **sections):
    """The config with other fields in its sections: changed(config, seed=2, ppo={"steps": 3})."""
    sections = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(config, **sections)


def smallest(folder):
    """The config of a run on the smallest world, by characters, which is generated into the folder."""
    sizes = {"world_sft": 12, "world_preferences": 8, "world_prompts": 8, "world_held_out": 12}
    return configs.Config(
        text=configs.Text(kind="char"),
        data=sources.Config(**sizes, cache=str(folder), prompt_length=300, response_length=80),
        model=decoder.Config(layers=1, heads=2, head_size=7, width=16, context=380),
    )


def write_rows(path, rows):
    """Writes rows as JSONL, CSV or Parquet, by the path's suffix; returns the path as text."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def stages(config, workdir, reporter=None):
    """The stages of a config in a workdir, with a Recorder as reporter."""
    return Stages(config, Workdir(workdir), reporter or Recorder())


def linked(workdir, folder):
    """Makes a folder that has the stages of a finished run, and returns its config, which may be written changed."""
    folder.mkdir()
    for name in ("text", "sft", "reward", "ppo"):
        (folder / name).symlink_to(workdir / name)
    return json.loads((workdir / "config.json").read_text())


def opened(steps, name):
    """The folder of a stage, made as its training makes it."""
    steps._open()
    return steps.workdir.open(name, steps.depends(name))


def branch(steps, workdir, *finished, **changes):
    """The stages of another config, with these finished ones of `steps` as if they had been its own."""
    other = stages(changed(steps.config, **changes), workdir)
    assert other.setup.tokenizer  # kept before there are stages that were made with it
    for name in finished:
        shutil.copytree(steps.workdir / name, other.workdir / name)
        opened(other, name)
    return other


def trained(steps, stage, field):
    """A parameter tree that is the stage's result."""
    apply = steps.setup.apply
    trunk = sharding.like(_shapes(apply.policy), sharding.mesh())
    return steps.parameters(stage, field, apply.scalar.zero_head(trunk) if field in ("value", "reward") else trunk)


@functools.lru_cache
def _shapes(policy):
    return jax.eval_shape(policy.init, jax.random.key(0))


def last(steps, stage):
    """The arrays of the checkpoint after the stage's last step."""
    return checkpoint.load(steps.workdir / stage, steps.steps(stage))


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

    def table(self, header, rows):
        self.tables.append((header, rows))

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
    """The rows of metrics.jsonl, without what clock and memory say: steps 0, 1, ..., and the last evaluation."""
    rows = metrics.read(workdir / stage / "metrics.jsonl")
    machine = ("time", "seconds", "tokens_per_second", "host_memory", "device_memory")
    return [{name: value for name, value in row.items() if not name.split("/")[-1].startswith(machine)} for row in rows]


def samples(workdir, stage):
    """The rows of samples.jsonl."""
    return [json.loads(line) for line in (workdir / stage / "samples.jsonl").read_text().splitlines()]


def numbers(summary):
    """A summary without what the clock says."""
    return {name: value for name, value in summary.items() if not name.endswith("seconds")}


def on_disk(folder):
    """{path: bytes} of all files below the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
