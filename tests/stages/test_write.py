"""Pretraining, fine-tuning and reinforcement learning of the smallest writer, two seeds at once, from all sides."""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from rlhf_jax.run import Writing

from rlhf_jax import alarms, stages
from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient, ppo, supervised
from rlhf_jax.data import corpus
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import interval
from rlhf_jax.models import gpt2
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent
from rlhf_jax.training import loop

STAGES = ("pretrain", "sft", "rl")
NO_LIMITS = alarms.Config(distinct2=0.0, repeat_rate=1.0, entropy=0.0, length=0.0, kl_exact=0.0)


@pytest.fixture(scope="module")
def config():
    """Learning rates far too large, so that six steps change something."""
    often = {"steps": 6, "batch": 8, "eval_every": 2, "save_every": 4}
    return configs.Writing(
        seeds=2,
        text=configs.Text(kind="char"),
        data=corpus.Config(made=120, length=12),
        model=gpt2.Config(layers=1, heads=2, head_size=7, width=16, context=12, init_std=0.2),
        pretrain=supervised.Config(**often, lr=1e-2),
        sft=supervised.Config(**often, lr=1e-2),
        policy_gradient=policy_gradient.Config(**often, lr=3e-2, kl_target=0.1, kl_horizon=50, temperature=0.9),
        ppo=ppo.Config(
            **often,
            lr=3e-2,
            epochs=2,
            temperature=0.9,
            value_init="zero",
            missing_eos="subtract",
            missing_eos_penalty=0.0,
        ),
        alarms=NO_LIMITS,
        evaluation=configs.Evaluation(prompts=12, batch=8, temperature=0.9, samples=2),
    )


class Recorder(Silent):
    """Remembers the notes, the table, and how many programs had been compiled at each step."""

    def __init__(self, compiled=()):
        self.compiled, self.notes, self.tables, self.compiled_by = compiled, [], [], {}

    def stage(self, name, total_steps, start=0):
        self.name = name

    def update(self, step, metrics):
        self.compiled_by[self.name, step] = len(self.compiled)

    def note(self, text):
        self.notes.append(text)

    def before_after(self, table):
        self.tables.append(table)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory, compilations):
    """The whole run."""
    jax.clear_caches()
    with compilations() as compiled:
        reporter = Recorder(compiled)
        run = Writing(config, tmp_path_factory.mktemp("whole"), reporter)
        summary = stages.write(run)
    return types.SimpleNamespace(run=run, workdir=run.workdir, summary=summary, reporter=reporter)


def branch(whole, workdir, *finished, **changes):
    """A run with another config that has these stages of `whole` as if they had been its own."""
    run = Writing(dataclasses.replace(whole.run.config, **changes), workdir, Recorder())
    for stage in finished:
        shutil.copytree(whole.workdir / stage, workdir / stage)
        run.open(stage)
    return run


def logged(workdir, stage):
    rows = metrics.read(workdir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def samples(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "samples.jsonl").read_text().splitlines()]


def numbers(summary):
    return {name: value for name, value in summary.items() if not name.endswith("seconds")}


def policy(run, seed=0):
    """The policy that the rl stage left, of one seed."""
    like = run.apply.policy.init(jax.random.key(0))
    like = jax.tree.map(lambda x: np.zeros((run.config.seeds, *x.shape), x.dtype), like)
    return jax.tree.map(lambda x: x[seed], run.parameters("rl", "policy", like))


def test_the_summary_has_what_a_reader_looks_for(whole):
    names = {"pretrain/loss", "sft/loss", "rl/reward_before", "rl/reward_after", "rl/kl_exact", "rl/distinct2_before"}
    names |= {
        "rl/distinct2_after",
        "rl/repeat_rate",
        "pretrain/seconds",
        "sft/seconds",
        "rl/seconds",
        "seed",
        "versions",
    }
    assert names | {"rl/best_of_n_at_kl", "rl/best_step", "rl/seeds"} <= whole.summary.keys()
    assert len(whole.summary["rl/seeds"]["reward"]) == 2
    assert whole.summary["rl/reward_after"] == pytest.approx(np.mean(whole.summary["rl/seeds"]["reward"]))
    assert json.loads((whole.workdir / "summary.json").read_text()) == whole.summary


