"""The one training loop: step, log, evaluate, save, stop cleanly. Every stage is this with another step function."""

import contextlib
import signal

import numpy as np

from rlhf_jax.training.guard import NonFinite

AGAIN = "the same command goes on from there"


class Stopped(BaseException):
    """The run was asked to stop (SIGTERM, SIGINT); the same command goes on from there.

    Like KeyboardInterrupt it is no Exception: a signal may come anywhere, and no `except Exception` may eat it.
    """


def run(state, batches, *, config, step_fn, evaluate, checkpoints, log, reporter, stop, incident, row=None, keep=None):
    """Trains from state.step to config.steps and returns the last state, which the caller evaluates.

    step_fn(state, batch) -> (state, numbers) may donate the state. evaluate(state) -> (numbers, details) is called
    every config.eval_every steps, and keep(state, details) -> state may put aside what it found. A checkpoint is taken
    every config.save_every steps, at the best evaluation, after the last step, and when `stop()` says so; then Stopped
    is raised. Beside the state it holds the position of `batches` and the row of its step; `row` is that of the state
    given, and its evaluation is made up for where a signal came before it.

    A number that is not finite is logged and handed to incident(state, step, batch, names, skipped), which raises
    NonFinite or lets the run go on; then the loop waits for each step (incident.waits), to have its state at hand.
    """
    pending = None  # the step on the device, whose numbers are read while the next one runs
    skipped = int(state.skipped)

    def tell(step, numbers):
        log.write(step, numbers)
        reporter.update(step, numbers)

    def read(step, batch, numbers):
        nonlocal skipped
        numbers = floats(numbers)
        count = int(next((value for name, value in numbers.items() if name.endswith("/skipped")), skipped))
        if (names := not_finite(numbers)) or count > skipped:
            try:
                incident(state, step, batch, names, count)
            except NonFinite:
                tell(step, numbers)
                raise
        skipped = count
        return numbers

    def evaluated(state):
        """(state, numbers), or None for the numbers where a signal came first."""
        try:
            with stop.at_once():
                found, details = evaluate(state)
        except Stopped:
            return state, None
        return keep(state, details) if keep else state, floats(found)

    def end_step(state, step, numbers):
        """Evaluates if it is due, and logs: (state, row, the evaluation's numbers or None)."""
        asked, found = due(config.eval_every, step), None
        if asked and step < config.steps:  # the last one is the caller's
            state, found = evaluated(state)
        numbers = numbers | (found or {})
        tell(step, numbers)
        if found and (wrong := not_finite(found)):
            raise NonFinite(f"step {step}: {', '.join(wrong)} not finite")
        return state, {"numbers": numbers, "complete": not asked or found is not None}, found

    def leave(step):
        if stop():
            raise Stopped(f"stopped after step {step} of {config.steps}; {AGAIN}")

    start = int(state.step)
    if row is not None and row["complete"]:
        tell(start, row["numbers"])
    elif row is not None:
        state, _, _ = end_step(state, start, row["numbers"])
        leave(start)
    for step in range(start + 1, config.steps + 1):
        batch = next(batches)
        state, numbers = step_fn(state, batch)
        if pending:
            tell(pending[0], read(*pending))
        pending = step, batch, numbers
        saves = step == config.steps or due(config.save_every, step)
        if saves or due(config.eval_every, step) or stop() or incident.waits:
            numbers, pending = read(*pending), None
            state, row, found = end_step(state, step, numbers)
            if saves or stop() or (found and checkpoints.is_best(found)):
                checkpoints.save(step, state, {"position": batches.get_state(), "row": row}, found)
            leave(step)
    return state


def due(every, step):
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def floats(numbers):
    """The numbers, waited for."""
    return {name: float(value) for name, value in numbers.items()}


def not_finite(numbers):
    """The names of the numbers that are NaN or infinite."""
    return [name for name, value in numbers.items() if not np.isfinite(value)]


class Stop:
    """Whether SIGTERM or SIGINT has come. A second one ends the program, whatever it is doing: all files are whole."""

    def __init__(self):
        self._asked = self._raises = False

    def __call__(self):
        return self._asked

    def ask(self, number, _=None):
        """The handler of the signals."""
        self._asked = True
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        self._check(f"stopped by {signal.Signals(number).name}; {AGAIN}")

    def at_once(self):
        """Within, the signal raises Stopped where it comes; one that has come already does so at the start."""
        return self._mode(True)

    def later(self):
        """Within, the signal is only noted, for a place where the run can be saved; it is raised at the end."""
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

    def _check(self, told=f"stopped; {AGAIN}"):
        if self._asked and self._raises:
            raise Stopped(told)


@contextlib.contextmanager
def stop_signal():
    """Yields a Stop that is told of SIGTERM and SIGINT. The handlers of before are put back in the end."""
    stop = Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
