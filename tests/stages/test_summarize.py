"""One whole run on the smallest world, looked at from all sides, and short runs that go on from its parts."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import checkpoint, pipeline
from rlhf_jax import config as configs
from rlhf_jax.algorithms import dpo, ppo
from rlhf_jax.config import Reward, Supervised
from rlhf_jax.data import sources
from rlhf_jax.data.tldr import format_query
from rlhf_jax.models import decoder
from rlhf_jax.report import metrics
from rlhf_jax.rewards import gold
from rlhf_jax.stages.preference import half
from rlhf_jax.text import bpe
from rlhf_jax.training import guard, loop, optim
from rlhf_jax.training.fit import fit
from rlhf_jax.training.guard import NonFinite
from rlhf_jax.viz.replay import replay
from rlhf_jax.viz.verify import IDENTITIES, verify
from tests.support import (
    Recorder,
    StopsAt,
    assert_trees_equal,
    branch,
    changed,
    differ,
    error,
    last,
    logged,
    numbers,
    opened,
    samples,
    stages,
    trained,
    write_rows,
)

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Learning rates far too large, so that six steps change something; temperatures that differ, and are not 1."""
    sizes = {"world_sft": 96, "world_preferences": 64, "world_prompts": 48, "world_held_out": 40}
    often = {"steps": 6, "batch": 8, "eval_every": 2, "save_every": 4}
    return configs.Config(
        text=configs.Text(kind="bpe", vocab_size=600),
        data=sources.Config(**sizes, cache=str(tmp_path_factory.mktemp("world")), prompt_length=72, response_length=20),
        model=decoder.Config(layers=1, heads=2, head_size=7, width=16, context=96, init_std=0.2),
        sft=Supervised(**often, lr=1e-2),
        reward=Reward(**often, lr=1e-2, microbatches=2),
        ppo=ppo.Config(
            **often, lr=3e-2, epochs=3, minibatches=2, temperature=0.9, kl_target=0.1, kl_horizon=50, trace_epochs=True
        ),
        evaluation=configs.Evaluation(prompts=12, batch=8, temperature=0.7, samples=2),
        trace=configs.Trace(every=4),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory, compilations):
    """The whole run. Its functions compile anew, whatever was compiled before it."""
    jax.clear_caches()
    with compilations() as compiled:
        reporter = Recorder(compiled)
        steps = stages(config, tmp_path_factory.mktemp("whole"), reporter)
        summary = steps.all()
    workdir = steps.workdir.path
    return types.SimpleNamespace(
        steps=steps, workdir=workdir, summary=summary, reporter=reporter, compiled=list(compiled)
    )


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
        "lock", "config.json", "summary.json", "samples.jsonl", "plots", "text", "trace", "about.json", "report.html",
        "report.md", *STAGES,
    }  # fmt: skip
    assert (whole.workdir / "samples.jsonl").read_bytes() == (whole.workdir / "ppo" / "samples.jsonl").read_bytes()


def test_its_trace_is_proved(whole):
    """Every identity, of every recorded step and evaluation."""
    names = {path.name.removesuffix(".json.gz") for path in (whole.workdir / "trace").iterdir()}
    steps, evaluations = ("000001", "000004", "000006"), ("000000", "000002", "000004", "000006")
    others = ("000001", "000002", "000004", "000006")
    expected = {f"ppo_iter_{step}" for step in steps} | {f"ppo_eval_{step}" for step in evaluations} | {"manifest.json"}
    expected |= {f"{stage}_iter_{step}" for stage in ("sft", "reward") for step in others}
    expected |= {f"{stage}_eval_{step}" for stage in ("sft", "reward") for step in evaluations}
    assert names == expected | {f"{stage}_end" for stage in STAGES}
    results = {each.identity: each for each in verify(whole.workdir)}
    assert {name: each.breach for name, each in results.items() if each.breach} == {}
    assert IDENTITIES.keys() - results.keys() == {"baseline", "group", "KL loss", "pair loss"}  # PPO has none of them


def test_its_tokens_are_scored_again(whole):
    """Of the first iteration, whose policy is the fine-tuned one; the checkpoints are after iterations 4 and 6."""
    results = replay(whole.workdir, 1)
    assert [each.array for each in results] == ["rollout.logp_BR", "rollout.logp_ref_BR", "rollout.score_B"]
    assert all(each.error <= 1e-4 and not each.where for each in results)
    assert "expected a recorded iteration of ppo, one of [1, 4, 6], got 2" in error(replay, whole.workdir, 2)
    assert "expected 1, or an iteration after a checkpoint (" in error(replay, whole.workdir, 4)


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
    own = {name: value for stage in STAGES for name, value in whole.steps.workdir.summary(stage).items() if "/" in name}
    assert own.items() <= json.loads((whole.workdir / "summary.json").read_text()).items()


def test_every_step_is_logged_once_and_the_last_evaluation_after_it(whole):
    for stage in STAGES:
        rows = logged(whole.workdir, stage)
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
        evaluated = [all(name.startswith(f"{stage}/eval_") for name in row if name != "step") for row in rows]
        assert evaluated == [1, 0, 0, 0, 0, 0, 0, 1]
        assert [any("eval_" in name for name in row) for row in rows] == [1, 0, 1, 0, 1, 0, 0, 1]
        kept = rows[0].keys() - {"step"}  # what is measured at the end is measured at the start
        assert kept and kept <= rows[2].keys() and kept <= rows[-1].keys()


def test_step_0_is_the_state_before_training(whole):
    """That of PPO is the policy that the summary compares with."""
    for name in ("score", "gold", "kl_exact"):
        assert logged(whole.workdir, "ppo")[0][f"ppo/eval_{name}"] == whole.summary[f"ppo/{name}_sft"]
    stage = whole.steps.make("sft")
    numbers = loop.named(stage, stage.evaluate(stage.state).numbers, "eval_")
    assert logged(whole.workdir, "sft")[0] == {"step": 0} | numbers


