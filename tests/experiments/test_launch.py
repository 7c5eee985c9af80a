"""What every command shares: help, config files that cannot be read, names that are not there, flags without effect."""

import re
from pathlib import Path

import pytest

from rlhf_jax import config as configs
from rlhf_jax import fields

ROOT = Path(__file__).parents[2]
PPO, RL, TWEETS, EXPORT, BENCHMARK, PLAN, SWEEP = (
    f"experiments/{name}.py" for name in ("ppo_summarize", "rl", "pg_tweets", "export_hf", "benchmark", "plan", "sweep")
)
CONFIG = "--config=configs/ppo_summarize.py"


def refusal(result):
    """The one line of a command that was refused."""
    assert (result.code, result.err.count("\n"), result.out) == (2, 1, ""), result.err
    assert "Traceback" not in result.err
    return result.err.removesuffix("\n")


# Help


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_says_what_a_command_does_and_lists_its_flags(flag, forks):
    result = forks(EXPORT, flag)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Exports a finished stage of a run as a folder that transformers loads")
    flags = [line.split()[0] for line in result.out.split("Flags:")[1].splitlines() if line.startswith("  --")]
    assert flags == ["--workdir", "--out", "--stage", "--adapter"] and "Folder to write, new or empty." in result.out


def test_help_with_a_config_lists_every_field_with_its_value_and_comment(forks):
    result = forks(RL, "--config=configs/rl.py", "--help", "--config.ppo.lr=0.5")
    assert (result.code, result.err) == (0, "")
    shown = re.findall(r"^  --config\.([\w.]+)=", result.out, flags=re.MULTILINE)
    assert sorted(shown) == sorted(path for path, *_ in fields.leaves(configs.Config()))
    text = " ".join(result.out.split())
    for part in (
        "--config.ppo.lr=0.5 float. peak learning rate --config",
        "--config.ppo.schedule=linear linear|cosine|constant. of the learning rate, after the warm-up --config",
        "--config.data.skip_bad=false bool. leave out rows without text, or without a known character, and say how",
        "guard: What happens if an update is not finite. --config",
    ):
        assert part in text
    assert max(len(line) for line in result.out.splitlines() if line.startswith("  --config.")) <= 120


# Config files

BAD = {
    "def get_config(:\n": ":1: SyntaxError: invalid syntax",
    "import os\nimport no_such_module\n": ":2: ModuleNotFoundError: No module named 'no_such_module'",
    "x = 3\n": ": expected a function get_config, found none",
    "def get_config():\n    return {'seed': 1}\n": ":1: expected get_config to return a ConfigDict, got dict",
    "\ndef get_config():\n    pass\n": ":2: expected get_config to return a ConfigDict, got NoneType",
    "def get_config():\n    return 1 / 0\n": ":2: ZeroDivisionError: division by zero",
    "import sys\nsys.exit('no')\n": ":2: SystemExit: no",
}


