"""The stage at fault is named, from the numbers that a run records; a healthy run passes."""

import json

import numpy as np
import pytest

from configs import rl_arithmetic
from rlhf_jax import config as configs
from rlhf_jax.commands import doctor
from tests.commands import conftest
from tests.support import Recorder, error

# What `make demo` records (seed 1), rounded.
SFT = [{"eval_loss": 7.06}, {"eval_loss": 0.41}, {"eval_loss": 0.36}]
REWARD = [{"eval_loss": 0.9}, {"eval_loss": 0.37}, {"eval_loss": 0.37}]
PPO = [
    {"kl_exact": 0.0, "clip_fraction": 0.02, "explained_variance": -0.3},
    *[{"kl_exact": 1.2, "clip_fraction": 0.03, "explained_variance": 0.5}] * 9,
]
SUMMARIES = {
    "sft": {"eos_rate": 0.99},
    "reward": {"accuracy": 0.854, "accuracy_ci95": [0.82, 0.88]},
    "ppo": {
        "kl_exact": 1.17, "entropy": 0.21, "entropy_sft": 0.36, "length": 15.1, "length_sft": 14.2, "eos_rate": 1.0,
        "repeat_rate": 0.0, "score_ci95": [0.68, 0.85], "gold_ci95": [0.24, 0.3],
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(**changes): the workdir of a run with these rows or numbers of a stage in place of the healthy ones."""

    def run(rows=(), evaluation=None, stages=("sft", "reward", "ppo"), **numbers):
        (tmp_path / "config.json").write_text(json.dumps(configs.tree(configs.Config())))
        for name, healthy in {"sft": SFT, "reward": REWARD, "ppo": PPO}.items():
            if name not in stages:
                continue
            (tmp_path / name).mkdir()
            for file, made in (
                (
                    "metrics.jsonl",
                    [
                        {"step": i, "time": i} | {f"{name}/{k}": v for k, v in row.items()}
                        for i, row in enumerate(dict(rows).get(name, healthy))
                    ],
                ),
                ("summary.json", [{f"{name}/{k}": v for k, v in (SUMMARIES[name] | numbers.get(name, {})).items()}]),
            ):
                (tmp_path / name / file).write_text("".join(json.dumps(row) + "\n" for row in made))
        if evaluation:
            (tmp_path / "evaluation").mkdir()
            values = {name: {"value": value} for name, value in evaluation.items()}
            (tmp_path / "evaluation" / "ppo.json").write_text(json.dumps({"reward_model": values}))
        return tmp_path

    return run


CALIBRATED = {
    "accuracy": 0.85, "accuracy_of_longer": 0.6, "accuracy_of_shorter": 0.4, "temperature": 1.3,
    "accuracy_prefers_own_prompt": 0.9,
}  # fmt: skip


def test_a_healthy_run_passes(run):
    findings = doctor.examine(run(evaluation=CALIBRATED))
    assert {each.verdict for each in findings} == {doctor.PASS} and len(findings) >= 15
    assert doctor.verdict(findings) == "healthy: every number is in its range"


BROKEN = [
    # fine-tuning of five steps; without EOS; learned by heart
    ("sft", "loss, share of the first", {"rows": {"sft": [{"eval_loss": 7.06}, {"eval_loss": 7.0}]}}),
    ("sft", "eos_rate", {"sft": {"eos_rate": 0.0}}),
    ("sft", "loss, share of its least", {"rows": {"sft": [{"eval_loss": x} for x in (7, 0.4, 0.9)]}}),
    # half of the labels shuffled; ten pairs; over-confident; knows length alone; does not read the post
    ("reward", "accuracy, lower end", {"reward": {"accuracy_ci95": [0.46, 0.55]}}),
    ("reward", "loss, share of its least", {"rows": {"reward": [{"eval_loss": x} for x in (0.7, 0.6, 1.4)]}}),
    ("reward", "accuracy above length's", {"evaluation": CALIBRATED | {"accuracy_of_longer": 0.86}}),
    ("reward", "temperature", {"evaluation": CALIBRATED | {"temperature": 6.0}}),
    ("reward", "prefers the own post", {"evaluation": CALIBRATED | {"accuracy_prefers_own_prompt": 0.5}}),
    # another reference; another sampler; no KL penalty; a large learning rate; frozen values; collapse
    ("ppo", "exact KL of the first rollout, nats", {"rows": {"ppo": [PPO[0] | {"kl_exact": 0.3}, *PPO[1:]]}}),
    ("ppo", "k1 KL of the first rollout, nats", {"rows": {"ppo": [PPO[0] | {"kl": -0.7}, *PPO[1:]]}}),
    ("ppo", "exact KL, nats", {"ppo": {"kl_exact": 40.0}}),
    ("ppo", "clip fraction", {"rows": {"ppo": [PPO[0]] + [PPO[1] | {"clip_fraction": 0.6}] * 9}}),
    ("ppo", "explained variance", {"rows": {"ppo": [PPO[0]] * 10}}),
    ("ppo", "groups of equal scores", {"rows": {"ppo": [PPO[0]] + [PPO[1] | {"groups_equal": 0.95}] * 9}}),
    ("ppo", "entropy, share of the first", {"ppo": {"entropy": 0.01}}),
    ("ppo", "length, share of the first", {"ppo": {"length": 60.0}}),
    ("ppo", "repeat_rate", {"ppo": {"repeat_rate": 0.9}}),
    ("ppo", "gain in reward, lower end", {"ppo": {"score_ci95": [-0.1, 0.1]}}),
    ("ppo", "gain in gold, lower end", {"ppo": {"gold_ci95": [-0.3, -0.2]}}),
]


@pytest.mark.parametrize(("stage", "name", "changes"), BROKEN, ids=[name for _, name, _ in BROKEN])
def test_the_stage_at_fault_is_named(stage, name, changes, run):
    findings = doctor.examine(run(**changes))
    (wrong,) = (each for each in findings if each.verdict != doctor.PASS)
    assert (wrong.stage, wrong.name) == (stage, name) and wrong.advice and wrong.source
    assert wrong.line.startswith(f"doctor  {wrong.verdict}  {stage}  {name}: ") and wrong.line.endswith(wrong.advice)
    assert doctor.verdict(findings).startswith(f"{stage} first: {name} is ")
    reporter = Recorder()
    doctor.show(findings, reporter)
    assert reporter.notes == [f"{wrong.verdict}  {stage}  {name}: {wrong.advice}", doctor.verdict(findings)]
    assert len(reporter.tables[0][1]) == len(findings)


def test_what_an_interrupted_evaluation_leaves_hides_no_result(run):
    folder = run(evaluation=CALIBRATED | {"temperature": 6.0})
    (folder / "evaluation" / "ppo-1.jsonl.made_of.json").write_text('{"run": "x"}')  # newer than the result
    assert "temperature" in {each.name for each in doctor.examine(folder)}


def test_a_number_that_is_not_finite_counts_for_nothing_and_a_damaged_file_is_one_line(run):
    folder = run(rows={"sft": [*SFT, {"eval_loss": None}]})  # as NaN is written
    assert {each.verdict for each in doctor.examine(folder)} == {doctor.PASS}
    (folder / "sft" / "metrics.jsonl").write_text("{\n")
    assert "sft/metrics.jsonl line 1: expected a JSON object" in error(doctor.examine, folder)


def test_right_answers_may_be_certain(run):
    folder = run(ppo={"entropy": 0.01})
    (folder / "config.json").write_text(json.dumps(rl_arithmetic.get_config().to_dict() | {"algorithm": "ppo"}))
    assert "entropy, share of the first" not in {each.name for each in doctor.examine(folder)}


def test_the_earliest_of_the_worst_is_first(run):
    """A warning of fine-tuning comes after a failure of PPO, and a failure of the reward model before it."""
    numbers = {"sft": {"eos_rate": 0.7}, "ppo": {"kl_exact": 40.0}}
    assert doctor.verdict(doctor.examine(run(**numbers))).startswith("ppo first: exact KL")


def test_what_is_not_finished_is_left_out(run):
    assert {each.stage for each in doctor.examine(run(stages=("sft",)))} == {"sft"}


def test_no_finished_stage(run):
    assert "expected a run with a finished stage" in error(doctor.examine, run(stages=()))


# Best of n, of two prompts with two samples each


GOOD = {
    "reward_QO": [[0.0, 1.0], [3.0, 1.0]],  # it prefers what the judge prefers
    "judge_QO": [[0.2, 0.6], [0.7, 0.5]],
    "after_QO": [[0.6, 0.6], [0.7, 0.7]],
    "references_Q": [0.5, 0.5],
}
FAULTS = [
    ("healthy", {}),
    ("reward first: gain in gold of the reward's best of 2", {"reward_QO": [[1.0, 0.0], [1.0, 3.0]]}),
    ("reward first: gain in the reward of its best of 2", {"reward_QO": [[1.0, 1.0], [2.0, 2.0]]}),
    ("ppo first: gain in gold over sft", {"after_QO": [[0.2, 0.6], [0.5, 0.6]]}),
    ("sft first: gain in gold of its best of 2 by gold", {"judge_QO": [[0.6, 0.6], [0.6, 0.6]]}),
    ("sft first: best of 2 by gold, above the references", {"references_Q": [0.9, 0.9]}),
    # a reward that is a function cannot be at fault
    ("healthy", {"reward_QO": None, "references_Q": None}),
]


def tried(**changes):
    arrays = {name: value if value is None else np.array(value) for name, value in (GOOD | changes).items()}
    return list(doctor._trial("sft", "ppo", "gold", 2, **arrays))


@pytest.mark.parametrize(("fault", "changes"), FAULTS, ids=[f"{fault} {i}" for i, (fault, _) in enumerate(FAULTS)])
def test_best_of_n_names_the_stage_at_fault(fault, changes):
    assert doctor.verdict([], tried(**changes)).startswith(fault)


def test_gains_by_hand():
    values = {each.name: each.value for each in tried()}
    # by the judge's own choice .2 and .1: mean .15, s = .1 / sqrt(2)
    assert values["gain in gold of its best of 2 by gold, lower end"] == pytest.approx(0.15 - 1.96 * 0.05, abs=1e-4)
    assert values["gain in the reward of its best of 2, lower end"] == pytest.approx(0.75 - 1.96 * 0.25, abs=1e-4)
    assert values["gain in gold of the reward's best of 2, lower end"] == pytest.approx(0.15 - 1.96 * 0.05, abs=1e-4)
    assert values["gain in gold over sft, lower end"] == pytest.approx(0.15 - 1.96 * 0.05, abs=1e-4)
    assert values["best of 2 by gold, above the references"] == pytest.approx(0.15)


def test_a_warning_is_not_worse_than_what_the_judge_says(run):
    findings = doctor.examine(run(evaluation=CALIBRATED | {"accuracy_prefers_own_prompt": 0.55}))
    assert doctor.verdict(findings, tried()).startswith("healthy by the judge, warnings: 1; gain in gold over sft")
    assert doctor.verdict(findings).startswith("reward first: prefers the own post")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"evaluation": CALIBRATED | {"accuracy_prefers_own_prompt": 0.3}}, doctor.WARN),
        ({"evaluation": CALIBRATED | {"accuracy_of_longer": 0.84}}, doctor.FAIL),
        ({"rows": {"ppo": [PPO[0]] + [PPO[1] | {"explained_variance": 0.05}] * 9}}, doctor.WARN),
        ({"rows": {"ppo": [PPO[0]] + [PPO[1] | {"explained_variance": 0.01}] * 9}}, doctor.FAIL),
    ],
    ids=["style", "length", "poor values", "constant values"],
)
def test_what_is_a_failure_and_what_a_warning(changes, verdict, run):
    """Style alone can be worth a lot: healthy reward models of the embedded world do not read the post."""
    (wrong,) = (e for e in doctor.examine(run(**changes)) if e.verdict != doctor.PASS)
    assert wrong.verdict == verdict


def test_a_run_is_tried(folder, monkeypatch):
    """A judge that counts letters: some samples are longer than others, and the samples of a stage are the same."""
    (folder / "letters.py").write_text("def count(texts):\n    return [len(text) for text in texts]\n")
    judge = f"{folder}/letters.py:count"
    found = doctor.best_of(folder, n=3, prompts=4, judge=judge)
    assert [each.stage for each in found] == ["sft", "sft", "reward", "reward", "ppo"]
    values = {each.name: each.value for each in found}
    texts = {}
    for path in (folder / "evaluation").glob("*.jsonl"):
        texts[path.name.split("-")[0]] = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(texts["sft"]) == len(texts["ppo"]) == 12
    letters_QO = np.array([len(row["completion"]) for row in texts["sft"]]).reshape(4, 3)
    labels = {row["prompt"]: row["label"] for row in conftest.SFT}
    references = [len(labels[row["prompt"]]) for row in texts["sft"][::3]]
    over = values[f"best of 3 by {judge}, above the references"]
    assert over == pytest.approx(letters_QO.max(axis=1).mean() - np.mean(references))
    assert doctor.best_of(folder, n=3, prompts=4, judge=judge) == doctor.tried(folder) == found
    monkeypatch.setattr(doctor, "_weights", lambda _: "trained again")
    assert doctor.tried(folder) == []


def test_without_a_judge_nothing_is_tried(folder):
    assert doctor.best_of(folder) == []
    message = error(doctor.best_of, folder, judge="cat")
    assert message == "judge: expected one that gives a text a number, got the program 'cat'"
