"""One whole run on the smallest world, looked at from all sides, and short runs that go on from its parts."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rlhf_jax.run import Summarization

from rlhf_jax import checkpoint, replay, stages
from rlhf_jax import config as configs
from rlhf_jax.algorithms import ppo, preference, supervised
from rlhf_jax.data import sources
from rlhf_jax.data.tldr import format_query
from rlhf_jax.errors import InputError
from rlhf_jax.models import gpt2
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent
from rlhf_jax.rewards import gold
from rlhf_jax.stages import common
from rlhf_jax.text import bpe
from rlhf_jax.training import guard, loop

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Learning rates far too large, so that six steps change something; temperatures that differ, and are not 1."""
    sizes = {"world_sft": 96, "world_preferences": 64, "world_prompts": 48, "world_held_out": 40}
    often = {"steps": 6, "batch": 8, "eval_every": 2, "save_every": 4}
    return configs.Config(
        text=configs.Text(kind="bpe", vocab_size=600),
        data=sources.Config(**sizes, cache=str(tmp_path_factory.mktemp("world")), prompt_length=72, response_length=20),
        model=gpt2.Config(layers=1, heads=2, head_size=7, width=16, context=96, init_std=0.2),
        sft=supervised.Config(**often, lr=1e-2),
        reward=preference.Config(**often, lr=1e-2, microbatches=2),
        ppo=ppo.Config(
            **often, lr=3e-2, epochs=3, minibatches=2, temperature=0.9, kl_target=0.1, kl_horizon=50, trace_epochs=True
        ),
        evaluation=configs.Evaluation(prompts=12, batch=8, temperature=0.7, samples=2),
    )


class Recorder(Silent):
    """Remembers what was reported, and how many programs had been compiled by then."""

    def __init__(self, compiled):
        self.compiled = compiled
        self.stages, self.notes, self.shown, self.tables, self.compiled_by = [], [], [], [], {}

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


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory, compilations):
    """The whole run. Its functions compile anew, whatever was compiled before it."""
    jax.clear_caches()
    with compilations() as compiled:
        reporter = Recorder(compiled)
        run = Summarization(config, tmp_path_factory.mktemp("whole"), reporter)
        summary = stages.summarize(run)
    return types.SimpleNamespace(run=run, workdir=run.workdir, summary=summary, reporter=reporter, compiled=compiled)


def changed(config, **sections):
    """changed(config, ppo={"steps": 3})"""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def branch(run, workdir, *finished, **changes):
    """A run with another config that has these stages of `run` as if they had been its own."""
    other = Summarization(changed(run.config, **changes), workdir)
    for stage in finished:
        shutil.copytree(run.workdir / stage, workdir / stage)
        other.open(stage)
    return other


def logged(workdir, stage):
    """What was logged, without the time it took."""
    rows = metrics.read(workdir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def samples(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "samples.jsonl").read_text().splitlines()]


def numbers(summary):
    """A summary without what the clock says."""
    return {name: value for name, value in summary.items() if not name.endswith("seconds")}


def trained(run, stage, field):
    """A parameter tree that is the stage's result."""
    trunk = run.apply.policy.init(jax.random.key(0))
    is_scalar = field == "value" or field == "reward"
    return run.parameters(stage, field, run.apply.scalar.zero_head(trunk) if is_scalar else trunk)


def last(run, stage):
    """The state after the stage's last step."""
    return checkpoint.load(run.workdir / stage, getattr(run.config, stage).steps)


def assert_same_bits(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def differ(ours, theirs):
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), ours, theirs)))


# What a run leaves


def test_every_stage_leaves_its_record(whole):
    for stage in STAGES:
        for name in "config.json", "metrics.jsonl", "summary.json", "samples.jsonl":
            assert (whole.workdir / stage / name).stat().st_size > 0
        assert list((whole.workdir / stage / "tensorboard").iterdir())
        saved = {int(path.name) for path in (whole.workdir / stage / "checkpoints").iterdir()}
        assert saved >= {4, 6} and len(saved) <= 3  # the last two, and the best
        assert [path.name for path in (whole.workdir / stage / "result").iterdir()] == ["6"]
    assert {path.name for path in whole.workdir.iterdir()} == {
        "lock", "config.json", "summary.json", "samples.jsonl", "plots", "text", *STAGES,
    }  # fmt: skip
    assert (whole.workdir / "samples.jsonl").read_bytes() == (whole.workdir / "ppo" / "samples.jsonl").read_bytes()


