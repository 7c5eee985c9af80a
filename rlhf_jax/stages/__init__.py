"""Typed config -> a finished stage, and the jobs that run several in a row.

The functions that XLA compiles are named here, once a stage; what they call is pure.
"""

import json
import shutil

from rlhf_jax.report import metrics, plots
from rlhf_jax.stages import common
from rlhf_jax.stages.ppo import ppo
from rlhf_jax.stages.ppo import prepare as prepare_ppo
from rlhf_jax.stages.reuse import reuse
from rlhf_jax.stages.reward import prepare as prepare_reward
from rlhf_jax.stages.reward import reward
from rlhf_jax.stages.supervised import prepare as prepare_supervised
from rlhf_jax.stages.supervised import pretrain, sft
from rlhf_jax.stages.verifiable import prepare as prepare_rl
from rlhf_jax.stages.verifiable import rl

__all__ = ["ppo", "prepare", "pretrain", "reuse", "reward", "rl", "sft", "summarize", "write"]


def prepare(run, name):
    """What the stage of this name trains, a common.Training: its state, its compiled step, its evaluation."""
    prepares = {"reward": prepare_reward, "ppo": prepare_ppo, "rl": prepare_rl}
    return prepares.get(name, prepare_supervised)(run, name)


def summarize(run):
    """The main job, fine-tuning -> reward model -> PPO, without what is finished already: the run's summary."""

    def draw(rows, path):
        plots.pipeline(*rows.values(), path, title=f"seed {run.config.seed}")

    return _job(run, {"sft": sft, "reward": reward, "ppo": ppo}, draw)


def write(run):
    """Pretraining -> fine-tuning -> reinforcement learning on run.reward, without what is finished: its summary."""

    def draw(rows, path):
        plots.writing(*rows.values(), path, title=f"seed {run.config.seed}")

    return _job(run, {"pretrain": pretrain, "sft": sft, "rl": rl}, draw)


def _job(run, stages, draw):
    todo = [name for name in stages if not run.finished(name)]
    if next(iter(stages)) in todo:
        run.weights()  # what cannot be downloaded is told before hours of tokens
    for name in todo:  # what is wrong with the data is found now, not when its stage begins
        common.check_batch(run, name)
    for name, stage in stages.items():
        if name in todo:
            stage(run)
        else:
            run.reporter.note(f"{name}: finished with this config, skipped")
    if not todo and (run.workdir / "summary.json").exists():
        return json.loads((run.workdir / "summary.json").read_text())
    draw(
        {name: metrics.read(run.workdir / name / "metrics.jsonl") for name in stages},
        run.workdir / "plots" / "pipeline.png",
    )
    shutil.copyfile(run.workdir / name / "samples.jsonl", run.workdir / "samples.jsonl")  # of the last stage
    numbers, seconds = {}, 0
    for name in stages:
        summary = run.summary(name)
        numbers |= {key: value for key, value in summary.items() if key.startswith(f"{name}/")}
        numbers[f"{name}/seconds"] = summary["seconds"]
        seconds += summary["seconds"]
    return common.write_summary(run, run.workdir, seconds, numbers)
