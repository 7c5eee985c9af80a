"""The memory plan as a person runs it. Nothing is compiled here: tests/commands/test_memory.py does."""

import pytest

# The same command without what takes seconds.
TRACED = """
import runpy
from rlhf_jax.commands import memory
memory._beside = lambda function, args: 2**30
runpy.run_path("experiments/plan.py", run_name="__main__")
"""


@pytest.fixture
def plan(forks, tmp_path):
    """plan(flags) -> the command's exit code and what it wrote."""
    (tmp_path / "plan.py").write_text(TRACED)
    return lambda *flags: forks(str(tmp_path / "plan.py"), *flags, "--config.model.layers=1")


@pytest.mark.parametrize(
    ("config", "flags", "algorithm"),
    [
        ("ppo_summarize.py", [], "ppo"),
        ("ppo_summarize.py:files", ["--config.task=prompts"], "ppo"),
        ("pg_tweets.py", [], "policy_gradient"),
        ("pg_stories.py", ["--config.algorithm=ppo"], "ppo"),
    ],
)
def test_a_table_for_each_task(config, flags, algorithm, plan):
    result = plan(f"--config=configs/{config}", *flags)
    assert result.code == 0, result.err
    title, *rows = result.out.splitlines()
    assert title.split() == [f"{algorithm},", "per", "device", "GiB"]
    sizes = {name: float(size) for name, size in map(str.split, rows)}
    assert list(sizes) == ["state", "draw", "judge", "update"] and sizes["state"] > 0
    assert sizes["update"] == pytest.approx(1 + sizes["state"], rel=0.01)  # four digits


def test_a_flag_that_cannot_be_is_one_line(plan):
    result = plan("--config=configs/ppo_summarize.py", "--devices=3")
    assert (result.code, result.err.count("\n"), result.out) == (2, 1, ""), result.err
    assert result.err.startswith("plan.py: sft.batch: expected a multiple of ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--depths=1,2"], "--depths: expected none without --topology"),
        (["--depths=1", "--topology=v5e:2x2"], "--depths: expected two numbers of layers, the first below "),
        (["--depths=1,2", "--topology=v5e:2x2"], "--depths: expected two numbers of layers, the first below "),
        (["--scaling=there", "--topology=v5e:2x2"], "--scaling: expected none with --topology"),
        (["--scaling=there", "--config.mesh.fsdp=2", "--devices=2"], "mesh: expected none with --scaling"),
        (["--largest", "--depths=1,2", "--topology=v5e:2x2"], "--largest: expected none with --depths"),
    ],
)
def test_what_cannot_be_counted_is_one_line(flags, said, plan):
    result = plan("--config=configs/ppo_summarize.py", *flags)  # of one layer
    assert (result.code, result.err.count("\n"), result.out) == (2, 1, ""), result.err
    assert result.err.startswith(f"plan.py: {said}")