def test_there_are_pictures(whole):
    pictures = {str(path.relative_to(whole.workdir)) for path in whole.workdir.rglob("*.png")}
    ppo = {"score", "gold", "kl", "entropy", "clip_fraction", "length", "policy_loss", "value_loss", "before_after"}
    assert pictures >= {"plots/pipeline.png", "sft/plots/sft.png", "reward/plots/reward.png"}
    assert pictures >= {f"ppo/plots/{name}.png" for name in ppo}


def test_the_summary_has_what_was_promised(whole):
    assert whole.summary.keys() >= {
        "seconds", "seed", "versions", "machine", "sft/loss", "sft/gold", "sft/eos_rate", "reward/accuracy",
        "ppo/score", "ppo/score_sft", "ppo/gold", "ppo/gold_ci95", "ppo/win_rate", "ppo/win_rate_ci95",
        "ppo/kl", "ppo/kl_exact", "ppo/eos_rate", "ppo/length", "ppo/clip_fraction",
    }  # fmt: skip
    assert json.loads((whole.workdir / "summary.json").read_text()) == json.loads(json.dumps(whole.summary))
    assert whole.summary["seed"] == 1 and whole.summary["seconds"] > 0
    own = {name: value for stage in STAGES for name, value in whole.run.summary(stage).items() if "/" in name}
    assert own.items() <= json.loads((whole.workdir / "summary.json").read_text()).items()


def test_every_step_is_logged_once_and_the_last_evaluation_after_it(whole):
    for stage in STAGES:
        rows = logged(whole.workdir, stage)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
        assert [any("eval" in name for name in row) for row in rows] == [0, 1, 0, 1, 0, 0, 1]


def test_what_was_reported(whole):
    assert whole.reporter.stages == [(stage, 6, 0) for stage in STAGES]
    assert [len(rows) for rows in whole.reporter.shown] == [2, 2, 2]  # at steps 2, 4 and 6
    for row in (row for rows in whole.reporter.shown for row in rows):
        assert row.keys() == {"prompt", "completion", "score", "kl", "total", "gold"}
        assert row["total"] == pytest.approx(row["score"] - 0.05 * row["kl"])
    (table,) = whole.reporter.tables
    for name, before, after, change, (low, high) in table:
        assert (before, after) == (whole.summary[f"ppo/{name}_sft"], whole.summary[f"ppo/{name}"])
        assert change == pytest.approx(after - before, rel=1e-6, abs=1e-6) and low <= change <= high
    assert [row[0] for row in table] == ["gold", "score", "kl", "kl_exact", "eos_rate", "length"]


def test_a_finished_run_is_left_alone(whole, config):
    def times():
        return {path: path.stat().st_mtime_ns for stage in STAGES for path in (whole.workdir / stage).rglob("*")}

    before = times()
    reporter = Recorder([])
    summary = stages.summarize(Summarization(config, whole.workdir, reporter))
    assert times() == before
    assert reporter.stages == []
    assert reporter.notes[-3:] == [f"{stage}: finished with this config, skipped" for stage in STAGES]
    assert numbers(summary) == numbers(whole.summary)


# The numbers


