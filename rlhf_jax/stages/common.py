"""What every stage does around its own step: train in its folder, finish it with plots, samples and a summary.

Evaluation is on held-out rows, and a row's noise is its own (a key folded with its index): two policies meet the same
prompts and the same noise.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics
from rlhf_jax.report.console import number
from rlhf_jax.training import guard, loop, sharding
from rlhf_jax.training.checkpoint import Checkpoints

HEADLINES = {  # what a stage says when it is done
    "pretrain": ("pretrain/loss", "pretrain/reward"),
    "sft": ("sft/loss", "sft/gold", "sft/reward", "sft/eos_rate"),
    "reward": ("reward/loss", "reward/accuracy"),
    "ppo": ("ppo/score", "ppo/gold", "ppo/win_rate", "ppo/kl_exact", "ppo/eos_rate"),
    "rl": ("rl/reward_before", "rl/reward_after", "rl/kl_exact", "rl/distinct2_after", "rl/repeat_rate"),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What a stage gives to `train`."""

    name: str
    state: Any  # at step 0
    step: Callable  # (state, batch) -> (state, numbers); may donate the state
    evaluate: Callable  # state -> (numbers, details), on held-out rows
    best: tuple[str, Callable]  # the number of an evaluation by which checkpoints are compared; min or max of it
    result: tuple[str, ...]  # fields of the state that the stage is for
    complete: Callable = lambda state: (state, {})  # state -> (state, numbers): after the last step, for the result
    before: Any = None  # what evaluate measures, of the state at step 0, where the stage compares
    keep: Callable | None = None  # (state, details) -> state: what an evaluation found may be put aside


def train(run, training):
    """The loop of one stage in its folder, from its last checkpoint if it has one: (state, numbers, details).

    numbers and details are of the completed state, whose result is saved apart: a stage that is given more steps
    goes on from where its training was.
    """
    name, state = training.name, training.state
    config = run.section(name)
    check_batch(run, name)
    folder = run.open(name)
    feed = Feed(run, name)
    state = sharding.replicate(state, run.mesh)
    with contextlib.ExitStack() as stack:
        stop = run.stop or stack.enter_context(loop.stop_signal())
        checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", run.config.keep, training.best))
        state, row = _resume(run, name, checkpoints, state, feed)
        done = int(state.step)
        # The row of the checkpoint's own step is in the checkpoint, and is written again.
        with metrics.Writer(folder, resume_step=done - 1 if done else None) as log:
            run.reporter.stage(name, config.steps, start=done)
            parts = {"checkpoints": checkpoints, "log": log, "reporter": run.reporter, "row": row, "stop": stop}
            parts |= {"evaluate": training.evaluate, "keep": training.keep, "incident": _Incidents(run, name)}
            with stop.later():
                state = loop.run(state, feed, config=config, step_fn=training.step, **parts)
            state, told = training.complete(state)
            numbers, details = training.evaluate(state)
            numbers = loop.floats(numbers | told)
            log.write(config.steps, numbers)
            run.reporter.update(config.steps, numbers)
            if wrong := loop.not_finite(numbers):
                raise guard.NonFinite(f"{name}, after the last step: {', '.join(wrong)} not finite")
        with Checkpoints(folder / "result") as result:
            result.save(config.steps, {field: getattr(state, field) for field in training.result}, {}, numbers)
        if stop():
            raise loop.Stopped(f"stopped after the last step of {name}; {loop.AGAIN}")
    return state, numbers, details


