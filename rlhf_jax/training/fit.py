"""Trains a Stage in its folder: the only function with side effects. It writes, prints and handles signals."""

import contextlib
import dataclasses
import time
from typing import Any

from rlhf_jax import fields, hosts
from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics, trackers
from rlhf_jax.report.console import Silent, number
from rlhf_jax.training import checkpoint, guard, loop
from rlhf_jax.training.checkpoint import Checkpoints
from rlhf_jax.training.workdir import Workdir, flat

KEEP = checkpoint.Config()


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained stage: its state, with the result's parameters, and its summary.json."""

    state: Any
    summary: dict


def fit(
    stage,
    workdir,
    *,
    depends=None,
    config=None,
    keep=KEEP,
    log=trackers.DEFAULT,
    reporter=None,
    stop=None,
    recorder=None,
) -> Fitted:
    """Trains the stage in workdir/<its name>, from its last checkpoint if it has one.

    workdir is a path or a Workdir. depends is what the stage's numbers depend on (default: its own config, the state
    that it starts from and its first batch), and config is the whole config of the run, for incidents and trackers.
    log names the trackers (report/trackers.py). A folder of another `depends` is refused, and so is one that another
    process writes to. The result is saved separately: a stage with more steps continues from its last checkpoint.
    recorder: a viz.recorder.Recorder, which writes a trace.
    """
    workdir = workdir if isinstance(workdir, Workdir) else Workdir(workdir)
    reporter = reporter or Silent()
    depends = depends or _depends(stage)
    workdir.check(stage.name, depends)
    began = _began(workdir, stage.name)
    workdir.open(stage.name, depends)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(loop.stop_signal())
        stack.enter_context(stop.at_once())  # but the loop takes a signal after its step (stop.later)
        state, evaluation, numbers = _train(stage, workdir, config or depends, keep, log, reporter, stop, recorder)
    summary = _finish(stage, workdir, state, evaluation, numbers, began, reporter, depends.get("seed"), recorder)
    return Fitted(state, summary)


def _depends(stage):
    """What the numbers of a stage depend on, where no config of a run says so."""
    contents = {"the first state": stage.state, "the first batch": stage.batch_at(0)}
    digests = {name: checkpoint.fingerprint(tree) for name, tree in contents.items()}
    return {"section": stage.name, stage.name: fields.significant(stage.config), "sha256": digests}


def _train(stage, workdir, config, keep, log, reporter, stop, recorder):
    """(the result's state, its evaluation, the numbers of the last row)."""
    folder, steps = workdir / stage.name, stage.config.steps
    name, better = stage.best
    incident = _Incidents(stage, workdir, config, reporter)
    trackers = {"log": log, "name": f"{workdir.name}/{stage.name}", "config": flat(config), "note": reporter.note}
    with Checkpoints(folder / "checkpoints", keep, (f"{stage.name}/eval_{name}", better)) as checkpoints:
        state, row = _resume(stage, checkpoints, folder, reporter)
        done = int(state.step)
        # The row of the checkpoint's own step is in the checkpoint, and is written again.
        writer = metrics.Writer if hosts.first() else metrics.Unwritten
        with writer(folder, resume_step=done - 1 if done else None, **trackers) as log:
            reporter.stage(stage.name, steps, start=done)
            parts = {"checkpoints": checkpoints, "log": log, "reporter": reporter, "row": row, "stop": stop}
            parts["recorder"] = recorder
            with stop.later():
                state = loop.run(stage, state, incident=incident, **parts)
            evaluation, numbers = stage.evaluate(state), {}
            reporter.samples(evaluation.samples)
            if stage.keep:
                state = stage.keep(state, evaluation)
            if stage.complete:
                state, numbers = stage.complete(state, evaluation)
                evaluation = stage.evaluate(state)
                reporter.samples(evaluation.samples)
            if recorder:
                recorder.evaluation(stage, steps, evaluation)
            numbers = {key: float(value) for key, value in (evaluation.numbers | numbers).items()}
            named = loop.named(stage, numbers, "eval_")
            log.samples(steps, stage.name, evaluation.samples)
            log.write(steps, named)
            reporter.update(steps, named)
            if wrong := loop.not_finite(named):
                raise guard.NonFinite(f"{stage.name}, after the last step: {', '.join(wrong)} not finite")
        with Checkpoints(folder / "result") as result:
            result.save(steps, {field: getattr(state, field) for field in stage.result}, {}, named)
        if stop():
            raise loop.Stopped(f"stopped after the last step of {stage.name}; {loop.AGAIN}")
    return state, evaluation, numbers