def test_fine_tuning_is_measured_on_held_out_rows(whole):
    run, summary = whole.run, whole.summary
    held_out = run.arrays("sft")[1]
    tokens_NT = np.concatenate([held_out["prompt_NP"], held_out["response_NR"]], axis=1)
    real_NT = np.concatenate([held_out["prompt_mask_NP"], held_out["response_mask_NR"]], axis=1)
    policy = trained(run, "sft", "policy")
    logits_NTV = run.apply.policy.logits(policy, run.apply.policy.hidden(policy, tokens_NT, real_NT))
    logp_NTV = jax.nn.log_softmax(logits_NTV[:, :-1])
    logp_NT = np.take_along_axis(np.asarray(logp_NTV), tokens_NT[:, 1:, None], axis=2)[..., 0]
    predicted_NT = real_NT[:, 1:] & real_NT[:, :-1]
    assert summary["sft/loss"] == pytest.approx(-logp_NT[predicted_NT].mean(), abs=1e-5)
    assert summary["sft/perplexity"] == pytest.approx(np.exp(summary["sft/loss"]))
    rows = samples(whole.workdir, "sft")
    scores = [
        gold.score(row["record"], sample["completion"]) for row, sample in zip(run.asked("sft"), rows, strict=True)
    ]
    assert len(rows) == 12 and summary["sft/gold"] == pytest.approx(np.mean(scores))
    assert summary["sft/loss"] == logged(whole.workdir, "sft")[-1]["sft/eval_loss"]


def test_the_reward_models_accuracy_is_that_of_its_samples(whole):
    rows = samples(whole.workdir, "reward")
    assert len(rows) == len(whole.run.arrays("preferences")[1]["index_N"]) > 12
    assert whole.summary["reward/accuracy"] == np.mean([row["score_chosen"] > row["score_rejected"] for row in rows])
    low, high = whole.summary["reward/accuracy_ci95"]
    assert 0 <= low < whole.summary["reward/accuracy"] < high <= 1


def test_reference_summaries_score_mean_0_and_standard_deviation_1(whole):
    """invariant 12: once the reward model is trained, on held-out rows; before, they did not."""
    run = whole.run
    held_out = run.arrays("sft")[1]
    tokens_NT = np.concatenate([held_out["prompt_NP"], held_out["response_NR"]], axis=1)
    real_NT = np.concatenate([held_out["prompt_mask_NP"], held_out["response_mask_NR"]], axis=1)
    scores_N = run.apply.scalar.score(trained(run, "reward", "reward"), tokens_NT, real_NT)
    np.testing.assert_allclose([scores_N.mean(), scores_N.std()], [0, 1], atol=1e-5)
    assert abs(whole.summary["reward/reference_mean"]) > 0.01
    assert abs(whole.summary["reward/reference_std"] - 1) > 0.01


def test_references_may_score_mean_0_and_standard_deviation_1_before_training_too(whole, tmp_path):
    """A reward model that does not learn, as the references score it before the normalization that comes last."""
    run = branch(whole.run, tmp_path, "sft", reward={"lr": 1e-30, "steps": 1, "normalize_before": True})
    summary = stages.reward(run)
    assert abs(summary["reward/reference_mean"]) < 1e-5 and abs(summary["reward/reference_std"] - 1) < 1e-5


def test_ppo_is_compared_with_its_start_on_the_same_held_out_prompts(whole):
    run, summary = whole.run, whole.summary
    rows, asked = samples(whole.workdir, "ppo"), run.asked("prompts")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in asked] and len(rows) == 12
    assert {row["prompt"] for row in asked}.isdisjoint(row["prompt"] for row in run.rows("prompts")[0])
    gold_of = {}
    for side, suffix in ("sft", "_sft"), ("ppo", ""):
        gold_of[side] = [gold.score(asked[i]["record"], row[side]["completion"]) for i, row in enumerate(rows)]
        assert [row[side]["gold"] for row in rows] == gold_of[side]
        assert summary[f"ppo/gold{suffix}"] == pytest.approx(np.mean(gold_of[side]))
        for name in "score", "kl":
            mean = np.mean([row[side][name] for row in rows])
            assert summary[f"ppo/{name}{suffix}"] == pytest.approx(mean, abs=1e-5)
    gains = np.subtract(gold_of["ppo"], gold_of["sft"])
    half = 1.96 * gains.std(ddof=1) / 12**0.5
    assert summary["ppo/gold_gain"] == pytest.approx(gains.mean())
    assert summary["ppo/gold_ci95"] == pytest.approx((gains.mean() - half, gains.mean() + half), abs=1e-4)
    assert summary["ppo/gold_sft_sd"] == pytest.approx(np.std(gold_of["sft"]))
    assert summary["ppo/win_rate"] == np.mean((gains > 0) + (gains == 0) / 2)
    assert summary["ppo/win_rate_ci95"][0] < summary["ppo/win_rate"] < summary["ppo/win_rate_ci95"][1]
    assert summary["ppo/clip_fraction"] == logged(whole.workdir, "ppo")[5]["ppo/clip_fraction"]


