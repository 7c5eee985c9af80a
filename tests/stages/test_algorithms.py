"""Groups and pairs as a run has them, on questions with right answers: stages, numbers, trace and its proof."""

import json

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.algorithms import ALGORITHMS, dpo
from rlhf_jax.models.decoder import Config as Sizes
from rlhf_jax.tasks import arithmetic
from rlhf_jax.viz.verify import verify
from tests.support import changed, differ, logged, stages, trained

SIZES = {"lr": 1e-2, "steps": 2, "batch": 8, "group": 4, "epochs": 2, "temperature": 1.0, "eval_every": 1}


@pytest.fixture(scope="module")
def config():
    return configs.Config(
        task="arithmetic",
        text=configs.Text(kind="char"),
        data=arithmetic.Config(kind="sort", digits=2, rows=60, wrong=0.3),
        model=Sizes(layers=1, heads=2, head_size=7, width=16, context=7, init_std=0.2),
        sft=configs.Supervised(steps=1, batch=8, eval_every=0),
        reward=configs.Reward(kind="partial"),
        **configs.policies(**SIZES),
        dpo=dpo.Config(lr=1e-2, steps=2, batch=8, eval_every=1),
        evaluation=configs.Evaluation(prompts=6, batch=6, temperature=1.0, samples=1, draws=2),
        trace=configs.Trace(every=1),
    )


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """Runs on groups and on pairs in one workdir, with one fine-tuning."""
    folder = tmp_path_factory.mktemp("run")
    return folder, {name: _run(config, folder, name) for name in ("grpo", "dpo")}


def _run(config, folder, name):
    steps = stages(changed(config, algorithm=name), folder)
    return steps, steps.all()


def test_each_algorithm_leaves_numbers_and_a_policy(workdir):
    folder, runs = workdir
    for name, (steps, summary) in runs.items():
        assert steps.names == ["sft", name]
        assert np.isfinite(summary[f"{name}/kl_exact"]) and 0 <= summary[f"{name}/exact"] <= 1
        assert differ(trained(steps, name, "policy"), trained(steps, "sft", "policy"))
        assert json.loads((folder / name / "config.json").read_text())["section"] == name
        for side in "_sft", "":
            assert 0 <= summary[f"{name}/pass_1{side}"] <= summary[f"{name}/pass_2{side}"] <= 1
    row = logged(folder, "grpo")[1]
    assert row["grpo/kl"] == pytest.approx(0, abs=1e-4) and "grpo/reward" in row
    before = {name: runs[name][1][f"{name}/pass_2_sft"] for name in runs}
    assert before["grpo"] == before["dpo"]  # the same policy, with the same noise


def test_dpo_reads_pairs_and_needs_no_reward_model(workdir):
    folder, runs = workdir
    steps, summary = runs["dpo"]
    assert "reward" not in steps.names and summary["dpo/reward_gain"] == pytest.approx(
        summary["dpo/reward"] - summary["dpo/reward_sft"], abs=1e-6
    )
    first = logged(folder, "dpo")[0]
    assert (first["dpo/eval_accuracy"], first["dpo/eval_margin"]) == (0.5, 0)  # the policy is the reference
    row = logged(folder, "dpo")[1]
    assert row["dpo/loss"] == pytest.approx(np.log(2), abs=1e-5) and row["dpo/length_difference"] == 0


def test_a_group_has_one_prompt_in_rows_next_to_each_other(workdir):
    steps, _ = workdir[1]["grpo"]
    batch = steps.setup.batch_at("prompts", 8, "rl", "grpo.batch", 4)(0)
    index_QO = np.asarray(batch["index_B"]).reshape(2, 4)
    assert (index_QO == index_QO[:, :1]).all() and index_QO[0, 0] != index_QO[1, 0]


def test_every_trace_is_proved(workdir):
    """Recomputed from its own arrays."""
    results = {each.identity: each for each in verify(workdir[0])}
    assert {name: each.breach for name, each in results.items() if each.breach} == {}
    assert {"group", "pair loss", "KL loss", "policy loss", "returns"} <= results.keys()


def test_every_algorithm_has_a_section_and_one_line_in_the_table():
    assert {*ALGORITHMS} <= {*configs.tree(configs.Config())}
