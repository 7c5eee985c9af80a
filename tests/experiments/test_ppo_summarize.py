"""The commands as a person runs them: what they say of bad input, and a run that is stopped and goes on."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rlhf_jax.data.tldr import format_query

ROOT = Path(__file__).parents[2]
PPO, REWARD, SFT = (f"experiments/{name}_summarize.py" for name in ("ppo", "reward", "sft"))
EXPORT = "experiments/export_hf.py"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of the smallest run."""
    fields = {"data.cache": tmp_path_factory.mktemp("world"), "data.prompt_length": 48}
    fields |= {"evaluation.prompts": 8, "evaluation.batch": 8}  # sizes and programs of test_kill.py
    fields |= {"data.world_sft": 40, "data.world_preferences": 40, "data.world_prompts": 40, "data.world_held_out": 8}
    fields |= {"model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_size": 8}
    for stage in "sft", "reward", "ppo":
        fields |= {f"{stage}.steps": 2, f"{stage}.batch": 4, f"{stage}.schedule": "constant"}
    return ["--config=configs/ppo_summarize.py", *(f"--config.{field}={value}" for field, value in fields.items())]


@pytest.fixture(scope="module")
def command(forks, small):
    """command(flags) -> its exit code and what it wrote. The flags come after those of the smallest run."""

    def run(*flags, script=PPO, before=small):
        return forks(script, *before, *flags)

    return run


def assert_refused(result, *words):
    """One line that has these words, and exit code 2."""
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert result.err.startswith("ppo_summarize.py: ") and "Traceback" not in result.err
    for word in words:
        assert word in result.err


def on_disk(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--confg.ppo.steps=3", ["confg.ppo.steps"]),
        ("--seed=3", ["seed"]),
        ("--config.ppo.kl_coeff=1", ["kl_coeff", 'Did you mean "kl_coef"']),
        ("--config.pppo.steps=1", ["pppo", 'Did you mean "ppo"']),
        ("--config.ppo.steps=many", ["--config.ppo.steps=many"]),
        ("--config.ppo.steps=1.5", ["--config.ppo.steps=1.5"]),
        ("--config.ppo.lr=fast", ["--config.ppo.lr=fast"]),
        ("--config.ppo.whiten_rewards=maybe", ["--config.ppo.whiten_rewards=maybe"]),
        ("--config.data.response_length=80", ["model.context: expected at least", "= 128"]),
        ("--config.sft.microbatches=3", ["sft.batch: expected a multiple of", "got 4"]),
        ("--config.ppo.top_k=5", ["ppo.top_k: expected 0 in training (a rollout samples the", "got 5"]),
        ("--config.ppo.top_p=0.9", ["ppo.top_p: expected 1 in training (a rollout samples the", "got 0.9"]),
        ("--config.text.kind=words", ["text.kind: expected files or gpt2 or bpe or char, got 'words'"]),
        ("--config.data.sft=no.jsonl", ["missing files: data.sft = 'no.jsonl'"]),
        ("--config.data.source=files", ["data.sft: expected a .jsonl, .json, .csv, .parquet file"]),
        ("--config.data.prompt_length=9", ["data.sft", "prompt: expected at most 9 tokens, got"]),
        ("--config.seed=99999999999999999999", ["seed"]),
        ("--config.text.vocab_size=9", ["text.vocab_size: expected at least 258"]),
        ("--config.data.world_sft=0", ["data.world_sft: expected at least 1, got", "got 0"]),
        ("stray", ["stray: expected only --flags"]),
        ("--config.sft.max_grad_norm=-1", ["sft.max_grad_norm: expected at least 0, got", "got -1.0"]),
        ("--config.sft.lr=nan", ["sft.lr: expected more than 0 and at most 10, got nan"]),
        ("--config.reward.batch=0", ["reward.batch: expected at least 1, got", "got 0"]),
        (
            "--config.reward=joy",
            ["reward: expected learned, sentiment, gold, rouge, exact, partial or path/to/file.py:function; got 'joy'"],
        ),
        ("--config.sft.from=no/where", ["sft.from: expected a finished stage of 2 steps in", "no/where/sft\n"]),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(flag, words, command, tmp_path):
    assert_refused(command(f"--workdir={tmp_path}/run", flag), *words)
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/ppo_summarize.py:tinny"], ["tinny: expected tiny, files, gpt2, "]),
        (["--config=configs/no.py"], ["configs/no.py"]),
        (
            ["--config=no"],
            ["--config: expected a file or one of pg_stories, pg_tweets, ppo_summarize, rl, rl_arithmetic"],
        ),
        (
            ["--config", "no:tiny"],
            ["expected a file or one of pg_stories, pg_tweets, ppo_summarize, rl, rl_arithmetic, got no"],
        ),
        (["--config=ppo_summarize:tinny"], ["tinny: expected tiny, files, gpt2, "]),
        (["--config", "ppo_summarize", "--config.ppo.top_k=5"], ["ppo.top_k: expected 0"]),
        ([], ["--config: expected"]),
        (["--config=configs/ppo_summarize.py:files"], ["data.sft: expected a .jsonl, .json, .csv, .parquet file"]),
        (
            ["--config=configs/ppo_summarize.py:gpt2", "--config.model.init=no/such/folder"],
            ["missing files: model.init = 'no/such/folder'"],
        ),
    ],
)
def test_a_config_that_cannot_be_is_one_line(flags, words, command, tmp_path):
    assert_refused(command(f"--workdir={tmp_path}/run", *flags, before=[]), *words)
    assert not (tmp_path / "run").exists()