def test_the_first_update_is_told_epoch_by_epoch(whole):
    """As running means, so that the last is what is logged of the whole update."""
    first, second, *_ = logged(whole.workdir, "ppo")
    for name in "ppo/approx_kl", "ppo/clip_fraction":
        told = whole.summary[f"{name}_first_update"]
        assert told == [first[f"{name}_epoch_{epoch}"] for epoch in (1, 2, 3)] == sorted(told)
        assert told[-1] == pytest.approx(first[name], rel=1e-6) and told[-1] != second[name]


def test_ppo_starts_where_fine_tuning_ended(whole):
    """invariant 5: KL is 0 by every estimator at step 0; later epochs clip, and then KL is not 0.

    What is logged is summed over a response; an estimator is of a token.
    """
    first, second, *_ = logged(whole.workdir, "ppo")
    for name in ("kl", "kl_k2", "kl_k3", "kl_exact"):
        assert abs(first[f"ppo/{name}"]) / first["ppo/length"] <= 1e-6
    for name in ("kl", "kl_exact"):
        assert abs(whole.summary[f"ppo/{name}_sft"]) / whole.summary["ppo/length_sft"] <= 1e-6
    assert first["ppo/clip_fraction"] > 0
    assert second["ppo/kl_exact"] > 1e-3 and whole.summary["ppo/kl_exact"] > 1e-3


def test_what_is_never_negative(whole):
    """invariant 15"""
    for row in logged(whole.workdir, "ppo")[:6]:
        assert row["ppo/entropy"] >= 0 and row["ppo/kl_exact"] >= 0 and row["ppo/kl_k3"] >= 0
        assert row["ppo/explained_variance"] <= 1


def test_reference_and_reward_are_bitwise_unchanged(whole):
    """invariant 14"""
    run = whole.run
    policy, reward = trained(run, "sft", "policy"), trained(run, "reward", "reward")
    assert_same_bits(last(run, "ppo")["reference"], policy)
    assert_same_bits(last(run, "ppo")["reward"], reward)
    assert differ(trained(run, "ppo", "policy"), policy) and differ(trained(run, "ppo", "value"), reward)
    assert differ(reward["trunk"], policy)


def test_the_optimizer_takes_a_step_for_every_minibatch_of_every_epoch(whole):
    """invariant 10"""
    config = whole.run.config.ppo
    saved = last(whole.run, "ppo")["optimizer"]
    assert saved.keys() == {"policy", "value"}
    counts = [int(leaf) for leaf in jax.tree.leaves(saved) if leaf.dtype == np.int32]
    assert counts and set(counts) == {config.steps * config.epochs * config.minibatches}


def test_nothing_compiles_after_the_first_iterations(whole):
    """The first six steps have two evaluations and a checkpoint: what the second needs, the first has compiled."""
    for stage in STAGES:
        assert whole.reporter.compiled_by[stage, 2] == whole.reporter.compiled_by[stage, 5]
    times = Counter(whole.compiled)
    once_a_stage = {"guarded_update": 3, "token_logprobs": 1, "sample": 1, "scores": 1, "score": 1, "collect": 1}
    assert {name: times[name] for name in once_a_stage} == once_a_stage
    assert times["judge"] == 2  # a temperature is part of the program


# Runs that go on from its parts


