"""Own prompts and an own reward, as a person runs them: what a run leaves, and what is refused in one line."""

import json
import shutil

import pytest

from tests.support import on_disk, write_rows

RL, TWEETS, PPO = (f"experiments/{name}.py" for name in ("rl", "pg_tweets", "ppo_summarize"))
FIELDS = {"data.prompt_length": 12, "data.response_length": 6, "data.held_out": 0.3}
FIELDS |= {"evaluation.prompts": 4, "evaluation.batch": 4, "evaluation.samples": 1}
FIELDS |= {"model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_size": 8, "model.context": 32}
for stage in "sft", "reward", "ppo", "policy_gradient":
    FIELDS |= {f"{stage}.batch": 4, f"{stage}.eval_every": 0}
FIELDS |= {"reward.steps": 1, "ppo.steps": 1, "ppo.epochs": 1, "policy_gradient.steps": 1}
ROWS = [{"prompt": f"say {i}", "label": f"{i}", "answer": str(i), "chosen": "ab", "rejected": "c"} for i in range(20)]
REWARDS = """\
def correct(rows, texts):
    assert all(row["prompt"] == f"say {row['answer']}" for row in rows)
    return [float(row["answer"] in text) + 1 for row, text in zip(rows, texts, strict=True)]

def length(texts):
    return [float(len(text)) for text in texts]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """prompts.jsonl, mine.py, and an empty cache of the world."""
    folder = tmp_path_factory.mktemp("mine")
    write_rows(folder / "prompts.jsonl", ROWS)
    (folder / "mine.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def rl(forks, folder):
    """rl(flags) -> exit code and output of experiments/rl.py with the smallest run on these prompts and `correct`."""
    own = {"data.prompts": folder / "prompts.jsonl", "reward": f"{folder}/mine.py:correct"}
    small = ["--config=configs/rl.py", *(f"--config.{field}={value}" for field, value in (FIELDS | own).items())]
    return lambda *flags: forks(RL, *small, *flags)


def assert_done(result):
    assert (result.code, result.err) == (0, ""), result.err


def assert_refused(result, *words):
    """One line that has these words, and exit code 2."""
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_own_prompts_and_reward_with_either_algorithm_in_one_workdir(rl, tmp_path):
    """A function of the rows sees all their columns; the second algorithm leaves the first one's folder alone."""
    assert_done(rl(f"--workdir={tmp_path}"))
    found = summary(tmp_path)
    assert 1 <= found["ppo/reward"] <= 2 and 1 <= found["ppo/reward_sft"] <= 2  # `correct` is one of 1 and 2
    assert not (tmp_path / "sft").exists() and not (tmp_path / "reward").exists()
    before = on_disk(tmp_path / "ppo")
    assert_done(rl(f"--workdir={tmp_path}", "--config.algorithm=policy_gradient"))
    found = summary(tmp_path)
    assert 1 <= found["policy_gradient/reward"] <= 2 and "ppo/reward" not in found
    assert on_disk(tmp_path / "ppo") == before and (tmp_path / "policy_gradient" / "result").is_dir()


@pytest.fixture(scope="module")
def tuned(rl, folder):
    """The workdir of a run that was fine-tuned for one step, then trained by PPO with a reward of its own."""
    workdir = folder / "tuned"
    assert_done(rl(f"--workdir={workdir}", "--config.sft.steps=1", f"--config.data.sft={folder}/prompts.jsonl"))
    return workdir


@pytest.fixture
def other(rl, folder, tmp_path):
    """other(flags) -> a run in tmp_path with the fine-tuning that `from_` names."""
    sft = ["--config.sft.steps=1", f"--config.data.sft={folder}/prompts.jsonl", f"--workdir={tmp_path}/run"]
    return lambda place, *flags: rl(*sft, f"--config.sft.from={place}", *flags)


def test_a_stage_of_another_run_is_used_in_place(other, tuned, tmp_path):
    before = on_disk(tuned)
    result = other(tuned, "--config.ppo.kl_coef=0.5")
    assert_done(result)
    assert f"sft: taken from {tuned}, skipped\n" in result.out
    assert on_disk(tuned) == before and not (tmp_path / "run" / "sft").exists()
    found = summary(tmp_path / "run")
    assert found["sft/loss"] == summary(tuned)["sft/loss"] and "ppo/reward" in found


