"""The one training loop: step, log, evaluate, save, stop cleanly. Every stage is this with another step function."""

import contextlib
import signal

import numpy as np

from rlhf_jax.training.guard import NonFinite

AGAIN = "the same command goes on from there"


class Stopped(BaseException):
    """SIGTERM or SIGINT has stopped the run; the same command goes on from there.

    Like KeyboardInterrupt it is no Exception: a signal may come anywhere, and no `except Exception` may catch it.
    """


def run(stage, state, *, checkpoints, log, reporter, stop, incident, row=None):
    """Trains a Stage from state.step to its last step and returns the last state, which the caller evaluates.

    The stage is evaluated every config.eval_every steps. A checkpoint is taken every config.save_every steps, at the
    best evaluation, after the last step, and when `stop()` is true; then Stopped is raised. It holds the state and the
    row of metrics of its step; `row` is the row of the given state. If the run stopped before that step's evaluation,
    the evaluation runs now.

    For a number that is not finite the loop calls incident(state, step, batch, rollout, names, skipped), which raises
    NonFinite or lets the run continue. If it may continue (incident.waits), every step is awaited, so that its state is
    available.
    """
    config = stage.config
    pending = None  # the step on the device, whose numbers are read while the next one runs
    skipped = int(state.skipped)

    def write(step, numbers):
        log.write(step, numbers)
        reporter.update(step, numbers)

    def named(numbers):
        return {f"{stage.name}/{name}": float(value) for name, value in numbers.items()}

    def read(step, batch, done):
        nonlocal skipped
        numbers = named(done.numbers)
        count = int(numbers.get(f"{stage.name}/skipped", skipped))
        if (names := not_finite(numbers)) or count > skipped:
            try:
                incident(state, step, batch, done.rollout, names, count)
            except NonFinite:
                write(step, numbers)
                raise
        skipped = count
        for note in done.notes:
            reporter.note(f"{stage.name}: {note}")
        return numbers

    def evaluated(state):
        """(state, numbers); the numbers are None if a signal interrupted the evaluation."""
        try:
            with stop.at_once():
                evaluation = stage.evaluate(state)
        except Stopped:
            return state, None
        reporter.samples(evaluation.samples)
        return stage.keep(state, evaluation) if stage.keep else state, evaluation.numbers

    def end_step(state, step, numbers):
        """Evaluates if it is due, and logs: (state, row, its numbers if the checkpoint may be a best one)."""
        is_due, found = due(config.eval_every, step), None
        if is_due and step < config.steps:  # the caller evaluates the last state
            state, found = evaluated(state)
        evaluation = named(found or {})
        numbers = numbers | evaluation
        write(step, numbers)
        if wrong := not_finite(evaluation):
            raise NonFinite(f"step {step}: {', '.join(wrong)} not finite")
        row = {"numbers": numbers, "complete": not is_due or found is not None}
        return state, row, evaluation if found and stage.eligible(found) else None

    def save(state, step, row, found):
        kept = state.replace(**dict.fromkeys(stage.frozen))
        checkpoints.save(step, kept, {"row": row}, found)

    def leave(step):
        if stop():
            raise Stopped(f"stopped after step {step} of {config.steps}; {AGAIN}")

    start = int(state.step)
    if row is not None and row["complete"]:
        write(start, row["numbers"])
    elif row is not None:
        state, row, found = end_step(state, start, row["numbers"])
        if row["complete"]:  # saved again, now with its evaluation
            save(state, start, row, found)
        leave(start)
    for step in range(start + 1, config.steps + 1):
        batch = stage.batch_at(step - 1)
        done = stage.step(state, batch)
        state = done.state
        if pending:
            write(pending[0], read(*pending))
        pending = step, batch, done._replace(state=None)
        saves = step == config.steps or due(config.save_every, step)
        if saves or due(config.eval_every, step) or stop() or incident.waits:
            numbers, pending = read(*pending), None
            state, row, found = end_step(state, step, numbers)
            if saves or stop() or (found and checkpoints.is_best(found)):
                save(state, step, row, found)
            leave(step)
    return state


def due(every, step):
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def not_finite(numbers):
    """The names of the numbers that are NaN or infinite."""
    return [name for name, value in numbers.items() if not np.isfinite(value)]


class Stop:
    """Whether SIGTERM or SIGINT has come. A second signal ends the program at once; no file is ever incomplete."""

    def __init__(self):
        self._requested = self._raises = False

    def __call__(self):
        return self._requested

    def request(self, number, _=None):
        """The handler of the signals."""
        self._requested = True
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        self._check(f"stopped by {signal.Signals(number).name}; {AGAIN}")

    def at_once(self):
        """Inside this context a signal raises Stopped at once; an earlier signal raises it at the start."""
        return self._mode(True)

    def later(self):
        """Inside this context a signal is only noted, until the run can be saved; it is raised at the end."""
        return self._mode(False)

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
        if self._requested and self._raises:
            raise Stopped(message)


@contextlib.contextmanager
def stop_signal():
    """Yields a Stop that notes SIGTERM and SIGINT. Restores the previous handlers at the end."""
    stop = Stop()
    before = {number: signal.signal(number, stop.request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