def test_each_step_logs_its_rate_its_seconds_and_the_memory(whole):
    for stage in STAGES:
        rows = metrics.read(whole.workdir / stage / "metrics.jsonl")[1:7]
        config = whole.steps.make(stage).config
        each = getattr(config, "epochs", 1) * getattr(config, "minibatches", 1)
        expected = optim.rates(config, 6 * each)[::each]
        np.testing.assert_allclose([row[f"{stage}/lr"] for row in rows], expected, rtol=1e-6)
        for row in rows:
            seconds = row[f"{stage}/seconds"]
            parts = [row.get(f"{stage}/seconds_{part}", 0) for part in ("collect", "reward", "learn")]
            assert seconds > 0 and row[f"{stage}/tokens_per_second"] > 0 and row[f"{stage}/host_memory_gib"] > 0.1
            assert sum(parts) == (pytest.approx(seconds, rel=1e-2) if stage == "ppo" else 0) and min(parts) >= 0
            assert f"{stage}/device_memory_gib" not in row  # a CPU has none of its own
    batch, row = whole.steps.make("ppo").batch_at(0), logged(whole.workdir, "ppo")[1]
    tokens = np.asarray(batch["prompt_mask_BP"]).sum() + 8 * row["ppo/length"]
    assert whole.steps.make("ppo").tokens(batch, {"length": row["ppo/length"]}) == pytest.approx(tokens)


def test_what_was_reported(whole):
    assert whole.reporter.stages == [(stage, 6, 0) for stage in STAGES]
    # At steps 2, 4 and 6 of fine-tuning and of PPO; the reward model has none to show.
    assert [len(rows) for rows in whole.reporter.shown if rows] == [2] * 6
    (table,) = whole.reporter.tables
    for name, before, after, change, interval in table:
        assert (before, after) == (whole.summary[f"ppo/{name}_sft"], whole.summary[f"ppo/{name}"])
        assert change == pytest.approx(after - before, rel=1e-6, abs=1e-6)
        assert interval is None or interval[0] <= change <= interval[1]
    assert [row[0] for row in table if row[4]] == ["gold", "score", "kl", "kl_exact", "eos_rate", "length"]
    assert [row[0] for row in table if not row[4]] == ["distinct2", "repeat_rate", "entropy"]


def test_each_stage_is_checked_when_it_is_finished(whole):
    """One line for each check, with a value of the run's own record."""
    lines = [note for note in whole.reporter.notes if note.startswith("doctor  ")]
    *checks, verdict = lines
    assert list(dict.fromkeys(line.split()[2] for line in checks)) == list(STAGES)
    assert verdict.startswith("doctor  sft first: ")
    (eos,) = (line for line in lines if "  sft  eos_rate: " in line)
    assert eos.startswith(f"doctor  FAIL  sft  eos_rate: {whole.summary['sft/eos_rate']:.3g} (healthy: 0.9 or more); ")
    for name in "exact KL of the first rollout", "k1 KL of the first rollout":
        assert [line for line in lines if line.startswith(f"doctor  pass  ppo  {name}")]


def test_the_total_of_a_sample_is_what_ppo_maximizes(whole):
    """Invariant 7: with the KL coefficient of the moment, which the controller moves, and the score after the rule for
    a missing EOS."""
    rows = logged(whole.workdir, "ppo")
    coefficients = [rows[3]["ppo/kl_coef"], rows[5]["ppo/kl_coef"], float(last(whole.steps, "ppo")["kl_coef"])]
    assert len({0.05, *coefficients}) == 4
    for shown, kl_coef in zip([rows for rows in whole.reporter.shown if rows][3:], coefficients, strict=True):
        for row in shown:
            assert row.keys() == {"prompt", "completion", "score", "kl", "total", "gold"}
            assert row["total"] + kl_coef * row["kl"] in (pytest.approx(row["score"]), pytest.approx(-1))
    for side in "sft", "ppo":
        for row in (row[side] for row in samples(whole.workdir, "ppo")):
            assert row["total"] + coefficients[-1] * row["kl"] in (pytest.approx(row["score"]), pytest.approx(-1))


@pytest.fixture(scope="module")
def judged(whole, tmp_path_factory):
    """A run with a hold-out judge, which keeps the best policy and watches over-optimization by gold."""
    short = {"steps": 2, "eval_every": 1}
    steps = branch(
        whole.steps, tmp_path_factory.mktemp("judged"), "sft",
        reward={"holdout_judge": True, "steps": 1, "eval_every": 0},
        ppo=short, alarms={"over_optimization": 1e-6}, evaluation={"result": "best"}, trace={"every": 0},
    )  # fmt: skip
    opened(steps, "sft")  # its record has the evaluation of this config
    return steps, steps.all()


def test_a_hold_out_judge_is_a_second_reward_model_of_other_pairs(judged):
    steps, summary = judged
    assert steps.names == ["sft", "reward", "judge", "ppo"]
    reward, judge = (trained(steps, name, "reward") for name in ("reward", "judge"))
    assert differ(reward, judge)
    rows, index_N = steps.setup.task.rows("preferences").train, steps.setup.arrays("preferences").train["index_N"]
    sides = [{rows[index_N[at]]["prompt"] for at in half(steps.setup, judge=side)} for side in (False, True)]
    assert sides[0] and sides[1] and sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == {rows[i]["prompt"] for i in index_N}
    for name, side in ("reward", False), ("judge", True):
        batch = steps.make(name).batch_at(0)
        assert {rows[i]["prompt"] for i in np.asarray(batch["index_B"])} <= sides[side]
    assert {"judge/accuracy", "ppo/judge", "ppo/judge_sft", "ppo/judge_ci95"} <= summary.keys()


def test_the_judges_score_is_that_of_its_model(judged):
    steps, _ = judged
    model = rlhf_jax.load(steps.workdir.path, "judge")
    rows = samples(steps.workdir, "ppo")
    for side in "sft", "ppo":
        scores = model.scores([row["prompt"] for row in rows], [row[side]["completion"] for row in rows])
        eos = np.array([steps.setup.tokenizer.encode(" " + row[side]["completion"]) for row in rows], object)
        whole_N = np.array([len(ids) < 19 for ids in eos])  # a text that was cut has no EOS
        found_N = np.array([row[side]["judge"] for row in rows])
        np.testing.assert_allclose(found_N[whole_N], scores[whole_N], atol=1e-4)