def test_a_policy_that_does_not_learn_stays_where_it_was(whole, tmp_path):
    """invariants 5, 11 and 12: KL 0, ratio 1, nothing clipped; both evaluations meet the same noise; a zero head."""
    still = {"lr": 1e-30, "epochs": 1, "minibatches": 1, "value_init": "zero", "steps": 3}
    run = branch(whole.run, tmp_path, "sft", "reward", ppo=still)
    summary = stages.ppo(run)
    rows = logged(tmp_path, "ppo")[:3]
    for row in rows:
        for name in ("kl", "kl_k2", "kl_k3", "kl_exact"):
            assert abs(row[f"ppo/{name}"]) / row["ppo/length"] <= 1e-6
        assert abs(row["ppo/ratio"] - 1) <= 1e-5 and row["ppo/clip_fraction"] == 0
    assert rows[0]["ppo/value"] == 0
    assert len({row["ppo/score"] for row in rows}) == 3  # other prompts, other noise
    assert summary["ppo/gold_gain"] == summary["ppo/score_gain"] == 0 and summary["ppo/win_rate"] == 0.5
    assert all(row["sft"] == row["ppo"] for row in samples(tmp_path, "ppo"))
    assert_same_bits(trained(run, "ppo", "policy"), last(run, "ppo")["reference"])


def test_dropout_is_for_fine_tuning_alone(whole, config, tmp_path):
    """invariant 10: from the same fine-tuned policy, the reward model and PPO come out the same bit for bit."""
    noisy = Summarization(changed(config, model={"dropout": 0.5}), tmp_path / "noisy")
    stages.sft(noisy)
    ours, theirs = logged(tmp_path / "noisy", "sft"), logged(whole.workdir, "sft")
    assert all(a["sft/loss"] != b["sft/loss"] for a, b in zip(ours[:6], theirs[:6], strict=True))
    run = branch(whole.run, tmp_path / "run", "sft", model={"dropout": 0.5})
    for stage in stages.reward, stages.ppo:
        stage(run)
    for stage in "reward", "ppo":
        assert logged(run.workdir, stage) == logged(whole.workdir, stage)


def test_the_seed_decides_everything(whole, config, tmp_path):
    """invariant 11: the same seed gives the same run bit for bit, another seed another."""
    again = Summarization(config, tmp_path / "again")
    stages.sft(again)
    assert logged(again.workdir, "sft") == logged(whole.workdir, "sft")
    assert_same_bits(trained(again, "sft", "policy"), trained(whole.run, "sft", "policy"))
    other = Summarization(dataclasses.replace(config, seed=2), tmp_path / "other")
    stages.sft(other)
    assert logged(other.workdir, "sft")[0]["sft/loss"] != logged(whole.workdir, "sft")[0]["sft/loss"]
    assert differ(trained(other, "sft", "policy"), trained(whole.run, "sft", "policy"))


class StopsAt(Silent):
    """Sends SIGTERM, as a cluster does, when this step of this stage is reported."""

    def __init__(self, *when):
        self.when = when

    def stage(self, name, total_steps, start=0):
        self.name = name

    def update(self, step, metrics):
        if (self.name, step) == self.when:
            self.when = None  # a second signal ends the program at once
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_in_every_stage_ends_as_one_that_was_not(whole, config, tmp_path):
    # In fine-tuning before an evaluation, which is made up for; in the others after one.
    for when, stopped_after in [(("sft", 1), 2), (("reward", 4), 4), (("ppo", 2), 2)]:
        with pytest.raises(loop.Stopped, match=f"stopped after step {stopped_after} of 6"):
            stages.summarize(Summarization(config, tmp_path, StopsAt(*when)))
        assert not (tmp_path / when[0] / "summary.json").exists()
    reporter = Recorder([])
    summary = stages.summarize(Summarization(config, tmp_path, reporter))
    assert reporter.stages == [("ppo", 6, 2)] and "ppo: goes on after step 2" in reporter.notes
    assert numbers(summary) == numbers(whole.summary)
    assert len({row["ppo/kl_coef"] for row in logged(tmp_path, "ppo")[:6]}) > 1  # the controller's state is saved too
    for stage in STAGES:
        assert logged(tmp_path, stage) == logged(whole.workdir, stage)
        assert samples(tmp_path, stage) == samples(whole.workdir, stage)
    run = Summarization(config, tmp_path)
    for stage, field in ("sft", "policy"), ("reward", "reward"), ("ppo", "policy"), ("ppo", "value"):
        assert_same_bits(trained(run, stage, field), trained(whole.run, stage, field))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_killed_before_its_summary_ends_with_the_same(stage, whole, tmp_path):
    run = branch(whole.run, tmp_path, *STAGES[: STAGES.index(stage) + 1])
    (tmp_path / stage / "summary.json").unlink()
    getattr(stages, stage)(run)
    assert numbers(run.summary(stage)) == numbers(whole.run.summary(stage))
    assert logged(tmp_path, stage) == logged(whole.workdir, stage)