def _resume(run, name, checkpoints, state, feed):
    """(state, row of its step) of the newest sound checkpoint; the state given and None where there is none."""
    restored = checkpoints.restore(state)
    if restored is None:
        return state, None
    steps = run.section(name).steps
    if restored.step > steps:
        field, folder = f"{run.section_name(name)}.steps", run.workdir / name
        raise InputError(f"{field}: expected at least {restored.step}, which {folder} has done, got {steps}")
    for told in restored.damaged:
        run.reporter.note(f"{name}: {told}")
    for step in (step for step in checkpoints.steps if step > restored.step):
        run.reporter.note(f"{name}: checkpoint {step} is now {checkpoints.put_aside(step)}")
    run.reporter.note(f"{name}: goes on after step {restored.step}")
    feed.set_state(restored.notes["position"])
    return restored.tree, restored.notes["row"]


class _Incidents:
    """What becomes of an update that is not finite."""

    def __init__(self, run, name):
        self._run, self._name = run, name
        self.waits = run.config.guard.action == "skip"

    def __call__(self, state, step, batch, names, skipped):
        run, config = self._run, self._run.config.guard
        at = {"step": jax.numpy.int32(step - 1), "skipped": jax.numpy.int32(0)}  # as it was before the update
        incident = guard.Incident(
            stage=self._name,
            step=step,
            names=tuple(names),
            kind=type(run).__name__,
            config=dataclasses.asdict(run.config),
            state=state.replace(**at),
            batch=batch,
        )
        folder = guard.write(run.workdir, incident)
        told = f"{self._name} step {step}: {guard.told(names)} not finite, nothing was changed"
        if self.waits and skipped <= config.limit:
            run.reporter.note(f"{told}; skipped, {skipped} of at most {config.limit}; kept in {folder}")
            return
        why = f"; guard.limit: expected at most {config.limit} such updates" if self.waits else ""
        raise guard.NonFinite(f"{told}{why}; python -m rlhf_jax.replay {folder} shows where it begins")


def check_batch(run, name):
    """InputError where a stage's batch is more than the rows that it has to train on."""
    rows, batch = len(run.arrays(run.KINDS[name])[0]["index_N"]), run.section(name).batch
    if batch > rows:
        field = f"{run.section_name(name)}.batch"
        raise InputError(f"{field}: expected at most {rows}, the rows it has to train on, got {batch}")


class Feed:
    """A stage's batches on the devices, in an order that is its own, with a position that can be saved."""

    def __init__(self, run, name):
        seed = int(jax.random.randint(run.key(name), (), 0, 2**31 - 1))
        arrays, _ = run.arrays(run.KINDS[name])
        self._iterator, self._mesh = batches.iterate(arrays, batch=run.section(name).batch, seed=seed), run.mesh

    def __next__(self):
        return sharding.shard(next(self._iterator), self._mesh)

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, position):
        self._iterator.set_state(position)


def began(run, name):
    """When the stage would have begun, by time.monotonic, had it never been stopped."""
    path = run.workdir / name / "metrics.jsonl"
    rows = metrics.read(path) if path.exists() else []
    return time.monotonic() - (rows[-1]["time"] if rows else 0)


def finish(run, name, began, numbers, samples, draw):
    """Plots, samples and, last, the summary of a stage: it is finished. Held-out numbers lose their `eval_`."""
    folder = run.workdir / name
    draw(metrics.read(folder / "metrics.jsonl"), folder / "plots")
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
    numbers = {key.replace("eval_", ""): value for key, value in numbers.items()}
    numbers[f"{name}/steps"] = run.section(name).steps
    summary = write_summary(run, folder, time.monotonic() - began, numbers)
    told = (f"{key.split('/')[1]} {number(summary[key])}" for key in HEADLINES[name] if key in summary)
    run.reporter.finish("held out: " + "  ".join(told))
    return summary


def write_summary(run, folder, seconds, numbers):
    """Writes and returns summary.json: the numbers, and what they depend on."""
    summary = {**metrics.environment(), "seed": run.config.seed, "seconds": round(seconds, 1), **numbers}
    metrics.summarize(folder / "summary.json", summary)
    return summary


def row_keys(key, batch):
    """A key for each held-out row [B], the same in any batch; the key of evaluations is run.key("evaluation")."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index_B"])