def test_dpo_has_the_judge_of_its_workdir_and_the_other_half_of_the_pairs(judged):
    """It needs no reward model. The judge that was trained beside the one of PPO is its own."""
    there, _ = judged
    config = changed(there.config, algorithm="dpo", dpo=dpo.Config(lr=1e-2, steps=2, batch=8, eval_every=1))
    steps = stages(config, there.workdir.path)
    summary = steps.all()
    assert steps.names == ["sft", "judge", "dpo"]
    assert [note for note in steps.reporter.notes if note.startswith("judge")] == [
        "judge: finished with this config, skipped"
    ]
    rows, index_N = steps.setup.task.rows("preferences").train, steps.setup.arrays("preferences").train["index_N"]
    others = {rows[index_N[at]]["prompt"] for at in half(steps.setup, judge=False)}
    assert {rows[i]["prompt"] for i in np.asarray(steps.make("dpo").batch_at(0)["index_B"])} <= others
    assert {"dpo/judge", "dpo/judge_sft", "dpo/judge_ci95"} <= summary.keys()
    assert "dpo/eval_judge" in logged(steps.workdir, "dpo")[0]
    found = samples(steps.workdir, "dpo")
    for side, name in (("sft", "judge_sft"), ("dpo", "judge")):
        assert summary[f"dpo/{name}"] == pytest.approx(np.mean([row[side]["judge"] for row in found]), abs=1e-5)
    assert rlhf_jax.load(steps.workdir.path).reward is None


def test_the_prompts_that_choose_a_policy_do_not_measure_it(judged):
    """Twelve held-out prompts: every second one chooses by gold, the others are in the samples and the summary."""
    steps, summary = judged
    prompts = [row["prompt"] for row in steps.setup.questions("prompts")[1]]
    rows = samples(steps.workdir, "ppo")
    assert [row["prompt"] for row in rows] == prompts[1::2]
    assert summary["ppo/gold"] == pytest.approx(np.mean([row["ppo"]["gold"] for row in rows]))
    evaluated = [row for row in logged(steps.workdir, "ppo") if "ppo/eval_gold" in row][:-1]
    best = max(range(len(evaluated)), key=lambda i: evaluated[i]["ppo/eval_gold"])
    assert summary["ppo/best_step"] == evaluated[best]["step"]


def test_over_optimization_ends_the_learning(judged):
    """Where an evaluation before the last has a higher reward and lower gold than the best one before it."""
    steps, _ = judged
    rows = {row["step"]: row for row in logged(steps.workdir, "ppo") if "ppo/eval_gold" in row}
    first, second = rows[0], rows[1]
    fell = second["ppo/eval_score"] > first["ppo/eval_score"] and second["ppo/eval_gold"] < first["ppo/eval_gold"]
    notes = [note for note in steps.reporter.notes if "over_optimization" in note]
    assert notes == ["alarm at step 1: over_optimization (the reward rose, gold fell)"] * fell


def test_a_number_that_no_evaluation_has_ranks_nothing(whole, tmp_path):
    steps = branch(whole.steps, tmp_path, "sft", "reward", evaluation={"best_by": "joy"})
    for name in "sft", "reward":
        opened(steps, name)
    assert error(steps.make, "ppo").startswith("evaluation.best_by: expected one of distinct2, entropy, eos_rate, gold")


def test_a_finished_run_is_left_alone(whole, config):
    def times():
        return {path: path.stat().st_mtime_ns for stage in STAGES for path in (whole.workdir / stage).rglob("*")}

    before = times()
    reporter = Recorder()
    summary = pipeline.run(config, whole.workdir, reporter)
    assert times() == before
    assert reporter.stages == []
    assert reporter.notes[-6:-3] == [f"{stage}: finished with this config, skipped" for stage in STAGES]
    assert numbers(summary) == numbers(whole.summary)


# The numbers


def test_fine_tuning_is_measured_on_held_out_rows(whole):
    setup, summary = whole.steps.setup, whole.summary
    held_out = setup.arrays("sft").held_out
    tokens_NT = np.concatenate([held_out["prompt_NP"], held_out["response_NR"]], axis=1)
    real_NT = np.concatenate([held_out["prompt_mask_NP"], held_out["response_mask_NR"]], axis=1)
    model, policy = setup.apply.policy, trained(whole.steps, "sft", "policy")
    logits_NTV = jax.jit(lambda *args: model.logits(policy, model.hidden(policy, *args)))(tokens_NT, real_NT)
    logp_NTV = jax.nn.log_softmax(logits_NTV[:, :-1])
    logp_NT = np.take_along_axis(np.asarray(logp_NTV), tokens_NT[:, 1:, None], axis=2)[..., 0]
    predicted_NT = real_NT[:, 1:] & real_NT[:, :-1]
    assert summary["sft/loss"] == pytest.approx(-logp_NT[predicted_NT].mean(), abs=1e-5)
    assert summary["sft/perplexity"] == pytest.approx(np.exp(summary["sft/loss"]))
    rows = samples(whole.workdir, "sft")
    _, questions = setup.questions("sft")
    scores = [gold.score(row["record"], sample["completion"]) for row, sample in zip(questions, rows, strict=True)]
    assert len(rows) == 12 and summary["sft/gold"] == pytest.approx(np.mean(scores))
    assert summary["sft/loss"] == logged(whole.workdir, "sft")[-1]["sft/eval_loss"]


def test_the_reward_models_accuracy_is_that_of_its_samples(whole):
    rows = samples(whole.workdir, "reward")
    assert len(rows) == len(whole.steps.setup.arrays("preferences").held_out["index_N"]) > 12
    assert whole.summary["reward/accuracy"] == np.mean([row["score_chosen"] > row["score_rejected"] for row in rows])
    low, high = whole.summary["reward/accuracy_ci95"]
    assert 0 <= low < whole.summary["reward/accuracy"] < high <= 1