REFUSED = {
    "a controller that could make the coefficient negative": (
        {"ppo.batch": 48, "ppo.kl_target": 6, "ppo.kl_horizon": 5, "ppo.kl_coef": 0.15},
        ["ppo.kl_horizon: expected more than 0.2 batch = 9.6, to keep kl_coef positive, got 5\n"],
    ),
    "the truth of rows that have none": (
        {"reward": "gold", "data.source": "files"},
        [
            "reward.kind: expected learned, sentiment, rouge, exact, partial or path/to/file.py:function where no row "
            "has a record",
            "'gold'",
        ],
    ),
    "a value model from a reward model that is not there": (
        {"reward": "gold", "ppo.value_init": "reward"},
        ["ppo.value_init: expected zero or auto where reward is gold, as there is no reward model, got 'reward'\n"],
    ),
}


@pytest.mark.parametrize("fields", REFUSED)
def test_fields_that_do_not_go_together_are_one_line(fields, command, tmp_path):
    fields, words = REFUSED[fields]
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    assert_refused(command(f"--workdir={tmp_path}/run", *flags), *words)
    assert not (tmp_path / "run").exists()


def test_a_config_has_a_name_in_any_folder(command, tmp_path):
    """An argument that is not there is known only to the file; a file of the name comes first."""
    elsewhere = (
        f"import os, runpy\nos.chdir({str(tmp_path)!r})\nrunpy.run_path({str(ROOT / PPO)!r}, run_name='__main__')"
    )
    (tmp_path / "ppo_summarize.py").write_text(elsewhere)
    line = {"script": f"{tmp_path}/ppo_summarize.py", "before": ["--config=ppo_summarize:tinny"]}
    assert_refused(command("--workdir=run", **line), "tinny: expected tiny, files, gpt2, ")
    (tmp_path / "ppo_summarize").write_text("def get_config(arg): raise ValueError(f'mine, {arg}')")
    assert_refused(command("--workdir=run", **line), "mine, tinny")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [[], ["--workdir="]])
def test_a_run_needs_a_workdir(flags, command):
    """An empty one would be the folder that the command was started in."""
    impossible = "--config.ppo.top_k=5"  # should it get further, it gets no further than this
    assert_refused(command(*flags, impossible), "--workdir: expected")


