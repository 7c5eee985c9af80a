"""The one training loop: step, log, evaluate, save, stop cleanly. Every stage is this with another step function."""

import contextlib
import dataclasses
import signal
import time
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import command, hosts
from rlhf_jax.errors import AGAIN, STOPPED
from rlhf_jax.report import metrics
from rlhf_jax.training.guard import NonFinite


class Stopped(BaseException):
    """SIGTERM or SIGINT has stopped the run; the same command goes on from there.

    Like KeyboardInterrupt it is no Exception: a signal may come anywhere, and no `except Exception` may catch it.
    """

    exit_code = STOPPED


def run(stage, state, *, checkpoints, log, reporter, stop, incident, row=None, recorder=None):
    """Trains a Stage from state.step to its last step and returns the last state, which the caller evaluates.

    The stage is evaluated at step 0 and every config.eval_every steps. A checkpoint is taken every config.save_every
    steps, at the best evaluation, after the last step, and when `stop()` is true; then Stopped is raised. It holds the
    state and the row of metrics of its step; `row` is the row of the given state. If the run stopped before that step's
    evaluation, the evaluation runs now.

    For a number that is not finite the loop calls incident(state, step, batch, rollout, names, skipped), which raises
    NonFinite or lets the run continue. If it may continue (incident.waits), every step is awaited, so that its state is
    available.

    recorder: a viz.recorder.Recorder, which is given the arrays of the steps that it requests and every evaluation.
    """
    # The rates are computed here, where the device has nothing else to do.
    parts = {"lr": stage.lr, "skipped": int(state.skipped), "recorder": recorder}
    loop = _Loop(stage, checkpoints, log, reporter, stop, incident, **parts)
    state = loop.again(state, row)
    pending = None  # the step on the device, whose numbers are read while the next one runs
    for step in range(int(state.step) + 1, stage.config.steps + 1):
        began = time.monotonic()
        batch = stage.batch_at(step - 1)
        wanted = {"record": True} if recorder and recorder.due(stage, step) else {}
        done = stage.step(state, batch, **wanted)
        state = done.state
        if pending:
            loop.write(pending.step, loop.read(state, pending, done.times and done.times.before))
        pending = _Pending(step, began, batch, done._replace(state=None))
        if loop.waits(step):
            state = loop.end_step(state, step, loop.read(state, pending))
            pending = None
    return state


class _Pending(NamedTuple):
    """A step whose numbers are not read yet."""

    step: int
    began: float  # on the clock of time.monotonic
    batch: Any
    done: Any  # stages.Step, without its state