def test_the_reward_models_loss_is_of_the_model_as_it_was_trained_and_the_normalized_ones_beside_it(whole):
    """On every row that has one, so that the last point of the curve is of the same model."""
    margin_N = np.array([row["score_chosen"] - row["score_rejected"] for row in samples(whole.workdir, "reward")])
    raw_N = margin_N * whole.summary["reward/reference_std"]
    evaluated = [row for row in logged(whole.workdir, "reward") if "reward/eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4, 6]
    assert [row["step"] for row in evaluated if "reward/eval_loss_normalized" in row] == [6]
    final = evaluated[-1]
    assert final["reward/eval_loss"] == pytest.approx(np.logaddexp(0, -raw_N).mean(), rel=1e-4)
    assert final["reward/eval_loss_normalized"] == pytest.approx(np.logaddexp(0, -margin_N).mean(), rel=1e-4)
    assert abs(final["reward/eval_loss"] - final["reward/eval_loss_normalized"]) > 1e-3
    for name in "loss", "loss_normalized":
        assert whole.summary[f"reward/{name}"] == final[f"reward/eval_{name}"]


def test_reference_summaries_score_mean_0_and_standard_deviation_1(whole):
    """invariant 12: once the reward model is trained, on held-out rows; before, they did not."""
    held_out = whole.steps.setup.arrays("sft").held_out
    tokens_NT = np.concatenate([held_out["prompt_NP"], held_out["response_NR"]], axis=1)
    real_NT = np.concatenate([held_out["prompt_mask_NP"], held_out["response_mask_NR"]], axis=1)
    score = jax.jit(whole.steps.setup.apply.scalar.score)
    scores_N = score(trained(whole.steps, "reward", "reward"), tokens_NT, real_NT)
    np.testing.assert_allclose([scores_N.mean(), scores_N.std()], [0, 1], atol=1e-5)
    assert abs(whole.summary["reward/reference_mean"]) > 0.01
    assert abs(whole.summary["reward/reference_std"] - 1) > 0.01


def test_references_may_score_mean_0_and_standard_deviation_1_before_training_too(whole, tmp_path):
    """A reward model that does not learn, as the references score it before the normalization that comes last."""
    still = {"lr": 1e-30, "steps": 1, "normalize_before": True}
    steps = branch(whole.steps, tmp_path, "sft", reward=still)
    summary = steps.one("reward")
    assert abs(summary["reward/reference_mean"]) < 1e-5 and abs(summary["reward/reference_std"] - 1) < 1e-5
    # One without a spread, as of a dead head, cannot be normalized.
    stage = steps.make("reward")
    head = jax.tree.map(jnp.zeros_like, stage.state.reward["head"])
    flat = stage.state.replace(reward=stage.state.reward | {"head": head})
    count = len(steps.setup.arrays("sft").held_out["index_N"])
    assert error(stage.complete, flat, None) == (
        f"data.sft: the {count} held-out references all score 0; expected a spread, to normalize the reward model by"
    )


def test_ppo_is_compared_with_its_start_on_the_same_held_out_prompts(whole):
    setup, summary = whole.steps.setup, whole.summary
    rows, (_, questions) = samples(whole.workdir, "ppo"), setup.questions("prompts")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in questions] and len(rows) == 12
    train = {row["prompt"] for row in setup.task.rows("prompts").train}
    assert {row["prompt"] for row in questions}.isdisjoint(train)
    gold_of = {}
    for side, suffix in ("sft", "_sft"), ("ppo", ""):
        gold_of[side] = [gold.score(questions[i]["record"], row[side]["completion"]) for i, row in enumerate(rows)]
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
    assert summary["ppo/clip_fraction"] == logged(whole.workdir, "ppo")[6]["ppo/clip_fraction"]


def test_the_first_update_is_logged_epoch_by_epoch(whole):
    """As running means, so that the last is what is logged of the whole update."""
    first, second = logged(whole.workdir, "ppo")[1:3]
    for name in "ppo/approx_kl", "ppo/clip_fraction":
        traced = whole.summary[f"{name}_first_update"]
        assert traced == [first[f"{name}_epoch_{epoch}"] for epoch in (1, 2, 3)] == sorted(traced)
        assert traced[-1] == pytest.approx(first[name], rel=1e-6) and traced[-1] != second[name]


def test_ppo_starts_where_fine_tuning_ended(whole):
    """invariant 5: KL is 0 by every estimator at step 0; later epochs clip, and then KL is not 0.

    What is logged is summed over a response; an estimator is of a token.
    """
    first, second = logged(whole.workdir, "ppo")[1:3]
    for name in ("kl", "kl_k2", "kl_k3", "kl_exact"):
        assert abs(first[f"ppo/{name}"]) / first["ppo/length"] <= 1e-6
    for name in ("kl", "kl_exact"):
        assert abs(whole.summary[f"ppo/{name}_sft"]) / whole.summary["ppo/length_sft"] <= 1e-6
    assert first["ppo/clip_fraction"] > 0
    assert second["ppo/kl_exact"] > 1e-3 and whole.summary["ppo/kl_exact"] > 1e-3


def test_what_is_never_negative(whole):
    """invariant 15"""
    for row in logged(whole.workdir, "ppo")[1:7]:
        assert row["ppo/entropy"] >= 0 and row["ppo/kl_exact"] >= 0 and row["ppo/kl_k3"] >= 0
        assert row["ppo/kl_coef"] >= 0 and row["ppo/explained_variance"] <= 1


def test_reference_and_reward_are_bitwise_unchanged(whole):
    """invariant 14: what is frozen stands in no checkpoint, so that the state itself is looked at after two updates."""
    steps = whole.steps
    policy, reward = trained(steps, "sft", "policy"), trained(steps, "reward", "reward")
    assert not {"reference", "reward"} & {name for name, value in last(steps, "ppo").items() if value is not None}
    assert differ(trained(steps, "ppo", "policy"), policy) and differ(trained(steps, "ppo", "value"), reward)
    assert differ(reward["trunk"], policy)
    stage = steps.make("ppo")
    state, score = stage.state, jax.jit(steps.setup.apply.scalar.score)
    for i in range(2):
        done = stage.step(state, stage.batch_at(i))
        state, rollout = done.state, done.rollout
        score_B = score(reward, rollout.tokens_BT, rollout.attend_BT)
        np.testing.assert_allclose(rollout.score_B, score_B, atol=1e-5)
    assert_trees_equal(state.reference, policy)
    assert_trees_equal(state.reward, reward)
    assert differ(state.policy, policy)


