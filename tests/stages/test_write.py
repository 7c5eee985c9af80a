"""Pretraining, fine-tuning and reinforcement learning of the smallest writer, from all sides."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from rlhf_jax import alarms, checkpoint
from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient, ppo
from rlhf_jax.config import Reward, Supervised
from rlhf_jax.data import corpus
from rlhf_jax.evaluate import interval
from rlhf_jax.models import decoder
from rlhf_jax.rewards import sentiment
from rlhf_jax.training import loop
from rlhf_jax.viz.trace import Trace
from rlhf_jax.viz.verify import prove, verify
from tests.support import (
    Recorder,
    StopsAt,
    assert_trees_equal,
    branch,
    changed,
    differ,
    error,
    logged,
    numbers,
    samples,
    stages,
    trained,
)

STAGES = ("pretrain", "sft", "rl")
# Wide enough that no alarm trips.
NO_LIMITS = alarms.Config(distinct2=0.0, repeat_rate=1.0, entropy=0.0, length=0.0, kl_exact=1e6)


@pytest.fixture(scope="module")
def config():
    """Learning rates far too large, so that six steps change something."""
    often = {"steps": 6, "batch": 8, "eval_every": 2, "save_every": 4}
    return configs.write(
        text=configs.Text(kind="char"),
        data=corpus.Config(made=120, length=12),
        model=decoder.Config(layers=1, heads=2, head_size=7, width=16, context=12, init_std=0.2),
        pretrain=Supervised(**often, lr=1e-2),
        sft=Supervised(**often, lr=1e-2),
        reward=Reward(kind="sentiment", **often, lr=1e-2),
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
        evaluation=configs.Evaluation(prompts=12, batch=8, temperature=0.9, samples=2, result="best"),
        trace=configs.Trace(every=4),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory, compilations):
    """The whole run."""
    jax.clear_caches()
    with compilations() as compiled:
        steps = stages(config, tmp_path_factory.mktemp("whole"), Recorder(compiled))
        summary = steps.all()
    return types.SimpleNamespace(steps=steps, workdir=steps.workdir.path, summary=summary, reporter=steps.reporter)


def test_its_trace_is_proved(whole):
    """Of both losses on text, and of a policy gradient."""
    results = {each.identity: each for each in verify(whole.workdir)}
    assert {name: each.breach for name, each in results.items() if each.breach} == {}
    assert {"cross-entropy", "rewards", "returns", "baseline", "ratio", "minibatch", "logged", "gain"} <= results.keys()


@pytest.mark.parametrize(
    ("array", "identity"),
    [("rollout.returns_BR", "returns"), ("rollout.raw_advantages_BR", "baseline"), ("update.logp_BR", "minibatch")],
)
def test_a_breach_of_its_trace_is_named(array, identity, whole):
    found = Trace(whole.workdir)
    file = found.read(found.names("rl", "iter")[-1])
    changed = 1.01 * file.arrays[array]  # all of them: one alone may be of a row whose advantage is 0
    file = dataclasses.replace(file, arrays=file.arrays | {array: changed})
    breaches = {each.identity: each.breach for each in prove([file], found.manifest) if each.breach}
    assert identity in breaches and breaches[identity].startswith(f"{file.name}: ")


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
    assert names | {"rl/best_of_n_at_kl", "rl/best_step"} <= whole.summary.keys()
    assert "rl/seeds" not in whole.summary
    assert json.loads((whole.workdir / "summary.json").read_text()) == json.loads(json.dumps(whole.summary))


def test_every_stage_leaves_its_files(whole):
    for stage in STAGES:
        names = {"config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "plots"}
        names |= {"checkpoints", "result", "tensorboard"}
        assert {path.name for path in (whole.workdir / stage).iterdir()} == names
    assert {path.name for path in (whole.workdir / "rl" / "plots").iterdir()} >= {
        "reward.png", "reward_over_kl.png", "before_after.png",
    }  # fmt: skip
    assert (whole.workdir / "plots" / "pipeline.png").exists()


def test_samples_of_three_stages_stand_side_by_side(whole):
    rows = samples(whole.workdir, "rl")
    assert len(rows) == 12 and set(rows[0]) == {"pretrain", "sft", "rl", "reward_sft", "reward_rl"}
    assert [row["pretrain"] for row in rows] == [row["completion"] for row in samples(whole.workdir, "pretrain")]
    for side, end in ("before", "sft"), ("after", "rl"):
        mean = np.mean([row[f"reward_{end}"] for row in rows])
        assert mean == pytest.approx(whole.summary[f"rl/reward_{side}"], abs=1e-6)
        assert [row[f"reward_{end}"] for row in rows] == pytest.approx(sentiment.compound([row[end] for row in rows]))


def test_what_the_policy_is_worth_is_measured_on_samples_that_it_was_not_chosen_on(whole):
    fresh = [row["sft"] for row in samples(whole.workdir, "rl")]
    assert set(fresh).isdisjoint(row["completion"] for row in samples(whole.workdir, "sft"))
    last = logged(whole.workdir, "rl")[-1]
    assert last["rl/eval_length"] != whole.summary["rl/length_after"]


def test_each_iteration_logs_reward_and_collapse(whole):
    for row in logged(whole.workdir, "rl")[1:7]:
        for name in ("reward", "distinct2", "repeat_rate", "entropy", "length", "kl_exact", "kl", "ess"):
            assert f"rl/{name}" in row and f"rl/{name}_ci95" not in row, name
        assert row["rl/kl_exact"] >= 0 and row["rl/entropy"] >= 0 and row["rl/alarms"] == 0
    first = logged(whole.workdir, "rl")[1]
    assert first["rl/kl_exact"] < 1e-6 and first["rl/ess"] == pytest.approx(1, abs=1e-5)


def test_after_the_first_evaluation_nothing_is_compiled(whole):
    for stage, steady in (("pretrain", 3), ("sft", 3), ("rl", 3)):
        by = whole.reporter.compiled_by
        names = set(whole.reporter.compiled[by[stage, steady] : by[stage, 5]])
        assert names <= {"copy"}, stage  # of the first policy that is better than the one before it


def test_the_table_compares_with_best_of_n(whole):
    ((*_, last),) = whole.reporter.tables
    assert last[0] == "best-of-n reward at this KL" and last[2] == whole.summary["rl/best_of_n_at_kl"]


# Runs that go on from its parts


def test_a_run_that_was_stopped_in_every_stage_ends_as_one_that_was_not(whole, config, tmp_path):
    for when in ("pretrain", 1), ("sft", 4), ("rl", 3):
        with pytest.raises(loop.Stopped):
            stages(config, tmp_path, StopsAt(*when)).all()
    steps = stages(config, tmp_path)
    assert numbers(steps.all()) == numbers(whole.summary)
    for stage in STAGES:
        assert logged(tmp_path, stage) == logged(whole.workdir, stage)
    assert_trees_equal(trained(steps, "rl", "policy"), trained(whole.steps, "rl", "policy"))


def test_a_stage_that_was_killed_before_its_summary_ends_with_the_same(whole, tmp_path):
    steps = branch(whole.steps, tmp_path, *STAGES)
    (tmp_path / "rl" / "summary.json").unlink()
    steps.one("rl")
    assert numbers(steps.workdir.summary("rl")) == numbers(whole.steps.workdir.summary("rl"))


class StopsInTheSecond(StopsAt):
    """Sends SIGTERM at this step, when the stage runs for the second time."""

    runs = 0

    def stage(self, name, total_steps, start=0):
        self.runs += 1
        super().stage(name if self.runs > 1 else "", total_steps, start)


def test_a_seed_is_the_same_alone_and_among_others(whole, tmp_path):
    """One after another, stopped in the second and gone on: seed 0 is the run of one seed, the means stand beside."""
    steps = branch(whole.steps, tmp_path, "pretrain", "sft", seeds=2)
    steps.reporter = StopsInTheSecond("rl", 3)
    with pytest.raises(loop.Stopped):
        steps.all()
    other = changed(steps.config, policy_gradient={"kl_coef": 0.7})
    assert "seeds/0/rl/config.json was made with policy_gradient.kl_coef = " in error(stages, other, tmp_path)
    steps.reporter = reporter = Recorder()
    summary = steps.all()
    assert reporter.stages == [("rl", 6, 4)] and "rl: seed 0 is finished, skipped" in reporter.notes
    first, second = (tmp_path / "seeds" / str(i) for i in (0, 1))
    assert logged(first, "rl") == logged(whole.workdir, "rl")
    alone, other = (checkpoint.load(folder / "rl")["policy"] for folder in (first, second))
    assert_trees_equal(alone, trained(whole.steps, "rl", "policy"))
    assert_trees_equal(trained(steps, "rl", "policy"), alone)  # the run's result is the first seed's
    different = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), alone, other)
    assert max(jax.tree.leaves(different)) > 1e-2
    for row, one, two in zip(*(logged(folder, "rl") for folder in (tmp_path, first, second)), strict=True):
        for name in ("reward", "distinct2", "repeat_rate", "entropy", "length", "kl_exact", "kl", "ess"):
            if f"rl/{name}" not in one:
                continue
            values = one[f"rl/{name}"], two[f"rl/{name}"]
            assert row[f"rl/{name}"] == pytest.approx(np.mean(values))
            half = interval.t95(2) * abs(values[0] - values[1]) / 2**0.5
            assert row[f"rl/{name}_ci95"] == pytest.approx(half, rel=1e-5, abs=1e-9)
    assert len(summary["rl/seeds"]["reward"]) == 2
    assert summary["rl/reward_after"] == pytest.approx(np.mean(summary["rl/seeds"]["reward"]))
    assert summary["rl/seeds"]["reward"][0] == whole.summary["rl/reward_after"]
    gains = summary["rl/seeds"]["reward_gain"]
    low, high = summary["rl/reward_ci95"]
    assert (low + high) / 2 == pytest.approx(np.mean(gains)) and low <= min(gains) <= max(gains) <= high
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rl").rglob("*")}
    again = stages(steps.config, tmp_path)
    assert numbers(again.all()) == numbers(json.loads(json.dumps(summary))) and again.reporter.stages == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rl").rglob("*")} == before


def test_ppo_runs_on_the_same_task_by_one_field(whole, tmp_path):
    steps = branch(whole.steps, tmp_path, "pretrain", "sft", algorithm="ppo")
    summary = steps.one("rl")
    rows = logged(tmp_path, "rl")
    assert {"rl/clip_fraction", "rl/value_loss", "rl/ess_last", "rl/reward"} <= rows[1].keys()
    assert rows[1]["rl/reward"] == pytest.approx(logged(whole.workdir, "rl")[1]["rl/reward"])  # the same rollout
    assert summary["rl/kl_exact"] > 0


def test_outside_the_limits_nothing_is_kept(whole, tmp_path):
    """With no room for KL the best policy within the limits is the one it began with."""
    limits = dataclasses.replace(NO_LIMITS, kl_exact=1e-9, freeze=False)
    steps = branch(whole.steps, tmp_path, "pretrain", "sft", alarms=limits)
    summary = steps.one("rl")
    assert summary["rl/best_step"] == 0 and summary["rl/kl_exact"] < 1e-9
    assert summary["rl/reward_after"] == summary["rl/reward_before"]
    assert_trees_equal(trained(steps, "rl", "policy"), trained(steps, "sft", "policy"))


def test_an_alarm_ends_the_learning_and_says_so(whole, tmp_path):
    limits = dataclasses.replace(NO_LIMITS, kl_exact=1e-9, patience=1)
    steps = branch(whole.steps, tmp_path, "pretrain", "sft", alarms=limits)
    steps.one("rl")
    rows = logged(tmp_path, "rl")
    # The first rollout is the SFT policy's. The second is another's, and trips: the learning ends with it.
    rows = rows[1:7]
    tripped = [row["rl/alarms"] for row in rows]
    frozen = tripped.index(1)
    assert tripped[0] == 0 and tripped[frozen:] == [1] * (6 - frozen) and frozen <= 3
    for row in rows[frozen + 1 :]:
        assert {name for name in row if "eval_" not in name} == {"step", "rl/alarms"}
    evaluated = [row["rl/eval_reward"] for row in rows[frozen:] if "rl/eval_reward" in row]
    assert len(evaluated) > 1 and len(set(evaluated)) == 1
    assert any(note.startswith(f"rl: alarm at step {frozen + 1}: kl_exact") for note in steps.reporter.notes)


def test_an_evaluation_of_the_most_likely_texts_ends_with_numbers(whole, tmp_path):
    """Temperature 0: what is divided by it is measured as the policy was trained."""
    short = {"steps": 2, "eval_every": 1}
    steps = branch(whole.steps, tmp_path, "pretrain", "sft", policy_gradient=short, evaluation={"temperature": 0.0})
    summary = steps.all()
    values = [value for row in logged(tmp_path, "rl") for value in row.values()]
    values += [value for value in summary.values() if isinstance(value, int | float)]
    assert np.isfinite(values).all()
    assert len({row["rl"] for row in samples(tmp_path, "rl")}) == 1  # every sample is the same
    assert summary["rl/kl_exact"] > 0


# Other rewards


def test_a_writer_learns_by_a_reward_model_of_its_own_pairs(whole, tmp_path):
    """Happy texts are chosen over others; the score is the model's, and VADER's reward stands beside it."""
    kind = {"kind": "learned"}
    steps = branch(whole.steps, tmp_path, "pretrain", "sft", reward=kind)
    assert steps.names == ["pretrain", "sft", "reward", "rl"]
    summary = steps.all()
    assert steps.reporter.stages == [("reward", 6, 0), ("rl", 6, 0)]
    rows = steps.task.rows("preferences").held_out
    assert len(samples(tmp_path, "reward")) == len(rows) > 1
    for row in logged(tmp_path, "rl")[1:7]:
        assert np.isfinite(row["rl/score"]) and np.isfinite(row["rl/reward"]) and row["rl/score"] != row["rl/reward"]
    assert logged(tmp_path, "rl")[1]["rl/reward"] == logged(whole.workdir, "rl")[1]["rl/reward"]  # the same rollout
    assert 0 <= summary["reward/accuracy"] <= 1
    assert {"rl/score_before", "rl/score_after", "rl/reward_before", "rl/reward_after"} <= summary.keys()
    scores = [row["score_rl"] for row in samples(tmp_path, "rl")]
    assert np.mean(scores) == pytest.approx(summary["rl/score_after"], abs=1e-5)
    assert differ(trained(steps, "rl", "policy"), trained(steps, "sft", "policy"))


REWARD = """
from rlhf_jax.rewards import sentiment