@pytest.mark.parametrize("text", BAD)
def test_a_config_file_that_cannot_be_read_is_named_with_its_line(text, forks, tmp_path):
    (tmp_path / "c.py").write_text(text)
    line = refusal(forks(PPO, f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/run"))
    assert line == f"ppo_summarize.py: --config: {tmp_path}/c.py{BAD[text]}"


def test_an_argument_that_get_config_does_not_take(forks, tmp_path):
    (tmp_path / "c.py").write_text("\n\ndef get_config():\n    pass\n")
    line = refusal(forks(PPO, f"--config={tmp_path}/c.py:tiny", f"--workdir={tmp_path}/run"))
    assert f"{tmp_path}/c.py:3: TypeError: get_config() takes 0 positional arguments but 1 was given" in line


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([CONFIG, "--config.PPO.lr=1"], '--config.PPO.lr=1: no such field. Did you mean "ppo"?'),
        ([CONFIG, "--config.ppo.LR=1"], '--config.ppo.LR=1: no such field. Did you mean "lr"?'),
        ([CONFIG, "--config.ppo.lr.x=1"], "--config.ppo.lr.x=1: no such field."),
        ([CONFIG, "--config."], "--config.: no such field."),
        ([CONFIG, "--config.data.columns=x"], "a section; expected one of its fields, such as --config.data.columns."),
        ([CONFIG, "--config.ppo.steps"], "Missing value for flag --config.ppo.steps"),
        ([CONFIG, "--Workdir=x"], "Unknown command line flag 'Workdir'. Did you mean: workdir ?"),
        ([CONFIG, "--WORKDIR=x"], "Unknown command line flag 'WORKDIR'. Did you mean: workdir ?"),
        ([CONFIG, "--Config.ppo.lr=1"], "Did you mean: config.ppo.lr ?"),
        ([CONFIG, "--workdir=other"], "--workdir: expected once, got "),
        ([CONFIG, "--config=configs/rl.py"], "--config: expected once, got configs/ppo_summarize.py and configs/rl.py"),
        ([CONFIG, "--config.task="], "task: expected summarize or write or prompts or arithmetic, got ''"),
        ([CONFIG, "--config.task=write"], "got one for write; experiments/pg_tweets.py or pg_stories.py runs this one"),
        ([CONFIG, "--config.guard.limit=3"], "guard.limit: 3 has no effect, as action is stop"),
        ([CONFIG, "--config.sft.warmup=601"], "sft.warmup: expected at most sft.steps = 600, got 601"),
        ([CONFIG, f"--config.data.sft={ROOT}/README.md"], "has no effect, as source is world (--config=...:files or "),
        ([CONFIG, "--config.sft.steps=0", "--config.sft.from=x"], "sft.from: 'x' has no effect, as sft.steps is 0"),
        (["--config="], "--config: "),
        (["--config=configs"], "--config: configs: expected a config file, found a folder"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(flags, words, forks, tmp_path):
    assert words in refusal(forks(PPO, f"--workdir={tmp_path}/run", *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ([EXPORT, "--workdir=x", "--out=y", CONFIG], "export_hf.py: --config: not a flag of this command"),
        ([BENCHMARK, "--shape=tiny", "--workdir=x"], "benchmark.py: --workdir: not a flag of this command"),
        ([BENCHMARK, "--shape=tiny", "--rounds=3"], "benchmark.py: rounds: 3 has no effect without --peer"),
        (
            ["experiments/reuse_rollouts.py", "--config=configs/pg_tweets.py", "--workdir=x", "--config.algorithm=ppo"],
            "algorithm: expected policy_gradient, whose rollouts are used, got ppo",
        ),
        ([PLAN, CONFIG, "--price=1"], "plan.py: --price: expected none without --topology"),
        ([PLAN, CONFIG, "--topology=v9:2x2"], "plan.py: --topology: expected one such as v5e:2x2|2x4|"),
        (
            [PLAN, CONFIG, "--topology=v5e:2x2", "--config.mesh.data=3"],
            "mesh.data: expected data x fsdp x tensor to be ",
        ),
        (
            [SWEEP, CONFIG, "--workdir=x", "--sweep=ppo.kl_coeff=1"],
            "--sweep: ppo.kl_coeff: no such field; did you mean",
        ),
        ([SWEEP, CONFIG, "--workdir=x"], "--sweep: configs/ppo_summarize.py: expected FIELD=VALUES, or a function"),
    ],
)
def test_a_flag_that_a_command_does_not_read_is_refused(line, words, forks):
    assert words in refusal(forks(*line))


def test_no_accelerator_where_one_is_requested_is_one_line(forks, tmp_path):
    """As JAX_PLATFORMS=cuda in the environment."""
    script = tmp_path / "ppo.py"
    script.write_text(
        "import os, runpy, jax\n"
        "os.environ['JAX_PLATFORMS'] = 'cuda'\n"
        "jax.config.update('jax_platforms', 'cuda')\n"
        "runpy.run_path('experiments/ppo_summarize.py', run_name='__main__')\n"
    )
    line = refusal(forks(str(script), CONFIG, f"--workdir={tmp_path}/run"))
    assert line.startswith(
        "ppo_summarize.py: JAX_PLATFORMS: expected a kind of device that this machine and this JAX have"
    )
    assert "got 'cuda'" in line and not (tmp_path / "run").exists()


# What the documents show

# plan.py without what takes time: it reads and checks a config as every command does.
READS = """
import runpy
from rlhf_jax.commands import memory, topology
memory.rl = topology.plan = topology.rows = lambda *_: {}
topology.advice = lambda *_: ""
runpy.run_path("experiments/plan.py", run_name="__main__")
"""
NAMED = {"SEED": "1", "algorithm=NAME": "algorithm=rloo"}
NAMED |= {"file.py:function": "score.py:score", "my_reward.py:score": "score.py:score"}


def shown():
    """The flags of every command with a config in the documents, and of every list of flags in a document."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").glob("*.py"))]
    for page in pages:
        text = re.sub(r"[`\[\]]|\\\n", " ", page.read_text(encoding="utf-8"))
        for flags in re.findall(r"python experiments/\w+\.py((?:\s+--[\w.]+=\S+)+)", text):
            if "--config=" in flags:
                yield [flag.rstrip(",;.:") for flag in flags.split() if flag.startswith(("--config", "--topology"))]


@pytest.mark.parametrize("flags", list(shown()), ids=" ".join)
def test_no_command_that_a_document_shows_has_a_flag_without_effect(flags, forks, tmp_path):
    (tmp_path / "plan.py").write_text(READS)
    (tmp_path / "score.py").write_text("def score(rows, texts):\n    return [0.0] * len(texts)\n")
    for name, value in NAMED.items():
        flags = [flag.replace(name, value) for flag in flags]
    flags = [flag.replace("=score.py", f"={tmp_path}/score.py") for flag in flags]
    result = forks(str(tmp_path / "plan.py"), *flags)
    assert (result.code, result.err) == (0, ""), result.err
    assert "without effect" not in result.out