def test_the_optimizer_takes_a_step_for_every_minibatch_of_every_epoch(whole):
    """invariant 10"""
    config = whole.steps.config.ppo
    saved = last(whole.steps, "ppo")["optimizer"]
    assert saved.keys() == {"policy", "value"}
    counts = [int(leaf) for leaf in jax.tree.leaves(saved) if leaf.dtype == np.int32]
    assert counts and set(counts) == {config.steps * config.epochs * config.minibatches}


def test_nothing_compiles_after_the_first_iterations(whole):
    """The first six steps have two evaluations and a checkpoint: what the second needs, the first has compiled."""
    for stage in STAGES:
        assert whole.reporter.compiled_by[stage, 2] == whole.reporter.compiled_by[stage, 5]
    times = Counter(whole.compiled)
    # Updates of three stages; sampling in fine-tuning, in rollouts, and at two temperatures in evaluations.
    once_a_stage = {"step": 3, "token_logprobs": 1, "sample": 2, "_compared": 2, "scores": 1, "judge": 1, "_score": 1}
    assert {name: times[name] for name in once_a_stage} == once_a_stage
    assert times["score"] == 2  # of rollouts, and of an evaluation's rows, which are fewer or more


# Runs that go on from its parts


def test_a_policy_that_does_not_learn_stays_where_it_was(whole, tmp_path):
    """invariants 5, 11 and 12: KL 0, ratio 1, nothing clipped; both evaluations meet the same noise; a zero head."""
    still = {"lr": 1e-30, "epochs": 1, "minibatches": 1, "value_init": "zero", "steps": 3}
    steps = branch(whole.steps, tmp_path, "sft", "reward", ppo=still)
    summary = steps.one("ppo")
    rows = logged(tmp_path, "ppo")[1:4]
    for row in rows:
        for name in ("kl", "kl_k2", "kl_k3", "kl_exact"):
            assert abs(row[f"ppo/{name}"]) / row["ppo/length"] <= 1e-6
        assert abs(row["ppo/ratio"] - 1) <= 1e-5 and row["ppo/clip_fraction"] == 0
    assert rows[0]["ppo/value"] == 0
    assert len({row["ppo/score"] for row in rows}) == 3  # other prompts, other noise
    assert summary["ppo/gold_gain"] == summary["ppo/score_gain"] == 0 and summary["ppo/win_rate"] == 0.5
    assert all(row["sft"] == row["ppo"] for row in samples(tmp_path, "ppo"))
    assert_trees_equal(trained(steps, "ppo", "policy"), trained(steps, "sft", "policy"))


def test_dropout_is_for_fine_tuning_alone(whole, config, tmp_path):
    """invariant 10: from the same fine-tuned policy, the reward model and PPO come out the same bit for bit."""
    noisy = stages(changed(config, model={"dropout": 0.5}), tmp_path / "noisy")
    noisy.one("sft")
    ours, theirs = logged(tmp_path / "noisy", "sft"), logged(whole.workdir, "sft")
    assert all(a["sft/loss"] != b["sft/loss"] for a, b in zip(ours[1:7], theirs[1:7], strict=True))
    steps = branch(whole.steps, tmp_path / "run", "sft", "reward", model={"dropout": 0.5})
    for name in "reward", "ppo":
        stage = steps.make(name)
        state = stage.state
        for i in range(3):
            done = stage.step(state, stage.batch_at(i))
            state, row = done.state, logged(whole.workdir, name)[i + 1]
            assert {f"{name}/{key}": float(value) for key, value in done.numbers.items()}.items() <= row.items()


def test_the_seed_decides_everything(whole, config, tmp_path):
    """invariant 11: the same seed gives the same run bit for bit, another seed another."""
    again = stages(config, tmp_path / "again")
    again.one("sft")
    assert logged(again.workdir.path, "sft") == logged(whole.workdir, "sft")
    assert_trees_equal(trained(again, "sft", "policy"), trained(whole.steps, "sft", "policy"))
    other = stages(changed(config, seed=2), tmp_path / "other")
    other.one("sft")
    assert logged(other.workdir.path, "sft")[1]["sft/loss"] != logged(whole.workdir, "sft")[1]["sft/loss"]
    assert differ(trained(other, "sft", "policy"), trained(whole.steps, "sft", "policy"))


def test_a_run_that_was_stopped_in_every_stage_ends_as_one_that_was_not(whole, config, tmp_path):
    # In fine-tuning before an evaluation, which runs when the run goes on, and in the last step, before the next stage;
    # in the others after one.
    for when, message in [
        (("sft", 1), "stopped after step 2 of 6"),
        (("sft", 6), "stopped after"),
        (("reward", 4), "stopped after step 4 of 6"),
        (("ppo", 2), "stopped after step 2 of 6"),
    ]:
        with pytest.raises(loop.Stopped, match=message):
            stages(config, tmp_path, StopsAt(*when)).all()
        after = STAGES[STAGES.index(when[0]) + 1 :]
        assert not [stage for stage in after if (tmp_path / stage).exists()]
        assert when[1] == 6 or not (tmp_path / when[0] / "summary.json").exists()
    reporter = Recorder()
    steps = stages(config, tmp_path, reporter)
    summary = steps.all()
    assert reporter.stages == [("ppo", 6, 2)] and "ppo: goes on after step 2" in reporter.notes
    assert numbers(summary) == numbers(whole.summary)
    assert len({row["ppo/kl_coef"] for row in logged(tmp_path, "ppo")[1:7]}) > 1  # the controller's state is saved too
    for stage in STAGES:
        assert logged(tmp_path, stage) == logged(whole.workdir, stage)
        assert samples(tmp_path, stage) == samples(whole.workdir, stage)
    for stage, field in ("sft", "policy"), ("reward", "reward"), ("ppo", "policy"), ("ppo", "value"):
        assert_trees_equal(trained(steps, stage, field), trained(whole.steps, stage, field))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_killed_before_its_summary_ends_with_the_same(stage, whole, tmp_path):
    steps = branch(whole.steps, tmp_path, *STAGES[: STAGES.index(stage) + 1])
    (tmp_path / stage / "summary.json").unlink()
    steps.one(stage)
    assert numbers(steps.workdir.summary(stage)) == numbers(whole.steps.workdir.summary(stage))
    assert logged(tmp_path, stage) == logged(whole.workdir, stage)