def mine(texts):
    return {"happy": sentiment.compound(texts), "long": [len(text) / 100 for text in texts], "one": [1] * len(texts)}
"""


def test_stories_learn_by_a_persons_own_reward_and_bpe(config, tmp_path):
    """Happy stories are those that it rewards. The model has more ids than the tokenizer: they are never sampled."""
    (tmp_path / "mine.py").write_text(REWARD)
    short = {name: {"steps": 3, "eval_every": 0} for name in ("pretrain", "sft", "policy_gradient")}
    config = changed(
        config,
        text=configs.Text(kind="bpe", vocab_size=300),
        data=corpus.Config(kind="stories", made=120, length=12, min_reward=1.6),
        model={"vocab_size": 500},
        reward={"kind": f"{tmp_path}/mine.py:mine"},
        **short,
    )
    steps = stages(config, tmp_path / "run")
    summary = steps.all()
    happy, everything = steps.task.rows("sft").train, steps.task.rows("pretrain").train
    texts = [row["text"] for row in happy]
    assert all(np.asarray(sentiment.compound(texts)) + [len(text) / 100 + 1 for text in texts] > 1.6)
    assert 0 < len(happy) < len(everything)
    assert {"pretrain/loss", "rl/reward_after"} <= summary.keys()
    row = logged(tmp_path / "run", "rl")[1]
    parts = [row[f"rl/reward_{name}"] for name in ("happy", "long", "one")]
    assert row["rl/reward"] == pytest.approx(sum(parts), rel=1e-5) and parts[2] == 1
    assert summary["pretrain/reward_one"] == 1
    # An id beyond would be an IndexError where it is decoded.
    stage = steps.make("rl")
    rollout = stage.step(stage.state, stage.batch_at(0)).rollout
    assert steps.setup.apply.policy.config.vocab_size == 500
    assert int(rollout.response_BR.max()) < steps.setup.tokenizer.vocab_size == 300


def test_no_happy_texts_are_an_error(config, tmp_path):
    config = dataclasses.replace(config, data=corpus.Config(kind="stories", made=60, length=12, min_reward=0.999))
    message = error(stages(config, tmp_path).all)
    assert message.startswith("data.min_reward: expected texts with a reward above 0.999 on both sides")
    assert not (tmp_path / "pretrain").exists()