def test_a_signal_in_the_last_step_stops_the_run_before_its_next_stage(config, tmp_path):
    with pytest.raises(loop.Stopped):
        stages.summarize(Summarization(config, tmp_path, StopsAt("sft", 6)))
    assert not (tmp_path / "reward").exists()


# More steps, other configs, other processes


def test_a_stage_that_is_given_more_steps_is_as_if_it_had_had_them(config, tmp_path):
    """run(2N) = run(N), then on to 2N: the result of the first half was saved apart from its training."""
    constant = changed(config, sft={"schedule": "constant", "save_every": 0}, reward={"schedule": "constant"})
    for steps, workdir in (3, "twice"), (6, "twice"), (6, "once"):
        run = Summarization(changed(constant, sft={"steps": steps}), tmp_path / workdir)
        stages.sft(run)
    for steps, workdir in (3, "twice"), (6, "twice"), (6, "once"):
        if workdir == "once":
            shutil.copytree(tmp_path / "twice" / "sft", tmp_path / "reward once" / "sft")
        folder = tmp_path / ("reward once" if workdir == "once" else "twice")
        reward = Summarization(changed(constant, sft={"steps": 6}, reward={"steps": steps}), folder)
        stages.reward(reward)
    for stage, ours, theirs in ("sft", "twice", "once"), ("reward", "twice", "reward once"):
        assert logged(tmp_path / ours, stage) == logged(tmp_path / theirs, stage)
        assert numbers(json.loads((tmp_path / ours / stage / "summary.json").read_text())) == numbers(
            json.loads((tmp_path / theirs / stage / "summary.json").read_text())
        )
        for step in (None, 6):
            assert_same_bits(
                checkpoint.load(tmp_path / ours / stage, step), checkpoint.load(tmp_path / theirs / stage, step)
            )


def test_what_may_change_from_one_start_to_the_next(whole, config, tmp_path):
    run = branch(whole.run, tmp_path, "sft")
    Summarization(changed(config, sft={"save_every": 1, "eval_every": 3}, keep={"last": 5}), tmp_path)
    with pytest.raises(InputError, match="sft.steps: expected at least 6, which .*/sft has done, got 4"):
        stages.sft(Summarization(changed(config, sft={"steps": 4}), tmp_path))
    for section, name, here, there in (
        ("sft", "lr", 1e-2, 1e-3),
        ("model", "width", 16, 8),
        ("data", "held_out", 0.1, 0.2),
    ):
        with pytest.raises(InputError, match=f"was made with {section}.{name} = {here}, not {there}; choose another"):
            Summarization(changed(config, **{section: {name: there}}), tmp_path)
    branch(run, tmp_path / "both", "sft", reward={"steps": 3})
    with pytest.raises(InputError, match="reward/config.json was made with sft.steps = 6, not 7"):
        (tmp_path / "both" / "reward").mkdir()
        shutil.copy(whole.workdir / "reward" / "config.json", tmp_path / "both" / "reward")
        Summarization(changed(config, sft={"steps": 7}), tmp_path / "both")