@dataclasses.dataclass
class _Loop:
    """What is done between the steps of a stage."""

    stage: Any  # stages.Stage
    checkpoints: Any
    log: Any
    reporter: Any
    stop: Any
    incident: Any
    lr: np.ndarray  # of each optimizer step
    skipped: int  # updates left out so far
    ended: float = -np.inf  # when the last step that was read had ended, on the clock of time.monotonic
    recorder: Any = None

    def again(self, state, row):
        """The state after its row is logged again, and after the evaluation that a stop has prevented."""
        step = int(state.step)
        if row is None and step == 0:
            self.first(state)
        elif row is not None and row["complete"]:
            self.write(step, row["numbers"])
        elif row is not None:
            state, row, found = self.evaluate(state, step, row["numbers"])
            if row["complete"]:  # saved again, now with its evaluation
                self.save(state, step, row, found)
            self.leave(step)
        return state

    def first(self, state):
        """Logs the evaluation before any step. Numbers that are not finite are left to the first step."""
        evaluation = self.stage.first
        if evaluation and self.recorder:
            self.recorder.evaluation(self.stage, 0, evaluation)
        if not evaluation and self.stage.config.eval_every:
            evaluation = self._evaluation(state, 0)
        if evaluation:
            self.write(0, self._named(evaluation.numbers, "eval_"), evaluation.samples)
        self.leave(0)

    def waits(self, step):
        """Whether the numbers of this step are read before the next one begins."""
        return self.saves(step) or due(self.stage.config.eval_every, step) or self.stop() or self.incident.waits

    def saves(self, step):
        """Whether a checkpoint of this step is due."""
        return step == self.stage.config.steps or due(self.stage.config.save_every, step)

    def end_step(self, state, step, numbers):
        """Evaluates, logs and saves what is due, and stops the run if a signal has come: the state."""
        state, row, found = self.evaluate(state, step, numbers)
        if self.saves(step) or self.stop() or (found and self.checkpoints.is_best(found)):
            self.save(state, step, row, found)
        self.leave(step)
        return state

    def evaluate(self, state, step, numbers):
        """Evaluates if it is due, and logs: (state, row, its numbers if the checkpoint may be a best one)."""
        config = self.stage.config
        is_due, evaluation = due(config.eval_every, step), None
        if is_due and step < config.steps:  # the caller evaluates the last state
            evaluation = self._evaluation(state, step)
        row = {"numbers": numbers, "complete": not is_due}
        if not evaluation:
            self.write(step, numbers)
            return state, row, None
        self.reporter.samples(evaluation.samples)
        if self.stage.keep:
            state = self.stage.keep(state, evaluation)
        found = self._named(evaluation.numbers, "eval_")
        row = {"numbers": numbers | found, "complete": True}
        self.write(step, row["numbers"], evaluation.samples)
        if wrong := not_finite(found):
            raise NonFinite(f"step {step}: {', '.join(wrong)} not finite")
        return state, row, found if self.stage.eligible(evaluation.numbers) else None

    def _evaluation(self, state, step):
        """The stage's Evaluation; None if a signal interrupted it."""
        try:
            with self.stop.evaluating():
                evaluation = self.stage.evaluate(state)
        except Stopped:
            return None
        if self.recorder:
            self.recorder.evaluation(self.stage, step, evaluation)
        return evaluation

    def read(self, state, pending, ended=None):
        """The numbers of a step, waited for. `state` is the newest one; `ended` is when the step did, if known."""
        step, _, batch, done = pending
        numbers = self._named(done.numbers)
        ended = ended or time.monotonic()
        names, count = not_finite(numbers), int(numbers.get(f"{self.stage.name}/skipped", self.skipped))
        if "skipped" in done.numbers:  # else nothing was learned, as after an alarm
            numbers |= self._named(self.used(pending, ended))
        self.ended = ended
        if names or count > self.skipped:
            try:
                self.incident(state, step, batch, done.rollout, names, count)
            except NonFinite:
                self.write(step, numbers)
                raise
        self.skipped = count
        for note in done.notes:
            self.reporter.note(f"{self.stage.name}: {note}")
        if self.recorder and done.record:
            self.recorder.step(self.stage, step, done.record, numbers)
        return numbers

    def used(self, pending, ended):
        """What a step used: {name: number}. The host waits nowhere that it would not wait without this.

        lr: the learning rate of the step's first optimizer step. A skipped step does not move it on (if an iteration is
        skipped after some of its optimizer steps, what is logged stays behind by those).
        seconds: wall time from the end of the step before, or from fetching the batch if that came later, to the end of
        the update. Compilation is in it; evaluations, checkpoints and the writing of logs are not, unless the device
        was busy meanwhile. In reinforcement learning it is the sum of
            seconds_collect  sampling;
            seconds_reward   decoding and scoring. With a learned reward: reference, values and scores on the device,
                             or the host's reading of the texts beside it if that takes longer;
            seconds_learn    the update, and what is left of the device's scoring when a function has scored.
        tokens_per_second: real tokens of batch and completions, each once, over `seconds`.
        host_memory_gib, device_memory_gib: the most until now, of this process and of its fullest device; a CPU has no
        memory of its own.
        """
        stage, (step, began, batch, done) = self.stage, pending
        lr = self.lr[max(step - 1 - self.skipped, 0) * (len(self.lr) // stage.config.steps)]
        start, times = max(began, self.ended), done.times
        numbers = {"seconds": ended - start}
        if times:
            numbers["seconds_collect"] = times.collected - start
            numbers["seconds_reward"] = times.rewarded - times.collected
            numbers["seconds_learn"] = ended - times.rewarded
        numbers["tokens_per_second"] = stage.tokens(batch, done.numbers) / max(numbers["seconds"], 1e-9)
        host, device = metrics.peak_memory()
        numbers |= {"host_memory_gib": host / 2**30} | ({} if device is None else {"device_memory_gib": device / 2**30})
        return {"lr": float(f"{lr:.7g}")} | {name: float(f"{value:.4g}") for name, value in numbers.items()}

    def write(self, step, numbers, samples=()):
        """Logs and shows a row of metrics, and logs the samples of its evaluation."""
        self.log.samples(step, self.stage.name, samples)
        self.log.write(step, numbers)
        self.reporter.update(step, numbers)

    def save(self, state, step, row, found):
        """Takes a checkpoint, without the parameters that no step changes."""
        self.log.flush()
        kept = state.replace(**dict.fromkeys(self.stage.frozen))
        self.checkpoints.save(step, kept, {"row": row}, found)

    def leave(self, step):
        """Raises Stopped if a signal has come."""
        if self.stop():
            raise Stopped(f"stopped after step {step} of {self.stage.config.steps}; {AGAIN}")

    def _named(self, numbers, kind=""):
        return named(self.stage, numbers, kind)


def named(stage, numbers, kind=""):
    """The numbers as they are logged: {"sft/loss": ...}, or {"sft/eval_loss": ...} where kind is "eval_"."""
    return {f"{stage.name}/{kind}{name}": float(value) for name, value in numbers.items()}


def due(every, step):
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def not_finite(numbers):
    """The names of the numbers that are NaN or infinite."""
    return [name for name, value in numbers.items() if not np.isfinite(value)]


class Stop:
    """Whether SIGTERM or SIGINT has come. A second one goes to the handler of `before`, and ends the program at once.

    No file is ever incomplete. before: {signal: its handler}. Of several hosts, one that has the signal says it to the
    others, and all stop after the same step.
    """

    def __init__(self, before=()):
        self.before = dict(before)
        self.requested = self._raises = False

    def __call__(self):
        """Whether the run stops here. Of several hosts, all call it equally often and get the same answer."""
        return hosts.stops() if hosts.several() else self.requested

    def request(self, number, _=None):
        """The handler of the signals."""
        if self.requested:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.requested = True
        if not self._raises:
            hosts.spread_stop(signal.Signals(number).name)
        self._check(f"stopped by {signal.Signals(number).name}; {AGAIN}")

    def at_once(self):
        """Inside this context a signal raises Stopped at once; an earlier signal raises it at the start."""
        return self._mode(True)

    def later(self):
        """Inside this context a signal is only noted, until the run can be saved; it is raised at the end."""
        return self._mode(False)

    def evaluating(self):
        """As `at_once` for one process. Several stop before the same batch: none may leave the others alone in it."""
        return hosts.pauses(self._stopped) if hosts.several() else self.at_once()

    @contextlib.contextmanager
    def _mode(self, raises):
        before, self._raises = self._raises, raises
        try:
            self._check()
            yield
        finally:
            self._raises = before
        self._check()

    def _check(self, message=f"stopped; {AGAIN}"):
        if self.requested and self._raises:
            self._stopped(message)

    def _stopped(self, message=f"stopped; {AGAIN}"):
        raise Stopped(message)


@contextlib.contextmanager
def stop_signal():
    """Yields a Stop that notes SIGTERM and SIGINT. Restores the previous handlers at the end."""
    stop = Stop({number: signal.getsignal(number) for number in command.SIGNALS})
    command.taken_over = True
    try:
        for number in stop.before:
            signal.signal(number, stop.request)
        yield stop
    finally:
        for number, handler in stop.before.items():
            signal.signal(number, handler)
        command.taken_over = stop.requested  # who has taken a signal ends the program