def test_a_run_concludes_with_its_own_algorithm(whole, tmp_path):
    """Several algorithms leave their summary in one workdir, one after the other."""
    steps = branch(whole.steps, tmp_path, *STAGES)
    (tmp_path / "summary.json").write_text('{"ppo/steps": 6, ')  # damaged: it is made again
    assert numbers(steps.all()) == numbers(whole.summary)
    (tmp_path / "summary.json").write_text(json.dumps({"policy_gradient/steps": 6, "policy_gradient/score": 5.0}))
    assert numbers(steps.all()) == numbers(whole.summary)
    assert numbers(json.loads((tmp_path / "summary.json").read_text())) == numbers(
        json.loads(json.dumps(whole.summary))
    )


# Stages from elsewhere


def test_finished_stages_of_another_workdir_are_used_in_place(whole, config, tmp_path):
    """The last stage alone is trained, and comes out the same as of the run that trained all."""
    reporter = Recorder()
    place = str(whole.workdir)
    steps = stages(changed(config, sft={"from_": place}, reward={"from_": place}), tmp_path, reporter)
    before = {path: path.stat().st_mtime_ns for path in whole.workdir.rglob("*")}
    summary = steps.all()
    assert reporter.stages == [("ppo", 6, 0)]
    for name in "sft", "reward":
        assert f"{name}: taken from {whole.workdir}, skipped" in reporter.notes and not (tmp_path / name).exists()
    assert numbers(summary) == numbers(whole.summary)
    assert logged(tmp_path, "ppo") == logged(whole.workdir, "ppo")
    for field in "policy", "value":
        assert_trees_equal(trained(steps, "ppo", field), trained(whole.steps, "ppo", field))
    assert {path: path.stat().st_mtime_ns for path in whole.workdir.rglob("*")} == before
    assert numbers(stages(steps.config, tmp_path).all()) == numbers(summary)  # finished, the same again


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_what_cannot_be_taken_from_another_workdir(name, whole, config, tmp_path):
    """Both values are in the message, where it was made with another; nothing is written."""
    place, run = str(whole.workdir), tmp_path / "run"

    def refused(place, **changes):
        section = changes.pop(name, {}) | {"from_": str(place)}
        return error(stages(changed(config, **changes, **{name: section}), run).all)

    for changes, message in [
        ({"model": {"width": 24}}, "model.width = 16, not 24"),
        ({"sft": {"lr": 0.5}}, "sft.lr = 0.01, not 0.5"),
        ({"seed": 2}, "seed = 1, not 2"),
    ]:
        assert refused(place, **changes) == f"{name}.from: {place}/{name}/config.json was made with {message}"
    for steps in (steps for steps in (5, 7) if name == "sft"):
        assert refused(place, sft={"steps": steps}) == (
            f"{name}.from: expected a finished stage of {steps} steps in {place}/{name}"
        )
    unfinished = opened(stages(config, tmp_path / "unfinished"), name)
    assert refused(unfinished.parent) == f"{name}.from: expected a finished stage of 6 steps in {unfinished}"
    nowhere = tmp_path / "nowhere"
    assert refused(nowhere) == f"{name}.from: expected a finished stage of 6 steps in {nowhere / name}"
    assert not run.exists() and not nowhere.exists()


# Damage