def test_two_processes_do_not_write_to_one_workdir(config, tmp_path):
    Summarization(config, tmp_path).open("sft")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0); "
    code += "f.write('4711'); f.flush(); print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "other"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        (tmp_path / "other").rename(tmp_path / "lock")
        with pytest.raises(InputError, match="is in use by process 4711; choose another --workdir"):
            Summarization(config, tmp_path).open("sft")
        other.kill()
    Summarization(config, tmp_path).open("sft")  # killed, it holds nothing


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's tasks
def test_a_damaged_checkpoint_is_told_and_put_aside_and_the_run_ends_as_ever(whole, tmp_path):
    run = branch(whole.run, tmp_path, "sft", "reward")
    (tmp_path / "reward" / "summary.json").unlink()
    newest = tmp_path / "reward" / "checkpoints" / "6"
    for path in (newest / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    run.reporter = Recorder([])
    stages.reward(run)
    notes = [note for note in run.reporter.notes if note.startswith("reward:")]
    assert notes[0].startswith(f"reward: {newest}: damaged (")
    assert notes[1:] == [
        f"reward: checkpoint 6 is now {tmp_path / 'reward' / 'damaged' / '6-0'}", "reward: goes on after step 4",
    ]  # fmt: skip
    assert logged(tmp_path, "reward") == logged(whole.workdir, "reward")
    assert_same_bits(trained(run, "reward", "reward"), trained(whole.run, "reward", "reward"))


def test_the_seconds_of_a_stage_are_those_of_all_its_starts(whole, tmp_path):
    run = branch(whole.run, tmp_path, "sft")
    (tmp_path / "sft" / "summary.json").unlink()
    rows = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row) | {"time": 1000.0} for row in rows]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 1000 < stages.sft(run)["seconds"] < 1100


# Numbers that go wrong


@pytest.mark.parametrize(
    ("stage", "field", "place"),
    [("sft", "policy", "gpt2.py"), ("reward", "reward", "gpt2.py"), ("ppo", "value", "gpt2.py")],
)
def test_an_update_that_is_not_finite_is_not_made_and_can_be_made_again(stage, field, place, whole, tmp_path):
    """A parameter that overflows, put into a checkpoint: what comes of it stops the run, and the place is found."""
    earlier = STAGES[: STAGES.index(stage)]
    run = branch(whole.run, tmp_path, *earlier, **{stage: {"steps": 3, "save_every": 2, "eval_every": 0}})
    training = stages.prepare(run, stage)
    huge = jax.tree.map(lambda x: x, getattr(training.state, field))
    trunk = huge if stage == "sft" else huge["trunk"]
    trunk["ln_f"] = trunk["ln_f"] | {"scale": trunk["ln_f"]["scale"] * 3e38}
    before = jax.tree.map(np.array, huge)
    state = training.state.replace(**{field: huge})
    with pytest.raises(guard.NonFinite, match=f"{stage} step 1: .* not finite, nothing was changed") as stopped:
        common.train(run, dataclasses.replace(training, state=state))
    assert not list((tmp_path / stage / "checkpoints").iterdir())
    folder = tmp_path / "incident" / f"{stage}-1"
    assert f"python -m rlhf_jax.replay {folder}" in str(stopped.value)
    told = guard.read(folder)
    assert told["names"] and all(name.startswith(f"{stage}/") for name in told["names"])
    kept = checkpoint.load(folder)
    assert_same_bits(kept[field], before)
    reporter = Recorder([])
    names, where = replay.replay(folder, reporter)
    assert names == told["names"] and place in where and where.startswith("begins in ")
    assert reporter.notes[-3].endswith("not finite, as in the run")
    assert reporter.notes[-2] == f"repeated: {', '.join(names)} not finite"