def test_every_stage_leaves_its_files(whole):
    for stage in STAGES:
        names = {"config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "plots"}
        names |= {"checkpoints", "result", "tensorboard"}
        assert {path.name for path in (whole.workdir / stage).iterdir()} == names
    assert {path.name for path in (whole.workdir / "rl" / "plots").iterdir()} == {
        "rl.png", "reward_over_kl.png", "before_after.png",
    }  # fmt: skip
    assert (whole.workdir / "plots" / "pipeline.png").exists()


def test_samples_of_three_stages_stand_side_by_side(whole):
    rows = samples(whole.workdir, "rl")
    assert len(rows) == 12 and set(rows[0]) == {"pretrain", "sft", "rl", "reward_sft", "reward_rl"}
    assert [row["pretrain"] for row in rows] == [row["completion"] for row in samples(whole.workdir, "pretrain")]
    for side in ("before", "after"):
        mean = np.mean([row["reward_sft" if side == "before" else "reward_rl"] for row in rows])
        seeds = whole.summary["rl/seeds"]["reward"]
        expected = whole.summary["rl/reward_before"] if side == "before" else seeds[0]
        assert mean == pytest.approx(expected, abs=1e-6)


def test_what_the_policy_is_worth_is_told_by_samples_that_it_was_not_chosen_on(whole):
    fresh = [row["sft"] for row in samples(whole.workdir, "rl")]
    assert set(fresh).isdisjoint(row["completion"] for row in samples(whole.workdir, "sft"))
    last = logged(whole.workdir, "rl")[-1]
    assert last["rl/eval_length"] != whole.summary["rl/length_after"]


def test_each_iteration_logs_reward_and_collapse_with_its_interval(whole):
    for row in logged(whole.workdir, "rl")[:6]:
        for name in ("reward", "distinct2", "repeat_rate", "entropy", "length", "kl_exact", "kl", "ess"):
            assert f"rl/{name}" in row and f"rl/{name}_ci95" in row, name
        assert row["rl/kl_exact"] >= 0 and row["rl/entropy"] >= 0 and row["rl/alarms"] == 0
    first = logged(whole.workdir, "rl")[0]
    assert first["rl/kl_exact"] < 1e-6 and first["rl/ess"] == pytest.approx(1, abs=1e-5)


def test_after_the_first_evaluation_nothing_is_compiled(whole):
    for stage, steady in (("pretrain", 3), ("sft", 3), ("rl", 3)):
        by = whole.reporter.compiled_by
        assert by[stage, 5] == by[stage, steady], stage


def test_the_table_compares_with_best_of_n(whole):
    ((*_, last),) = whole.reporter.tables
    assert last[0] == "best-of-n reward at this KL" and last[2] == whole.summary["rl/best_of_n_at_kl"]


class StopsAt(Silent):
    def __init__(self, *when):
        self.when = when

    def stage(self, name, total_steps, start=0):
        self.name = name

    def update(self, step, metrics):
        if (self.name, step) == self.when:
            self.when = None
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_in_every_stage_ends_as_one_that_was_not(whole, config, tmp_path):
    for when in ("pretrain", 1), ("sft", 4), ("rl", 3):
        with pytest.raises(loop.Stopped):
            stages.write(Writing(config, tmp_path, StopsAt(*when)))
    run = Writing(config, tmp_path)
    assert numbers(stages.write(run)) == numbers(whole.summary)
    for stage in STAGES:
        assert logged(tmp_path, stage) == logged(whole.workdir, stage)
    jax.tree.map(np.testing.assert_array_equal, policy(run, 1), policy(whole.run, 1))


def test_a_stage_that_was_killed_before_its_summary_ends_with_the_same(whole, tmp_path):
    run = branch(whole, tmp_path, *STAGES)
    (tmp_path / "rl" / "summary.json").unlink()
    stages.rl(run)
    assert numbers(run.summary("rl")) == numbers(whole.run.summary("rl"))


def test_a_seed_is_the_same_alone_and_among_others(whole, tmp_path):
    """One compiled program for both seeds draws what each would have drawn alone, and learns the same to rounding."""
    alone = branch(whole, tmp_path, "pretrain", "sft", seeds=1)
    stages.rl(alone)
    assert "rl/seeds" not in alone.summary("rl")
    for one, both in zip(logged(tmp_path, "rl")[:2], logged(whole.workdir, "rl"), strict=False):
        for name in ("rl/reward", "rl/kl_exact", "rl/length", "rl/policy_grad_norm"):
            away = both[f"{name}_ci95"] / (interval.t95(2) * 2**0.5)  # of either seed from their mean
            apart = abs(one[name] - both[name])
            assert apart == pytest.approx(away, rel=1e-2, abs=1e-5), (one["step"], name)
    different = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), policy(whole.run, 0), policy(whole.run, 1))
    assert max(jax.tree.leaves(different)) > 1e-2


