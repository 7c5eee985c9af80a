"""Programs with one wrong operation in them: it is the one that is named. And incidents of PPO that are replayed."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import checkpoint, pipeline, replay
from rlhf_jax import config as configs
from rlhf_jax.algorithms import ppo
from rlhf_jax.data import sources
from rlhf_jax.models import decoder
from rlhf_jax.replay import Watch
from rlhf_jax.stages import rl
from rlhf_jax.training import guard
from rlhf_jax.training.fit import fit
from tests.support import Recorder, error, stages, write_rows

X = jnp.arange(4.0)


def first(function, *args):
    watch = Watch()
    return watch.first(watch.jit(function), *args)


def test_a_program_without_one():
    assert first(lambda x: jnp.where(x > 0, jnp.exp(x), 0.0).sum(), X) is None


def test_the_first_not_the_last_is_named():
    told = first(lambda x: jnp.sqrt(jnp.log(x - 1)) + 1, X)
    assert told.startswith("begins in log: 2 of 4 numbers of its result (4) are not finite")


def test_what_was_given_not_finite_begins_elsewhere():
    """A mask of -inf is no fault: what comes of it is finite again."""
    assert first(lambda x: jax.nn.softmax(jnp.where(x < 2, x, -jnp.inf)), X) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.jit(jnp.log)(x),
        lambda x: jax.lax.scan(lambda carry, row: (carry - 1, jnp.log(carry)), 2.0, x)[1],
        lambda x: jax.lax.scan(lambda carry, row: (jnp.log(row), row), 2.0, x, reverse=True)[0],
        lambda x: jax.lax.while_loop(lambda y: jnp.isfinite(y), lambda y: jnp.log(y), x[3]),
        lambda x: jax.lax.cond(x[0] == 0, jnp.log, jnp.exp, x),
        lambda x: jax.checkpoint(jnp.log)(x),
        lambda x: jax.vmap(jnp.log)(x),
    ],
    ids=["jit", "scan", "reverse scan", "while", "cond", "checkpoint", "vmap"],
)
def test_it_goes_into_programs_within(function):
    assert first(function, X).startswith("begins in log:")


def test_a_gradient():
    """sqrt is fine at 0; its gradient, 1 / (2 sqrt), is not."""
    told = first(lambda x: jax.grad(lambda x: jnp.sqrt(x).sum())(x), X)
    assert told.startswith("begins in div:") and "1 of 4" in told


def test_the_host_may_stand_between_two_programs():
    watch = Watch()
    half, log = watch.jit(lambda x: x / 2), watch.jit(jnp.log)
    assert watch.first(lambda x: log(np.asarray(half(x))), X).startswith("begins in log: 1 of 4")
    assert half(X).tolist() == [0, 0.5, 1, 1.5]  # compiled again


def test_results_are_those_of_the_compiled_program():
    def program(x, tree):
        total, rows = jax.lax.scan(lambda carry, row: (carry + row, carry * 2), 0.0, x)
        return {"a": total + tree["k"], "b": (rows, jax.random.normal(tree["key"], (3,)))}

    args = X, {"k": jnp.int32(3), "key": jax.random.key(5)}
    watch, results = Watch(), []
    step = watch.jit(program)
    watch.first(lambda *args: results.append(step(*args)), *args)
    jax.tree.map(np.testing.assert_array_equal, results[0], jax.jit(program)(*args))


# Incidents


@pytest.fixture(scope="module")
def exploding(tmp_path_factory):
    """PPO whose first optimizer step makes the weights 1e10 times as large, and whose second is not finite."""
    folder = tmp_path_factory.mktemp("exploding")
    rollouts = {"steps": 2, "batch": 4, "epochs": 1, "minibatches": 2, "lr": 10.0, "weight_decay": 1e9}
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(20)])
    return configs.Config(
        task="prompts",
        text=configs.Text(kind="char"),
        data=sources.Config(source="files", prompts=prompts, held_out=0.3, prompt_length=9, response_length=5),
        model=decoder.Config(layers=1, heads=2, head_size=7, width=16, context=20),
        sft=configs.Supervised(steps=0),
        reward=configs.Reward(kind="sentiment"),
        ppo=ppo.Config(**rollouts),
        evaluation=configs.Evaluation(prompts=4, batch=4, temperature=0.7),
    )


@pytest.fixture(scope="module")
def runs(exploding, tmp_path_factory):
    """runs(seeds): the workdir of a run that ended with the incident. Each is trained once."""

    @functools.cache
    def run(seeds):
        folder = tmp_path_factory.mktemp("runs")
        with pytest.raises(guard.NonFinite, match="ppo step 1: .* not finite, the step was not taken"):
            pipeline.run(dataclasses.replace(exploding, seeds=seeds), folder)
        return folder

    return run


@pytest.mark.parametrize("seeds", [1, 2])
def test_an_update_of_which_a_part_was_taken_is_replayed_from_its_rollout(seeds, runs, monkeypatch):
    """The policy has moved since, so it would not write that rollout again. Of several seeds, too."""
    folder = (runs(seeds) / "seeds" / "0" if seeds > 1 else runs(seeds)) / "incident" / "ppo-1"
    record, kept = guard.read(folder), checkpoint.load(folder)
    assert kept["state"]["applied"] == 1 and kept["rollout"]["response_BR"].shape == (4, 5)
    monkeypatch.setattr(rl.Iteration, "collect", lambda *_: pytest.fail("samples are taken anew"))
    reporter = Recorder()
    names, place = replay.replay(folder, reporter)
    assert names == record["names"] and names and place.startswith("begins in ")
    assert "rlhf_jax/" in place
    assert reporter.notes[-2:] == [f"repeated: {', '.join(names)} not finite", place]


def test_a_stage_that_was_made_in_python_is_replayed_with_it(exploding, tmp_path):
    """No config says how to make it; the message of the error says what to call."""
    (tmp_path / "text").mkdir()
    stage = stages(exploding, tmp_path / "of a config").make("ppo")
    with pytest.raises(guard.NonFinite, match=r"rlhf_jax\.replay\.replay\('.*/incident/ppo-1', stage=\.\.\.\) shows"):
        fit(stage, tmp_path / "run")
    folder, reporter = tmp_path / "run" / "incident" / "ppo-1", Recorder()
    assert error(replay.replay, folder).endswith("expected replay.replay(folder, stage=...)")
    names, place = replay.replay(folder, reporter, stage)
    assert names == guard.read(folder)["names"] and "rlhf_jax/" in place
    assert reporter.notes[-1] == place


def test_a_config_with_nan_in_it_is_replayed(exploding, tmp_path):
    """It is refused today, but a record may have it, as null."""
    folder = tmp_path / "incident" / "ppo-1"
    record = {"stage": "ppo", "config": json.loads(json.dumps(configs.tree(exploding)))}
    record["config"]["ppo"]["lam"] = None
    assert math.isnan(replay._stage(folder, record, Watch(), Recorder()).config.lam)


def test_the_incident_of_another_stage_is_refused(exploding, tmp_path):
    record = {"step": 1, "names": [], "config": configs.tree(exploding)}
    for stage, words in ("sft", "expected the incident of ppo, got 'sft'"), (3, "got 3"):
        (tmp_path / "incident.json").write_text(json.dumps(record | {"stage": stage}))
        assert error(replay.replay, tmp_path).endswith(words)
    (tmp_path / "incident.json").write_text(json.dumps(record | {"stage": "ppo", "config": 3}))
    assert "expected replay.replay(folder, stage=...)" in error(replay.replay, tmp_path)


def test_a_folder_that_is_no_incident(tmp_path):
    assert "incident.json: expected the record of an incident" in error(replay.replay, tmp_path, Recorder())