def test_a_stage_of_a_run_with_another_config_is_refused_with_both_values(other, tuned, tmp_path):
    words = f"sft.from: {tuned}/sft/config.json was made with sft.lr = 0.002, not 0.5\n"
    assert_refused(other(tuned, "--config.sft.lr=0.5"), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("unfinished", ["unfinished", "nowhere"])
def test_a_stage_that_is_unfinished_or_not_there_is_refused(unfinished, other, tuned, tmp_path):
    place = tmp_path / unfinished
    if unfinished == "unfinished":
        shutil.copytree(tuned, place)
        (place / "sft" / "summary.json").unlink()
    assert_refused(other(place), f"sft.from: expected a finished stage of 1 steps in {place}/sft\n")
    assert not (tmp_path / "run").exists() and place.exists() == (unfinished == "unfinished")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.ppo.max_grad_norm=-1"], ["ppo.max_grad_norm: expected at least 0, got", "got -1.0"]),
        (
            ["--config.ppo.batch=48", "--config.ppo.kl_target=6", "--config.ppo.kl_horizon=5"],
            ["ppo.kl_horizon: expected more than 0.2 batch = 9.6, to keep kl_coef positive, got 5\n"],
        ),
        (["--config.ppo.kl_horizon=-100"], ["ppo.kl_horizon: expected at least 1, ", "got -100"]),
        (["--config.ppo.lr=nan"], ["ppo.lr: expected more than 0 and at most 10, got nan"]),
        (["--config.ppo.kl_coef=inf"], ["ppo.kl_coef: expected at least 0 and at most 1e+09, got inf"]),
        (["--config.data.held_out=nan"], ["data.held_out: expected more than 0 and less than 1, got nan"]),
        (["--config.evaluation.temperature=-inf"], ["evaluation.temperature: expected at least 0 ", "got -inf"]),
        (
            ["--config.reward=joy"],
            ["reward: expected learned, sentiment, gold, rouge, exact, partial or path/to/file.py:function; got"],
        ),
        (
            ["--config.reward=gold"],
            ["reward.kind: expected learned, sentiment, rouge, exact, partial or path/to/file.py:function", "'gold'"],
        ),
        (["--config.ppo.value_init=reward"], ["ppo.value_init: expected zero or auto where reward is", "'reward'"]),
        (["--config.data.cut=middle"], ["data.cut: expected left or right or newline or skip or error, got 'middle'"]),
        (["--config.data.prompts=no.jsonl"], ["missing files: data.prompts = 'no.jsonl'"]),
        (["--config.algorithm=rloo", "--config.rloo.group=1"], ["rloo.group: expected at least 2, got 1\n"]),
        (
            ["--config.algorithm=grpo", "--config.grpo.batch=6"],
            ["grpo.batch: expected a multiple of group x ", "got 6"],
        ),
        (
            ["--config.algorithm=dapo", "--config.dapo.clip=0.3", "--config.dapo.clip_high=0.2"],
            ["dapo.clip_high: expected 0, or at least clip = 0.3, got 0.2\n"],
        ),
        (["--config.algorithm=dpo"], ["data.preferences: expected a ", "(--config.data.preferences=FILE), got none\n"]),
        (["--config.algorithm=rloo", "--config.rloo.gamma=0.9"], ["rloo.gamma: 0.9 has no effect, as a completion is"]),
        (
            ["--config.algorithm=reinforce_pp", "--config.reinforce_pp.epochs=1", "--config.reinforce_pp.clip=0.1"],
            ["reinforce_pp.clip: 0.1 has no effect, as a rollout has one optimizer step"],
        ),
        (
            ["--config.algorithm=dpo", "--config.evaluation.result=best"],
            ["evaluation.result: 'best' has no effect, as algorithm is dpo, which learns from pairs\n"],
        ),
        (["--config.data.source=world"], ["data.source: expected files or hub where task is prompts, got 'world'"]),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(flags, words, rl, tmp_path):
    assert_refused(rl(f"--workdir={tmp_path}/run", *flags), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "config", "words"),
    [
        (
            RL,
            "pg_tweets",
            "rl.py: --config: expected a config whose task is prompts, got one for write; experiments/pg_tweets.py",
        ),
        (RL, "ppo_summarize", "task is prompts, got one for summarize; experiments/ppo_summarize.py runs this one\n"),
        (TWEETS, "rl", "pg_tweets.py: --config: expected a config whose task is write, got one for prompts"),
        (PPO, "rl", "task is summarize, got one for prompts; experiments/rl.py runs this one\n"),
    ],
)
def test_a_config_of_another_script_names_task_and_script(script, config, words, forks, tmp_path):
    result = forks(script, f"--config=configs/{config}.py", f"--workdir={tmp_path}/run")
    assert_refused(result, words)
    assert not (tmp_path / "run").exists()
