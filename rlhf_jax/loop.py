"""The one training loop: step, log, evaluate, save, stop cleanly. Every stage is this with another step function."""

import contextlib
import signal

import numpy as np


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved; the same command goes on from there."""


class NonFinite(ArithmeticError):
    """A logged number is NaN or infinite; the checkpoints are from before."""


def run(state, batches, *, config, step_fn, evaluate, checkpoints, log, reporter, stop, keep=lambda state, _: state):
    """Trains from state.step to config.steps and returns the last state, which the caller evaluates and saves.

    step_fn(state, batch) -> (state, metrics) may donate the state. evaluate(state) -> (metrics, details) is called
    every config.eval_every steps, and keep(state, details) -> state may put aside what it found. A checkpoint holds
    the state and the position of `batches`; it is taken every config.save_every steps and when `stop()` says so, and
    then Stopped is raised.
    """
    pending = None  # the step on the device, whose numbers are read while the next one runs
    for step in range(int(state.step) + 1, config.steps + 1):
        state, metrics = step_fn(state, next(batches))
        if pending:
            record(*pending, log, reporter)
        if step < config.steps and due(config.eval_every, step):
            numbers, details = evaluate(state)
            metrics |= numbers
            state = keep(state, details)
        pending = (step, metrics)
        if step < config.steps and (due(config.save_every, step) or stop()):
            record(*pending, log, reporter)
            pending = None
            checkpoints.save(step, state, batches.get_state())
            if stop():
                raise Stopped(f"stopped after step {step} of {config.steps}; the same command goes on from there")
    if pending:
        record(*pending, log, reporter)
    return state


def due(every, step):
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def record(step, metrics, log, reporter):
    """Waits for the numbers, logs and shows them; raises NonFinite, once they are logged, if one is not finite."""
    metrics = {name: float(value) for name, value in metrics.items()}
    log.write(step, metrics)
    reporter.update(step, metrics)
    wrong = [name for name, value in metrics.items() if not np.isfinite(value)]
    if wrong:
        raise NonFinite(f"step {step}: {', '.join(wrong)} not finite")


@contextlib.contextmanager
def stop_signal():
    """Yields a function that tells whether SIGTERM or SIGINT has come; a second one acts as usual, at once."""
    asked = []

    def ask(number, _):
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
