"""Own prompts and an own reward that reads a column of theirs: no fine-tuning, no reward model."""

import json

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient, ppo
from rlhf_jax.config import Reward, Supervised
from rlhf_jax.data import sources
from rlhf_jax.models import decoder
from tests.support import assert_trees_equal, differ, logged, samples, stages, trained, write_rows

ROWS = [{"prompt": f"{i} + {i % 7} =", "answer": str(i + i % 7)[-1]} for i in range(60)]
REWARD = """
import json, pathlib

def mine(rows, texts):
    pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps([row["prompt"] for row in rows]))
    for row in rows:
        a, b = row["prompt"].removesuffix(" =").split(" + ")
        assert row["answer"] == str(int(a) + int(b))[-1]
    right = [float(row["answer"] in text) for row, text in zip(rows, texts)]
    return {"right": right, "short": [-len(text) for text in texts]}
"""


def test_own_prompts_and_own_reward(tmp_path):
    """With PPO; tests/experiments/test_rl.py has both."""
    algorithm = "ppo"
    (tmp_path / "own.py").write_text(REWARD)
    often = {"steps": 3, "batch": 8, "eval_every": 2, "lr": 3e-2, "temperature": 1.0, "missing_eos_penalty": 0.0}
    config = configs.Config(
        task="prompts",
        algorithm=algorithm,
        text=configs.Text(kind="char"),
        data=sources.Config(
            source="files",
            prompts=write_rows(tmp_path / "prompts.jsonl", ROWS),
            held_out=0.3,
            prompt_length=9,
            response_length=5,
        ),
        model=decoder.Config(layers=1, heads=2, head_size=7, width=16, context=14, init_std=0.2),
        sft=Supervised(steps=0),
        reward=Reward(kind=f"{tmp_path}/own.py:mine"),
        ppo=ppo.Config(**often, epochs=2, missing_eos="subtract"),
        policy_gradient=policy_gradient.Config(**often, missing_eos="subtract"),
        evaluation=configs.Evaluation(prompts=12, batch=12, temperature=1.0, samples=2),
    )
    steps = stages(config, tmp_path / "run")
    summary = steps.all()
    assert steps.reporter.stages == [(algorithm, 3, 0)]
    rows = logged(tmp_path / "run", algorithm)
    for row in rows[1:4]:
        parts = row[f"{algorithm}/reward_right"], row[f"{algorithm}/reward_short"]
        assert row[f"{algorithm}/reward"] == pytest.approx(sum(parts), rel=1e-5) and parts[1] < 0
    if algorithm == "ppo":
        assert rows[1]["ppo/value"] == 0  # from a zero head
    _, questions = steps.setup.questions("prompts")
    train = {row["prompt"] for row in steps.task.rows("prompts").train}
    shown = samples(tmp_path / "run", algorithm)
    assert [row["prompt"] for row in shown] == [row["prompt"] for row in questions] and len(shown) == 12
    assert train.isdisjoint(row["prompt"] for row in questions)
    for side, suffix in ("sft", "_sft"), (algorithm, ""):
        texts = [row[side]["completion"] for row in shown]
        expected = [(row["answer"] in text) - len(text) for row, text in zip(questions, texts, strict=True)]
        assert [row[side]["score"] for row in shown] == pytest.approx(expected)
        assert summary[f"{algorithm}/reward{suffix}"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert not [name for name in summary if "gold" in name or "rouge" in name]  # no record, no labels
    stage = steps.make(algorithm)
    start = stage.state.reference
    assert differ(trained(steps, algorithm, "policy"), start)
    assert_trees_equal(start, steps._policy_init())
    # The rows that a reward gets are those of its completions.
    rollout = stage.step(stage.state, stage.batch_at(1)).rollout
    seen = json.loads((tmp_path / "seen.json").read_text())
    decode = steps.setup.tokenizer.decode
    pairs = zip(np.asarray(rollout.prompt_BP), np.asarray(rollout.prompt_mask_BP), strict=True)
    assert seen == [decode(ids[mask].tolist()) for ids, mask in pairs]