def test_ppo_runs_on_the_same_task_by_one_field(whole, tmp_path):
    run = branch(whole, tmp_path, "pretrain", "sft", algorithm="ppo")
    summary = stages.rl(run)
    rows = logged(tmp_path, "rl")
    assert {"rl/clip_fraction", "rl/value_loss", "rl/ess_last", "rl/reward"} <= rows[0].keys()
    assert rows[0]["rl/reward"] == pytest.approx(logged(whole.workdir, "rl")[0]["rl/reward"])  # the same rollout
    assert summary["rl/kl_exact"] > 0


def test_outside_the_limits_nothing_is_kept(whole, tmp_path):
    """With no room for KL the best policy within the limits is the one it began with."""
    run = branch(whole, tmp_path, "pretrain", "sft", alarms=dataclasses.replace(NO_LIMITS, kl_exact=1e-9, freeze=False))
    summary = stages.rl(run)
    assert summary["rl/best_step"] == 0 and summary["rl/kl_exact"] < 1e-9
    assert summary["rl/reward_after"] == summary["rl/reward_before"]


def test_an_alarm_ends_the_learning_and_says_so(whole, tmp_path):
    limits = dataclasses.replace(NO_LIMITS, kl_exact=1e-9, patience=1)
    run = branch(whole, tmp_path, "pretrain", "sft", alarms=limits)
    stages.rl(run)
    rows = logged(tmp_path, "rl")
    # The first rollout is the SFT policy's. The second step learns from the one that rings: the alarm comes after it.
    rung = [row["rl/alarms"] for row in rows[:6]]
    silent = rung.index(2)
    assert rung[0] == 0 and rung[silent:] == [2] * (6 - silent) and silent <= 3
    for row in rows[silent + 1 : 6]:
        assert {name for name in row if "eval_" not in name} == {"step", "rl/alarms"}
    evaluated = [row["rl/eval_reward"] for row in rows[silent:6] if "rl/eval_reward" in row]
    assert len(evaluated) > 1 and len(set(evaluated)) == 1
    assert any(note.startswith(f"rl: alarm at step {silent + 1}: kl_exact") for note in run.reporter.notes)


def test_a_persons_own_reward_and_its_components(whole, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def mine(texts):\n    return {'long': [len(t) for t in texts], 'one': [1] * len(texts)}\n")
    run = Writing(dataclasses.replace(whole.run.config, reward=f"{path}:mine", seeds=1), tmp_path / "run")
    summary = stages.write(run)
    row = logged(tmp_path / "run", "rl")[0]
    assert row["rl/reward"] == pytest.approx(row["rl/reward_long"] + 1) and row["rl/reward_one"] == 1
    assert summary["pretrain/reward_one"] == 1


def test_stories_learn_by_their_reward_and_bpe(config, tmp_path):
    config = dataclasses.replace(
        config,
        seeds=1,
        text=configs.Text(kind="bpe", vocab_size=300),
        data=corpus.Config(kind="stories", made=120, length=12),
    )
    run = Writing(config, tmp_path)
    summary = stages.write(run)
    assert all(np.asarray(run.reward([row["text"] for row in run.rows("sft")[0]])[0]) > 0.05)
    assert len(run.rows("sft")[0]) < len(run.rows("pretrain")[0])
    assert {"pretrain/loss", "rl/reward_after"} <= summary.keys()


def test_no_happy_texts_are_an_error(config, tmp_path):
    config = dataclasses.replace(config, data=corpus.Config(kind="stories", made=60, length=12, min_reward=0.999))
    with pytest.raises(InputError, match="data.min_reward: expected texts with a reward above 0.999 on both sides"):
        stages.write(Writing(config, tmp_path))
    assert not (tmp_path / "pretrain").exists()