def cut(folder):
    """Makes the arrays of a checkpoint shorter."""
    for path in (folder / "state" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's tasks
@pytest.mark.parametrize("damage", ["damaged", "older beside it", "empty", "gone"])
def test_a_damaged_result_is_an_error_and_never_an_older_one(damage, whole, tmp_path):
    steps = branch(whole.steps, tmp_path, "sft")
    result = tmp_path / "sft" / "result"
    if damage == "older beside it":
        shutil.copytree(result / "6", result / "5")
    if damage in ("empty", "gone"):
        shutil.rmtree(result)
    else:
        cut(result / "6")
    if damage == "empty":
        result.mkdir()
    message = error(trained, steps, "sft", "policy")
    assert str(result) in message and f"remove {tmp_path}/sft/summary.json to make it again" in message
    steps.workdir.path.joinpath("sft", "summary.json").unlink()  # the remedy
    steps.one("sft")
    assert_trees_equal(trained(steps, "sft", "policy"), trained(whole.steps, "sft", "policy"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's tasks
def test_a_damaged_checkpoint_is_noted_and_put_aside_and_the_run_ends_as_ever(whole, tmp_path):
    steps = branch(whole.steps, tmp_path, "sft", "reward")
    (tmp_path / "reward" / "summary.json").unlink()
    newest = tmp_path / "reward" / "checkpoints" / "6"
    cut(newest)
    steps.one("reward")
    notes = [note for note in steps.reporter.notes if note.startswith("reward:")]
    assert notes[0].startswith(f"reward: {newest}: damaged (")
    assert notes[1:] == [
        f"reward: checkpoint 6 is now {tmp_path / 'reward' / 'damaged' / '6-0'}", "reward: goes on after step 4",
    ]  # fmt: skip
    assert logged(tmp_path, "reward") == logged(whole.workdir, "reward")
    assert_trees_equal(trained(steps, "reward", "reward"), trained(whole.steps, "reward", "reward"))


# More steps, other configs, other processes


def test_a_stage_that_is_given_more_steps_is_as_if_it_had_had_them(whole, tmp_path):
    """run(2N) = run(N), then on to 2N: the result of the first half was saved apart from its training.

    Of a reward model, whose result is its last state normalized."""

    def run(folder, steps, *finished):
        changes = {"schedule": "constant", "save_every": 0, "steps": steps}
        return branch(whole.steps, tmp_path / folder, *finished, reward=changes)

    run("twice", 3, "sft").one("reward")
    run("twice", 6).one("reward")
    run("once", 6, "sft").one("reward")
    twice, once = tmp_path / "twice", tmp_path / "once"
    assert logged(twice, "reward") == logged(once, "reward")
    summaries = [json.loads((run / "reward" / "summary.json").read_text()) for run in (twice, once)]
    assert numbers(summaries[0]) == numbers(summaries[1])
    for step in (None, 6):
        assert_trees_equal(checkpoint.load(twice / "reward", step), checkpoint.load(once / "reward", step))
    assert (
        error(run("once", 4).one, "reward") == f"reward.steps: expected at least 6, which {once}/reward has done, got 4"
    )


def test_two_processes_do_not_write_to_one_workdir(config, tmp_path):
    opened(stages(config, tmp_path), "sft")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); f.truncate(0); "
    code += "f.write('4711'); f.flush(); print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "other"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        (tmp_path / "other").rename(tmp_path / "lock")
        message = error(stages(config, tmp_path).all)
        assert message == f"workdir: {tmp_path} is in use by process 4711; choose another --workdir"
        other.kill()
    opened(stages(config, tmp_path), "sft")  # killed, it holds nothing


def test_the_seconds_of_a_stage_are_those_of_all_its_starts(whole, tmp_path):
    steps = branch(whole.steps, tmp_path, "sft")
    (tmp_path / "sft" / "summary.json").unlink()
    rows = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(row) | {"time": 1000.0} for row in rows]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 1000 < steps.one("sft")["seconds"] < 1100


# Numbers that go wrong


def run_stage(steps, stage):
    """Trains a stage that was changed by hand."""
    return fit(stage, steps.workdir, depends=steps.depends(stage.name), config=configs.tree(steps.config),
               keep=steps.config.keep, reporter=steps.reporter)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "field", "place"),
    [("reward", "reward", "decoder.py"), ("ppo", "value", "decoder.py")],
)
def test_an_update_that_is_not_finite_is_not_made_and_can_be_made_again(name, field, place, whole, tmp_path):
    """A parameter that overflows, put into a checkpoint: what comes of it stops the run, and the place is found."""
    earlier = STAGES[: STAGES.index(name)]
    steps = branch(whole.steps, tmp_path, *earlier, **{name: {"save_every": 2, "eval_every": 0}})
    stage = steps.make(name)
    huge = jax.tree.map(lambda x: x, getattr(stage.state, field))
    trunk = huge["trunk"]
    trunk["ln_f"] = trunk["ln_f"] | {"scale": trunk["ln_f"]["scale"] * 3e38}
    before = jax.tree.map(np.array, huge)
    state = stage.state.replace(**{field: huge})
    with pytest.raises(NonFinite, match=f"{name} step 1: .* not finite, the step was not taken") as stopped:
        run_stage(steps, dataclasses.replace(stage, state=state))
    assert not list((tmp_path / name / "checkpoints").iterdir())
    folder = tmp_path / "incident" / f"{name}-1"
    assert f"python -m rlhf_jax.replay {folder}" in str(stopped.value)
    record = guard.read(folder)
    assert record["names"] and all(each.startswith(f"{name}/") for each in record["names"])
    assert_trees_equal(checkpoint.load(folder)["state"][field], before)
    replay = pytest.importorskip("rlhf_jax.replay", exc_type=ImportError)
    reporter = Recorder()
    names, where = replay.replay(folder, reporter)
    assert names == record["names"] and place in where and where.startswith("begins in ")
    assert reporter.notes[-3].endswith("not finite, as in the run")
    assert reporter.notes[-2] == f"repeated: {', '.join(names)} not finite"


@pytest.mark.parametrize("limit", [9, 1])
def test_updates_may_be_skipped_up_to_a_limit(limit, whole, config, tmp_path):
    steps = stages(changed(config, guard={"action": "skip", "limit": limit}), tmp_path)
    made = steps.make("sft")

    def step(state, batch):
        """Batches 2 and 3 are bad."""
        bad = int(state.step) in (1, 2)
        return made.step(state, batch | {"bad": jnp.float32(np.nan if bad else 0)})

    stage = dataclasses.replace(made, step=step)
    if limit == 1:
        with pytest.raises(NonFinite, match="guard.limit: expected at most 1 such updates"):
            run_stage(steps, stage)
        return
    run_stage(steps, stage)
    assert [row["sft/skipped"] for row in logged(tmp_path, "sft")[1:5]] == [0, 1, 2, 2]
    assert sorted(path.name for path in (tmp_path / "incident").iterdir()) == ["sft-2", "sft-3"]
    assert sum("skipped, " in note for note in steps.reporter.notes) == 2
    assert checkpoint.load(tmp_path / "sft", 4)["step"] == 4


def test_a_batch_of_more_rows_than_there_are_is_refused_before_anything_is_trained(config, tmp_path):
    message = error(stages(changed(config, reward={"batch": 80}), tmp_path).all)
    assert message == "reward.batch: expected at most 24, the number of training rows, got 80"
    assert not (tmp_path / "sft").exists()


# Other rewards


REWARDS = """
from rlhf_jax.rewards import gold

def ours(rows, texts):
    assert all(row.keys() >= {"prompt", "record"} for row in rows)
    return {"gold": gold.of_rows(rows, texts), "long": [len(row["prompt"]) / 100 for row in rows]}
"""


