"""What every stage does around its own step: train in its folder, finish it with plots, samples and a summary.

Evaluation is on held-out rows, and a row's noise is its own (a key folded with its index): two policies meet the same
prompts and the same noise.
"""

import json
import time

import jax

from rlhf_jax import loop, metrics, sharding
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.console import number
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError

HEADLINES = {  # what a stage says when it is done
    "pretrain": ("pretrain/loss", "pretrain/reward"),
    "sft": ("sft/loss", "sft/gold", "sft/reward", "sft/eos_rate"),
    "reward": ("reward/loss", "reward/accuracy"),
    "ppo": ("ppo/score", "ppo/gold", "ppo/win_rate", "ppo/kl_exact", "ppo/eos_rate"),
    "rl": ("rl/reward_before", "rl/reward_after", "rl/kl_exact", "rl/distinct2_after", "rl/repeat_rate"),
}


def train(run, name, state, arrays, *, step_fn, evaluate, complete=lambda state: (state, {}), **hooks):
    """The loop of one stage in its folder, from its last checkpoint if it has one: (state, numbers, details).

    numbers and details are evaluate's of the last state. complete(state) -> (state, numbers) is applied after the last
    step, before that evaluation and the last checkpoint.
    """
    config = getattr(run.config, name)
    check_batch(run, name)
    folder = run.open(name)
    seed = int(jax.random.randint(run.key(name), (), 0, 2**31 - 1))
    feed = Feed(batches.iterate(arrays, batch=config.batch, seed=seed), run.mesh)
    state = sharding.replicate(state, run.mesh)
    with Checkpoints(folder / "checkpoints") as checkpoints, loop.stop_signal() as stop:
        saved = checkpoints.latest
        if saved is not None:
            state, position = checkpoints.restore(state)
            feed.set_state(position)
            run.reporter.note(f"{name}: goes on after step {saved}")
        with metrics.Writer(folder, resume_step=saved) as log:
            run.reporter.stage(name, config.steps, start=saved or 0)
            parts = {"checkpoints": checkpoints, "log": log, "reporter": run.reporter, "stop": stop}
            state = loop.run(state, feed, config=config, step_fn=step_fn, evaluate=evaluate, **parts, **hooks)
            if saved == config.steps:  # it was stopped between its last checkpoint and its summary
                numbers, details = evaluate(state)
                logged = metrics.read(folder / "metrics.jsonl")[-1]
                return state, {name: logged[name] for name in logged if "/" in name} | numbers, details
            state, told = complete(state)
            numbers, details = evaluate(state)
            numbers |= told
            loop.record(config.steps, numbers, log, run.reporter)
            checkpoints.save(config.steps, state, feed.get_state())
            if stop():
                raise loop.Stopped(f"stopped after the last step of {name}; the same command goes on from there")
            return state, numbers, details


def check_batch(run, name):
    """InputError where a stage's batch is more than the rows that it has to train on."""
    rows, batch = len(run.arrays(run.KINDS[name])[0]["index_N"]), getattr(run.config, name).batch
    if batch > rows:
        raise InputError(f"{name}.batch: expected at most {rows}, the rows it has to train on, got {batch}")


class Feed:
    """Batches on the devices, from an iterator whose position can be saved."""

    def __init__(self, iterator, mesh):
        self._iterator, self._mesh = iterator, mesh

    def __next__(self):
        return sharding.shard(next(self._iterator), self._mesh)

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, position):
        self._iterator.set_state(position)


def finish(run, name, began, numbers, samples, draw):
    """Plots, samples and, last, the summary of a stage: it is finished. Held-out numbers lose their `eval_`."""
    folder = run.workdir / name
    draw(metrics.read(folder / "metrics.jsonl"), folder / "plots")
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
    summary = write_summary(run, folder, began, {key.replace("eval_", ""): value for key, value in numbers.items()})
    told = (f"{key.split('/')[1]} {number(summary[key])}" for key in HEADLINES[name] if key in summary)
    run.reporter.finish("held out: " + "  ".join(told))
    return summary


def write_summary(run, folder, began, numbers):
    """Writes and returns summary.json: the numbers, and what they depend on."""
    seconds = round(time.monotonic() - began, 1)
    summary = {**metrics.environment(), "seed": run.config.seed, "seconds": seconds, **numbers}
    metrics.summarize(folder / "summary.json", summary)
    return summary


def row_keys(run, batch):
    """A key for each held-out row, the same in every evaluation and in any batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(run.key("evaluation"), batch["index_B"])