def _resume(stage, checkpoints, folder, reporter):
    """(state, row of its step) of the newest sound checkpoint; without one, the stage's first state and None."""
    frozen = {name: getattr(stage.state, name) for name in stage.frozen}
    try:
        restored = checkpoints.restore(stage.state.replace(**dict.fromkeys(frozen)))
    except InputError as error:  # all of them are damaged
        raise InputError(f"workdir: {error}; remove {folder / 'checkpoints'} to train {stage.name} again") from None
    if restored is None:
        return stage.state, None
    if restored.step > stage.config.steps:
        expected = f"at least {restored.step}, which {folder} has done"
        raise InputError(f"{stage.name}.steps: expected {expected}, got {stage.config.steps}")
    for damage in restored.damaged:
        reporter.note(f"{stage.name}: {damage}")
    for step in (step for step in checkpoints.steps if step > restored.step):
        reporter.note(f"{stage.name}: checkpoint {step} is now {checkpoints.put_aside(step)}")
    reporter.note(f"{stage.name}: goes on after step {restored.step}")
    return restored.tree.replace(**frozen), restored.notes["row"]


class _Incidents:
    """Saves an update that is not finite, then ends the run or lets it continue."""

    def __init__(self, stage, workdir, config, reporter):
        self._stage, self._workdir, self._config, self._reporter = stage, workdir, config, reporter
        self.waits = stage.guard.action == "skip"

    def __call__(self, state, step, batch, rollout, names, skipped):
        name, limits = self._stage.name, self._stage.guard
        aside = {"step": state.step * 0 + (step - 1), "skipped": state.skipped * 0}  # as it was before the update
        incident = guard.Incident(
            stage=name,
            step=step,
            names=tuple(names),
            config=self._config,
            state=state.replace(**aside),
            batch=batch,
            rollout=rollout,
        )
        folder = guard.write(self._workdir.path, incident)
        what = f"{name} step {step}: {guard.message(names)} not finite, the step was not taken"
        if self.waits and skipped <= limits.limit:
            self._reporter.note(f"{what}; skipped, {skipped} of at most {limits.limit}; kept in {folder}")
            return
        why = f"; guard.limit: expected at most {limits.limit} such updates" if self.waits else ""
        again = f"python -m rlhf_jax.replay {folder}"
        if "task" not in self._config:  # a stage that was made in Python
            again = f"rlhf_jax.replay.replay({str(folder)!r}, stage=...)"
        raise guard.NonFinite(f"{what}{why}; {again} shows where it begins")


def _began(workdir, name):
    """The start of the stage on the clock of time.monotonic, without the pauses between its runs."""
    path = workdir / name / "metrics.jsonl"
    rows = metrics.read(path) if path.exists() else []
    return time.monotonic() - (rows[-1]["time"] if rows else 0)


def _finish(stage, workdir, state, evaluation, numbers, began, reporter, seed, recorder):
    """Writes plots, samples and, last, the summary, which marks the stage as finished; its names have no `eval_`."""
    found = stage.summarize(state, evaluation)
    done = hosts.on_first(lambda: _write(stage, workdir, found, numbers, began, reporter, seed, recorder))
    return done or workdir.summary(stage.name)


def _write(stage, workdir, found, numbers, began, reporter, seed, recorder):
    folder = workdir / stage.name
    more = found.plot(metrics.read(folder / "metrics.jsonl"), folder / "plots", workdir.name)
    workdir.write_lines(f"{stage.name}/samples.jsonl", found.samples)
    numbers = numbers | found.numbers | more | {"steps": stage.config.steps}
    numbers = {f"{stage.name}/{key}": value for key, value in numbers.items()}
    if recorder:
        recorder.finish(stage, numbers, found.samples)
    summary = write_summary(workdir, f"{stage.name}/summary.json", time.monotonic() - began, numbers, seed)
    shown = [(key, summary.get(f"{stage.name}/{key}")) for key in stage.headlines]
    reporter.finish("held out: " + "  ".join(f"{key} {number(value)}" for key, value in shown if value is not None))
    if found.table:
        reporter.before_after(found.table)
    return summary


def write_summary(workdir, name, seconds, numbers, seed):
    """Writes and returns summary.json: the numbers, and what they depend on."""
    summary = {**metrics.environment(), "seed": seed, "seconds": round(seconds, 1), **numbers}
    workdir.write_json(name, summary)
    return summary