@pytest.mark.parametrize("kind", ["gold", "ours"])
def test_ppo_learns_by_any_reward_without_a_reward_model(kind, whole, tmp_path):
    """The values start from a zero head."""
    (tmp_path / "own.py").write_text(REWARDS)
    place = f"{tmp_path}/own.py:{kind}" if kind == "ours" else kind
    once = {"temperature": whole.steps.config.ppo.temperature}  # one temperature, one program
    changes = {"reward": {"kind": place}, "ppo": {"steps": 2, "eval_every": 0}, "evaluation": once}
    steps = branch(whole.steps, tmp_path / "run", "sft", **changes)
    assert configs.stages(steps.config) == ["sft", "ppo"]
    summary = steps.all()
    rows = logged(tmp_path / "run", "ppo")[1:3]
    first = rows[0]
    assert first["ppo/value"] == 0 and rows[1]["ppo/value"] != 0
    assert not (tmp_path / "run" / "reward").exists() and not [name for name in first if name == "ppo/score"]
    assert last(steps, "ppo").get("reward") is None
    if kind == "gold":
        assert all(row["ppo/reward"] == pytest.approx(row["ppo/gold"]) for row in rows[:2])
    if kind == "ours":
        for row in rows[:2]:
            assert row["ppo/reward_gold"] == pytest.approx(row["ppo/gold"])
            assert row["ppo/reward"] == pytest.approx(row["ppo/reward_gold"] + row["ppo/reward_long"], rel=1e-5)
    known = {
        "gold": lambda row, text: gold.score(row["record"], text),
        "ours": lambda row, text: gold.score(row["record"], text) + len(row["prompt"]) / 100,
    }[kind]
    _, questions = steps.setup.questions("prompts")
    for side, suffix in ("sft", "_sft"), ("ppo", ""):
        texts = [row[side]["completion"] for row in samples(tmp_path / "run", "ppo")]
        expected = [known(row, text) for row, text in zip(questions, texts, strict=True)]
        assert [row[side]["score"] for row in samples(tmp_path / "run", "ppo")] == pytest.approx(expected)
        assert summary[f"ppo/reward{suffix}"] == pytest.approx(np.mean(expected), rel=1e-5)


# Rows in files


@pytest.fixture(scope="module")
def files(config, tmp_path_factory):
    """A person's own rows, JSONL, CSV and Parquet, with a tokenizer in GPT-2's format; a policy gradient, whose score
    is that of a reward model."""
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
    paths = {"sft": "sft.jsonl", "preferences": "preferences.csv", "prompts": "prompts.parquet"}
    data = {name: write_rows(folder / path, rows) for name, path in paths.items()}
    often = {"steps": 6, "batch": 8, "eval_every": 2, "save_every": 4}
    config = changed(
        config,
        text={"kind": "gpt2", "path": str(folder)},
        data=data | {"source": "files", "held_out": 0.3},
        algorithm="policy_gradient",
        policy_gradient=often | {"lr": 3e-2, "temperature": config.ppo.temperature, "ptx_coef": 0.1},
        evaluation={"temperature": config.ppo.temperature},  # one temperature, one program
    )
    steps = stages(config, tmp_path_factory.mktemp("run"))
    return types.SimpleNamespace(steps=steps, workdir=steps.workdir.path, summary=steps.all(), reporter=steps.reporter)


def test_rows_of_files_go_all_the_way(files):
    train, held_out, _ = files.steps.task.rows("sft")
    assert len(train) + len(held_out) == 60
    assert files.steps.setup.tokenizer.vocab_size == 261
    assert len(samples(files.workdir, "policy_gradient")) == 12
    assert {"sft/loss", "reward/accuracy"} <= files.summary.keys()
    assert {f"policy_gradient/{name}" for name in ("score", "score_ci95", "kl")} <= files.summary.keys()
    notes = files.reporter.notes
    assert any(note.startswith("data.prompts, train:") and "cut prompts" in note for note in notes)


def test_a_policy_gradient_learns_by_a_reward_model(files):
    rows = logged(files.workdir, "policy_gradient")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert all("policy_gradient/score" in row and "policy_gradient/value" not in row for row in rows[1:7])
    assert abs(rows[1]["policy_gradient/kl"]) / rows[1]["policy_gradient/length"] <= 1e-6
    assert all(0 < row["policy_gradient/ptx_loss"] < 10 for row in rows[1:7])  # of the fine-tuning rows, nats a token
    assert files.summary["policy_gradient/kl_exact"] > 1e-3
    policy = trained(files.steps, "policy_gradient", "policy")
    assert differ(policy, trained(files.steps, "sft", "policy"))


def test_rows_of_files_have_no_gold(files):
    last = "policy_gradient"
    names = {name for stage in ("sft", "reward", last) for row in logged(files.workdir, stage) for name in row}
    names |= files.summary.keys() | {row[0] for row in files.reporter.tables[0]}
    assert not [name for name in names if "gold" in name]
    shown = [rows for rows in files.reporter.shown if rows][-1]
    assert all(row.keys() == {"prompt", "completion", "score", "kl", "total"} for row in shown)


def test_with_labels_to_compare_with_there_is_rouge(files, whole):
    """The prompts file has them beside the prompts; the world has none."""
    assert not [name for name in whole.summary if "rouge" in name]
    for name in "rouge1", "rouge2", "rougeL":
        assert 0 <= files.summary[f"policy_gradient/{name}"] <= 1
        assert 0 <= files.summary[f"policy_gradient/{name}_sft"] <= 1


def test_rouge_is_a_reward_that_needs_no_model(files, tmp_path):
    """It is the ROUGE-L of the summary, and a row without a reference is an error before anything is trained."""
    once = {"reward": {"kind": "rouge"}, "policy_gradient": {"steps": 1, "eval_every": 0}}
    summary = branch(files.steps, tmp_path / "run", "sft", **once).all()
    for suffix in ("", "_sft"):
        rouge_l = summary[f"policy_gradient/rougeL{suffix}"]
        assert summary[f"policy_gradient/reward{suffix}"] == pytest.approx(rouge_l, abs=1e-6) and 0 <= rouge_l < 1
    rows = [{"prompt": f"what is {i}?"} for i in range(40)]
    once["data"] = {"prompts": write_rows(tmp_path / "prompts.jsonl", rows)}
    message = error(stages(changed(files.steps.config, **once), tmp_path / "other").all)
    assert message.startswith("rouge: ") and ": expected a text 'label' to compare completions with" in message
    assert f"{tmp_path}/prompts.jsonl:" in message and not (tmp_path / "other" / "sft").exists()
