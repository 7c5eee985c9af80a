"""Runs that are broken on purpose: the doctor names the stage. Each is trained, on a task that a tiny model can learn.

A prompt begins with a or b, and a completion is 3 to 6 letters a and b. It is as good as the share of its letters that
are the prompt's: .65 in the labels.
"""

import dataclasses
import random

import pytest

from rlhf_jax import config as configs
from rlhf_jax import rollout
from rlhf_jax.algorithms import ppo
from rlhf_jax.commands import doctor
from rlhf_jax.commands.evaluate import Settings, evaluate
from rlhf_jax.config import Reward, Supervised
from rlhf_jax.data import batches, sources
from rlhf_jax.models import decoder
from tests.support import branch, stages, write_rows

JUDGE = """\
def share(rows, texts):
    return [sum(c == row["prompt"][0] for c in text) / max(len(text), 1) for row, text in zip(rows, texts)]
"""
NOISE = "cdef"
PROMPTS = [f"{letter}{x}{y}{z}:" for letter in "ab" for x in NOISE for y in NOISE for z in NOISE]
HELD_OUT = 0.3


def written(prompt, rng):
    """A completion as the writers of the labels write it."""
    other = {"a": "b", "b": "a"}[prompt[0]]
    return "".join(prompt[0] if rng.random() < 0.65 else other for _ in range(rng.randint(3, 6)))


def quality(prompt, text):
    return text.count(prompt[0]) / len(text)


def pairs(rng, better):
    """Four pairs of each prompt; `better` is the key of the chosen one, of equal ones another pair is written."""
    rows = []
    for prompt in PROMPTS * 4:
        one, other = written(prompt, rng), written(prompt, rng)
        while better(prompt, one) == better(prompt, other):
            one, other = written(prompt, rng), written(prompt, rng)
        one, other = sorted((one, other), key=lambda text: better(prompt, text))
        rows.append({"prompt": prompt, "chosen": other, "rejected": one})
    rng.shuffle(rows)  # the next row's prompt begins with either letter: evaluate.py swaps neighbours
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: path} of the rows: labels, and pairs that are preferred by quality, by length, by chance; ten pairs."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    good = pairs(rng, quality)
    train, held_out = batches.split(good, HELD_OUT, 1)
    rows = {
        "sft": [{"prompt": prompt, "label": written(prompt, rng)} for prompt in PROMPTS * 4],
        "good": good,
        "length": pairs(rng, lambda prompt, text: len(text)),
        "chance": pairs(rng, lambda prompt, text: rng.random()),
        "ten": train[:10] + held_out,
    }
    (folder / "judge.py").write_text(JUDGE)
    return {name: write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()} | {
        "judge": f"{folder}/judge.py:share"
    }


@pytest.fixture(scope="module")
def healthy(files, tmp_path_factory):
    """The run that nothing is wrong with. Constant schedules: runs of other lengths have the same programs."""
    shared = {"adam_b2": 0.95, "schedule": "constant", "eval_every": 0}
    config = configs.Config(
        task="prompts",
        text=configs.Text(kind="char"),
        data=sources.Config(
            source="files", sft=files["sft"], preferences=files["good"], held_out=HELD_OUT, prompt_length=5,
            response_length=8, cut="left",
        ),
        model=decoder.Config(layers=1, heads=2, head_size=16, width=32, context=16, init_std=0.2),
        sft=Supervised(**shared | {"eval_every": 100}, lr=3e-3, steps=200, batch=32, loss_on="response"),
        reward=Reward(**shared | {"eval_every": 50}, lr=3e-3, steps=150, batch=32),
        ppo=ppo.Config(**shared, lr=1e-3, steps=25, batch=64, epochs=2, temperature=1.0, kl_coef=0.05),
        evaluation=configs.Evaluation(prompts=36, batch=36, temperature=1.0, samples=0),
        log="",
    )  # fmt: skip
    steps = stages(config, tmp_path_factory.mktemp("healthy"))
    steps.all()
    return steps


def trained(steps, *names):
    """The verdict on these stages of a run, after the reward model has been evaluated."""
    for name in names:
        steps.one(name)
    if (steps.workdir / "reward" / "summary.json").exists():
        evaluate(steps.workdir.path, Settings(stage="reward", rows=0))
    return doctor.verdict(doctor.examine(steps.workdir.path))


def test_a_healthy_run_is_healthy(healthy, files):
    trained(healthy)
    findings = doctor.examine(healthy.workdir.path)
    trial = doctor.best_of(healthy.workdir.path, n=16, prompts=32, judge=files["judge"])
    assert {each.name: each.value for each in [*findings, *trial] if each.verdict != doctor.PASS} == {}
    assert len(trial) == 5 and len(findings) > 15


def test_fine_tuning_of_two_steps(healthy, tmp_path):
    steps = branch(healthy, tmp_path, sft={"steps": 2, "eval_every": 1})
    assert trained(steps, "sft").startswith("sft first: ")


@pytest.mark.parametrize("preferred", ["chance", "length", "ten"])
def test_a_reward_model_of_bad_or_few_pairs(preferred, healthy, files, tmp_path):
    steps = branch(healthy, tmp_path, "sft", data={"preferences": files[preferred]}, reward={"batch": 8})
    assert trained(steps, "reward").startswith("reward first: ")


@pytest.mark.parametrize("fields", [{"lr": 0.1}, {"value_coef": 0.0, "value_init": "zero"}], ids=["lr", "value"])
def test_reinforcement_learning_that_cannot_learn(fields, healthy, tmp_path):
    steps = branch(healthy, tmp_path, "sft", "reward", ppo=fields)
    assert trained(steps, "ppo").startswith("ppo first: ")


def test_a_sampler_of_another_temperature(healthy, tmp_path, monkeypatch):
    sample = rollout.sample

    def hotter(*args, sampling, **parts):
        return sample(*args, sampling=dataclasses.replace(sampling, temperature=1.5), **parts)

    monkeypatch.setattr(rollout, "sample", hotter)
    steps = branch(healthy, tmp_path, "sft", "reward", ppo={"steps": 2})
    assert trained(steps, "ppo").startswith("ppo first: k1 KL of the first rollout")
