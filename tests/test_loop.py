import os
import signal
import types

import pytest

from rlhf_jax import loop


class Story:
    """Every part the loop is given; `told` is what it did with them, in order. The state is the step alone."""

    def __init__(self, *, stop_after=None, wrong=None):
        self.told = []
        self.rows = {}  # step -> metrics, as logged
        self.stop_after = stop_after  # the step in which the signal comes
        self.wrong = wrong or {}  # step -> a number that is not finite
        self.drawn = 0

    def run(self, steps, *, start=0, eval_every=0, save_every=0):
        config = types.SimpleNamespace(steps=steps, eval_every=eval_every, save_every=save_every)
        self.drawn = start
        return loop.run(
            types.SimpleNamespace(step=start),
            self,
            config=config,
            step_fn=self.step,
            evaluate=self.evaluate,
            checkpoints=self,
            log=self,
            reporter=self,
            stop=lambda: self.stop_after is not None and self.drawn >= self.stop_after,
        )

    def step(self, state, batch):
        step = state.step + 1
        assert batch == step
        self.told.append(f"step {step}")
        return types.SimpleNamespace(step=step), {"loss": self.wrong.get(step, step / 2)}

    def evaluate(self, state):
        self.told.append(f"evaluate {state.step}")
        return {"eval_loss": float(state.step)}, "details that only the caller wants"

    def __next__(self):
        self.drawn += 1
        return self.drawn

    def get_state(self):
        return self.drawn

    def write(self, step, metrics):
        self.told.append(f"log {step}")
        self.rows[step] = metrics

    def update(self, step, metrics):
        assert self.rows[step] == metrics  # what is shown is what was logged

    def save(self, step, state, position):
        assert step == state.step == position
        self.told.append(f"save {step}")


def test_the_device_is_busy_with_a_step_while_the_one_before_is_read():
    story = Story()
    assert story.run(3).step == 3
    assert story.told == ["step 1", "step 2", "log 1", "step 3", "log 2", "log 3"]


def test_the_last_step_is_left_to_the_caller_to_evaluate_and_save():
    story = Story()
    story.run(6, eval_every=2, save_every=3)
    assert [line for line in story.told if "step" not in line] == [
        "log 1", "evaluate 2", "log 2", "log 3", "save 3", "evaluate 4", "log 4", "log 5", "log 6",
    ]  # fmt: skip


def test_an_evaluation_is_in_the_row_of_its_step():
    story = Story()
    story.run(3, eval_every=2)
    assert story.rows == {1: {"loss": 0.5}, 2: {"loss": 1.0, "eval_loss": 2.0}, 3: {"loss": 1.5}}


@pytest.mark.parametrize(("start", "steps"), [(2, [3, 4]), (4, [])])
def test_a_restored_state_goes_on_from_its_step(start, steps):
    story = Story()
    assert story.run(4, start=start).step == 4
    assert list(story.rows) == steps


@pytest.mark.parametrize(("every", "due"), [(0, []), (-1, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (5, [])])
def test_due(every, due):
    assert [step for step in range(1, 5) if loop.due(every, step)] == due


def test_when_asked_to_stop_it_logs_and_saves_the_step_and_says_so():
    story = Story(stop_after=2)
    with pytest.raises(loop.Stopped, match="stopped after step 2 of 9"):
        story.run(9, save_every=100)
    assert story.told == ["step 1", "step 2", "log 1", "log 2", "save 2"]


def test_a_stop_at_a_checkpoint_saves_once():
    story = Story(stop_after=2)
    with pytest.raises(loop.Stopped):
        story.run(9, save_every=2)
    assert story.told.count("save 2") == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_logged_and_then_stops_the_run(number):
    story = Story(wrong={3: number})
    with pytest.raises(loop.NonFinite, match="step 3: loss not finite"):
        story.run(9, save_every=1)
    assert [line for line in story.told if "save" in line] == ["save 1", "save 2"]  # from before
    assert list(story.rows) == [1, 2, 3]


# The signal


@pytest.fixture
def handled():
    """Signals that came to the handlers of before, which are put back in the end."""
    numbers = []
    before = {s: signal.signal(s, lambda number, _: numbers.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_acts_as_usual(number, handled):
    with loop.stop_signal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and not handled
        os.kill(os.getpid(), number)
        assert handled == [number]


def test_handlers_are_put_back_whatever_happens(handled):
    with pytest.raises(ZeroDivisionError), loop.stop_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert handled == [signal.SIGTERM, signal.SIGINT]