def test_a_workdir_that_cannot_be_written_is_one_line(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(command(f"--workdir={tmp_path}/file/run"), f"workdir: cannot write {tmp_path}/file/run", "directory")
    assert on_disk(tmp_path) == {tmp_path / "file": b"in the way"}


ROWS = [{"prompt": format_query("s", "t", f"post {i}"), "label": f"label {i}"} for i in range(20)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": "a", "label": ', "expected a JSON object"),
        ('{"prompt": "a"}', "expected a column 'label'"),
        ('{"prompt": "a", "label": " "}', "label: expected text, got an empty one"),
        ('{"prompt": "a", "label": 3}', "label: expected text, got int"),
    ],
)
def test_a_bad_row_is_named_with_its_file(row, words, command, tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    lines[16] = row
    (tmp_path / "sft.jsonl").write_text("\n".join(lines))
    files = ["--config.data.source=files", f"--config.data.sft={tmp_path}/sft.jsonl", "--config.text.kind=char"]
    result = command(f"--workdir={tmp_path}/run", *files)
    assert_refused(result, f"data.sft: {tmp_path}/sft.jsonl:17: ", words)
    assert not (tmp_path / "run").exists()


# Each step makes the weights a thousand million times as large.
HUGE = ["--config.sft.lr=10", "--config.sft.weight_decay=1e9", "--config.sft.warmup=0"]


def test_a_number_that_is_not_finite_ends_the_run(command, tmp_path):
    result = command(f"--workdir={tmp_path}", *HUGE, "--config.sft.steps=9", script=SFT)
    assert (result.code, result.err.count("\n")) == (4, 1), result.err
    assert result.err.startswith("sft_summarize.py: sft step ") and "sft/loss" in result.err
    assert (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()[-1].count("null")
    assert not (tmp_path / "sft" / "summary.json").exists()


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """Fine-tuning that had a signal to stop after its first step: the command, its workdir and how it ended."""
    workdir = tmp_path_factory.mktemp("run")
    line = [sys.executable, SFT, f"--workdir={workdir}", *small, "--config.sft.steps=400"]
    with subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said = []
        for text in process.stdout:
            said.append(text)
            if text.startswith("sft  40/400"):
                process.terminate()
        err = process.stderr.read()
    return types.SimpleNamespace(line=line, workdir=workdir, code=process.returncode, out="".join(said), err=err)


def test_a_run_that_is_asked_to_stop_saves_and_says_so(stopped):
    assert stopped.code == 3
    line = r"sft_summarize.py: stopped after step (\d+) of 400; the same command goes on from there\n"
    assert re.fullmatch(line, stopped.err), stopped.err


def test_a_run_that_was_stopped_goes_on_to_the_end(stopped, command):
    """Stage by stage, each command after the other; what is there is not done again."""
    workdir = f"--workdir={stopped.workdir}"
    again = command(workdir, "--config.sft.steps=400", script=SFT)
    assert (again.code, again.err) == (0, "")
    assert f"sft: goes on after step {re.search('after step ([0-9]+)', stopped.err)[1]}\n" in again.out
    assert command(workdir, "--config.sft.steps=400", script=REWARD).code == 0
    result = command(workdir, "--config.sft.steps=400")
    assert (result.code, result.err) == (0, "")
    assert "sft: finished with this config, skipped\nreward: finished with this config, skipped\n" in result.out
    assert "data.prompts, train: 40 rows, " in result.out and " cut prompts\n" in result.out
    assert not [text for text in (again.out, result.out) if "\x1b" in text or "\r" in text]  # not a terminal
    summary = json.loads((stopped.workdir / "summary.json").read_text())
    assert {"seconds", "seed", "sft/gold", "reward/accuracy", "ppo/gold_ci95", "ppo/win_rate"} <= summary.keys()
    before = on_disk(stopped.workdir)
    assert_refused(command(workdir, "--config.sft.lr=0.5"), "workdir: ", "was made with sft.lr = 0.002, not 0.5")
    for out, code, line in (("new", 0, ""), ("new", 2, "export_hf.py: .*: expected a new or an empty folder.*\n")):
        exported = command(workdir, f"--out={stopped.workdir.parent / out}", script=EXPORT, before=[])
        assert exported.code == code and re.fullmatch(line, exported.err), exported.err
    assert (stopped.workdir.parent / "new" / "README.md").exists()
    assert on_disk(stopped.workdir) == before


def test_the_reward_model_needs_the_fine_tuned_policy(command, tmp_path):
    result = command(f"--workdir={tmp_path}", script=REWARD)
    assert (result.code, result.err) == (
        2,
        f"reward_summarize.py: workdir: expected a finished sft stage in {tmp_path}/sft; run it first\n",
    )