@pytest.mark.parametrize("limit", [9, 1])
def test_updates_may_be_skipped_up_to_a_limit(limit, whole, config, tmp_path):
    run = Summarization(changed(config, guard={"action": "skip", "limit": limit}, sft={"steps": 4}), tmp_path)
    run.reporter = Recorder([])
    prepared = stages.prepare(run, "sft")

    def step(state, batch):
        """Batches 2 and 3 are bad."""
        bad = int(state.step) in (1, 2)
        return prepared.step(state, batch | {"bad": jnp.float32(np.nan if bad else 0)})

    training = dataclasses.replace(prepared, step=step)
    if limit == 1:
        with pytest.raises(guard.NonFinite, match="guard.limit: expected at most 1 such updates"):
            common.train(run, training)
        return
    common.train(run, training)
    assert [row["sft/skipped"] for row in logged(tmp_path, "sft")[:4]] == [0, 1, 2, 2]
    assert sorted(path.name for path in (tmp_path / "incident").iterdir()) == ["sft-2", "sft-3"]
    assert sum("skipped, " in note for note in run.reporter.notes) == 2
    assert checkpoint.load(tmp_path / "sft", 4)["step"] == 4


def test_a_batch_of_more_rows_than_there_are_is_refused_before_anything_is_written(config, tmp_path):
    run = Summarization(changed(config, reward={"batch": 80}), tmp_path)
    with pytest.raises(InputError, match="reward.batch: expected .* got 80"):
        stages.summarize(run)
    assert not (tmp_path / "sft").exists()


# Rows in files


@pytest.fixture(scope="module")
def files(config, tmp_path_factory):
    """The run of a person's own rows: JSONL, CSV and Parquet, with a tokenizer in GPT-2's format."""
    folder = tmp_path_factory.mktemp("files")
    tokens = [*bpe.BYTES, "<|endoftext|>", "he", "Ġt", "Ġthe"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\nh e\nĠ t\nĠt he\n", encoding="utf-8")
    animals = ("cat", "dog", "owl", "pig", "hen")
    rows = [
        {
            "prompt": format_query("s", f"t{i}", f"the {animals[i % 5]} ate {i}" + "\nand then?" * (i % 7)),
            "label": f"the {animals[i % 5]} ate",
            "chosen": f"{animals[i % 5]} ate {i}",
            "rejected": "the the the",
        }
        for i in range(60)
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "preferences.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "prompts.parquet")
    paths = {"sft": "sft.jsonl", "preferences": "preferences.csv", "prompts": "prompts.parquet"}
    data = {name: str(folder / path) for name, path in paths.items()} | {"source": "files", "held_out": 0.3}
    config = changed(
        config,
        text={"kind": "gpt2", "path": str(folder)},
        data=data,
        evaluation={"temperature": config.ppo.temperature},  # one temperature, one program
    )
    reporter = Recorder([])
    run = Summarization(config, tmp_path_factory.mktemp("run"), reporter)
    return types.SimpleNamespace(run=run, summary=stages.summarize(run), reporter=reporter)


def test_rows_of_files_go_all_the_way(files):
    train, held_out = files.run.rows("sft")
    assert len(train) + len(held_out) == 60
    assert files.run.tokenizer.vocab_size == 261
    assert len(samples(files.run.workdir, "ppo")) == 12
    assert {"sft/loss", "reward/accuracy", "ppo/score", "ppo/score_ci95", "ppo/kl"} <= files.summary.keys()
    assert any(note.startswith("data.prompts, train:") and "cut prompts" in note for note in files.reporter.notes)


def test_rows_of_files_have_no_gold(files):
    names = {name for stage in STAGES for row in logged(files.run.workdir, stage) for name in row}
    names |= files.summary.keys() | {row[0] for row in files.reporter.tables[0]}
    assert not [name for name in names if "gold" in name or "win_rate" in name]
    assert all(row.keys() == {"prompt", "completion", "score", "kl", "total"} for row in files.reporter.shown[0])


def test_with_labels_to_compare_with_there_is_rouge(files, tmp_path):
    assert not [name for name in files.summary if "rouge" in name]  # a prompts file has no labels
    run = branch(files.run, tmp_path, "sft", "reward", data={"prompts": ""})
    summary = stages.ppo(run)
    for name in "rouge1", "rouge2", "rougeL":
        assert 0 <= summary[f"ppo/{name}"] <= 1 and 0 <= summary[f"ppo/{name}_sft"] <= 1
