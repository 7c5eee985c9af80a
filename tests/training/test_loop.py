import contextlib
import dataclasses
import os
import signal
import types

import numpy as np
import pytest

from rlhf_jax.stages import Evaluation, Step
from rlhf_jax.training import checkpoint, loop
from rlhf_jax.training.guard import NonFinite


@dataclasses.dataclass(frozen=True)
class State:
    step: int
    skipped: int = 0
    reference: str | None = "frozen"
    best: int = 0  # what `keep` has put aside

    replace = dataclasses.replace


class Story:
    """The stage and every part the loop is given; `told` is what it did with them, in order."""

    name, frozen = "a", ("reference",)
    waits = False  # of an incident
    keep = None

    def __init__(self, *, stop_after=None, wrong=None, skips=(), signal_in=None, best=(), checkpoints=None):
        self.told = []
        self.rows = {}  # step -> numbers, as logged last
        self.saved = {}  # step -> (notes, numbers compared by)
        self.shown, self.notes = [], []
        self.stop_after = stop_after  # the step in which the signal comes
        self.signal_in = signal_in  # the evaluation in which it comes
        self.wrong = wrong or {}  # step -> a number that is not finite
        self.skips = skips  # steps whose update is left out
        self.best = best  # evaluations that are the best so far
        self.checkpoints = checkpoints  # real ones
        self.requested = self.raises = False
        self.batches = 0

    def run(self, steps, *, start=0, eval_every=0, save_every=0, row=None):
        self.config = types.SimpleNamespace(steps=steps, eval_every=eval_every, save_every=save_every)
        self.batches = start
        parts = {name: self for name in ("checkpoints", "log", "reporter", "stop", "incident")}
        return loop.run(self, State(start), **parts, row=row)

    def batch_at(self, step):
        assert step == self.batches  # each once, in order
        self.batches += 1
        return f"batch {step}"

    def step(self, state, batch):
        assert batch == f"batch {state.step}"
        step = state.step + 1
        self.told.append(f"step {step}")
        state = state.replace(step=step, skipped=state.skipped + (step in self.skips))
        numbers = {"loss": self.wrong.get(step, step / 2), "skipped": state.skipped}
        return Step(state, numbers, f"rollout {step}", (f"note {step}",) if step == 2 else ())

    def evaluate(self, state):
        self.told.append(f"evaluate {state.step}")
        if state.step == self.signal_in:
            self.requested = True
            assert self.raises
            raise loop.Stopped
        return Evaluation({"eval_loss": float(state.step)}, "details", (f"sample {state.step}",))

    def eligible(self, numbers):
        assert numbers.keys() == {"eval_loss"}
        return True

    def write(self, step, numbers):
        self.told.append(f"log {step}")
        self.rows[step] = {name: value for name, value in numbers.items() if name != "a/skipped"}

    def update(self, step, numbers):
        assert self.rows[step].items() <= numbers.items()  # what is shown is what was logged

    def samples(self, rows):
        self.shown += rows

    def note(self, text):
        self.notes.append(text)

    def save(self, step, state, notes, found):
        assert step == state.step and state.reference is None
        assert self.rows[step].items() <= notes["row"]["numbers"].items()
        self.told.append(f"save {step}")
        self.saved[step] = notes, found
        if self.checkpoints:
            self.checkpoints.save(step, {"steps": np.array([step])}, notes, found)

    def is_best(self, numbers):
        return self.checkpoints.is_best(numbers) if self.checkpoints else numbers["a/eval_loss"] in self.best

    def __call__(self, *incident):
        if not incident:  # stop()
            return self.requested or self.stop_after is not None and self.batches >= self.stop_after
        state, step, batch, rollout, names, skipped = incident
        assert rollout == f"rollout {step}" and batch == f"batch {step - 1}"
        self.told.append(f"incident {step}: {names}, {skipped} skipped, state {state.step}")
        if not self.waits:
            raise NonFinite(f"step {step}")

    @contextlib.contextmanager
    def at_once(self):
        if self():
            raise loop.Stopped
        self.raises = True
        yield
        self.raises = False


def test_the_device_is_busy_with_a_step_while_the_one_before_is_read():
    story = Story()
    assert story.run(3).step == 3
    assert story.told == ["step 1", "step 2", "log 1", "step 3", "log 2", "log 3", "save 3"]


def test_the_last_step_is_saved_and_left_to_the_caller_to_evaluate():
    story = Story()
    story.run(6, eval_every=2, save_every=3)
    assert [line for line in story.told if "step" not in line] == [
        "log 1", "evaluate 2", "log 2", "log 3", "save 3", "evaluate 4", "log 4", "log 5", "log 6", "save 6",
    ]  # fmt: skip
    assert [story.saved[step][0]["row"]["complete"] for step in (3, 6)] == [True, False]


def test_the_best_evaluation_is_saved():
    story = Story(best=(4,))
    story.run(6, eval_every=2)
    assert list(story.saved) == [4, 6]
    notes, found = story.saved[4]
    assert found == {"a/eval_loss": 4} and notes["row"]["numbers"]["a/eval_loss"] == 4


def test_a_checkpoint_that_is_not_eligible_is_none_of_the_best():
    """It is saved where one is due, with its evaluation in the row, but it has no number that it is compared by."""
    story = Story(best=(2, 4))
    story.eligible = lambda numbers: numbers["eval_loss"] != 2
    story.run(6, eval_every=2)
    assert list(story.saved) == [4, 6] and story.rows[2]["a/eval_loss"] == 2
    story.run(6, eval_every=2, save_every=2)
    assert {step: found for step, (_, found) in story.saved.items()} == {2: None, 4: {"a/eval_loss": 4}, 6: None}
    assert story.saved[2][0]["row"] == {
        "numbers": {"a/loss": 1, "a/skipped": 0, "a/eval_loss": 2},
        "complete": True,
    }


def test_what_an_evaluation_found_may_be_put_aside():
    """And its samples are shown."""
    found, story = [], Story()

    def keep(state, evaluation):
        found.append((state.step, evaluation.details))
        return state

    story.keep = keep
    story.run(6, eval_every=2)
    assert found == [(2, "details"), (4, "details")] and story.shown == ["sample 2", "sample 4"]


def test_what_is_put_aside_stays_in_the_state():
    story = Story(best=(2,))
    story.keep = lambda state, evaluation: state.replace(best=state.step)
    assert story.run(5, eval_every=2).best == 4


def test_notes_of_a_step_are_shown_under_the_stages_name():
    story = Story()
    story.run(3)
    assert story.notes == ["a: note 2"]


def test_an_evaluation_is_in_the_row_of_its_step():
    story = Story()
    story.run(3, eval_every=2)
    assert story.rows == {1: {"a/loss": 0.5}, 2: {"a/loss": 1.0, "a/eval_loss": 2.0}, 3: {"a/loss": 1.5}}


@pytest.mark.parametrize(("start", "steps"), [(2, [3, 4]), (4, [])])
def test_a_restored_state_goes_on_from_its_step(start, steps):
    story = Story()
    assert story.run(4, start=start).step == 4
    assert list(story.rows) == steps


@pytest.mark.parametrize(("every", "due"), [(0, []), (-1, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (5, [])])
def test_due(every, due):
    assert [step for step in range(1, 5) if loop.due(every, step)] == due


def test_the_row_of_a_checkpoint_is_logged_again():
    """It is dropped from the log with those after it; without this, a kill before it is written would lose it."""
    story = Story()
    story.run(3, start=2, eval_every=2, row={"numbers": {"a/loss": 7.0}, "complete": True})
    assert story.rows == {2: {"a/loss": 7}, 3: {"a/loss": 1.5}} and "evaluate 2" not in story.told


def test_an_evaluation_that_a_signal_came_before_runs_now():
    """And the checkpoint is saved once more, with what it found: it may be the best."""
    story = Story(best=(2,))
    story.run(3, start=2, eval_every=2, row={"numbers": {"a/loss": 7.0}, "complete": False})
    assert story.told[:4] == ["evaluate 2", "log 2", "save 2", "step 3"]
    assert story.rows[2] == {"a/loss": 7, "a/eval_loss": 2}
    notes, found = story.saved[2]
    assert notes["row"] == {"numbers": {"a/loss": 7, "a/eval_loss": 2}, "complete": True} and found["a/eval_loss"] == 2


def test_a_signal_in_that_evaluation_stops_the_run_once_more():
    story = Story(signal_in=2)
    with pytest.raises(loop.Stopped, match="stopped after step 2 of 3"):
        story.run(3, start=2, eval_every=2, row={"numbers": {"a/loss": 7.0}, "complete": False})
    assert story.told == ["evaluate 2", "log 2"]  # it is saved already


@pytest.mark.parametrize("signal_in", [2, 4])
def test_a_signal_in_an_evaluation_loses_no_best_checkpoint(signal_in, tmp_path):
    """Undisturbed, the best of step 2 and the last are kept; and so they are of a run that was stopped and resumed."""

    def checkpoints(name):
        return checkpoint.Checkpoints(tmp_path / name, checkpoint.Config(last=1, best=1), ("a/eval_loss", min))

    with checkpoints("whole") as whole:
        Story(checkpoints=whole).run(6, eval_every=2)
        assert whole.steps == [2, 6]
    with checkpoints("parts") as parts, pytest.raises(loop.Stopped):
        Story(checkpoints=parts, signal_in=signal_in).run(6, eval_every=2)
    with checkpoints("parts") as parts:
        restored = parts.restore({"steps": np.array([0])})
        assert restored.step == signal_in and not restored.notes["row"]["complete"]
        Story(checkpoints=parts).run(6, start=signal_in, eval_every=2, row=restored.notes["row"])
        assert parts.steps == [2, 6]
    with checkpoints("parts") as parts:
        assert not parts.is_best({"a/eval_loss": 2.0}) and parts.is_best({"a/eval_loss": 1.9})


def test_a_run_that_gets_more_steps_makes_up_for_the_evaluation_of_what_was_its_last():
    short, whole = Story(), Story()
    short.run(4, eval_every=2)
    longer = Story()
    longer.run(6, start=4, eval_every=2, row=short.saved[4][0]["row"])
    whole.run(6, eval_every=2)
    assert short.rows | longer.rows == whole.rows


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


@pytest.mark.parametrize("when", [{"stop_after": 2}, {"signal_in": 2}])
def test_a_stop_does_not_wait_for_an_evaluation(when):
    story = Story(**when)
    with pytest.raises(loop.Stopped, match="stopped after step 2 of 9"):
        story.run(9, eval_every=2)
    assert story.told[-2:] == ["log 2", "save 2"] and story.rows[2] == {"a/loss": 1}
    assert story.saved[2][0]["row"] == {"numbers": {"a/loss": 1, "a/skipped": 0}, "complete": False}


# What is not finite


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_logged_and_then_an_incident(number):
    story = Story(wrong={3: number})
    with pytest.raises(NonFinite, match="step 3"):
        story.run(9, save_every=1)
    assert list(story.saved) == [1, 2]  # from before
    assert list(story.rows) == [1, 2, 3]
    assert story.told[-2:] == ["incident 3: ['a/loss'], 0 skipped, state 3", "log 3"]


def test_an_update_that_was_left_out_is_an_incident_though_its_numbers_are_finite():
    """That of a step is read while the next one runs, which changes nothing either: its state is that one's."""
    story = Story(skips=(3, 4))
    with pytest.raises(NonFinite, match="step 3"):
        story.run(9)
    assert "incident 3: [], 1 skipped, state 4" in story.told


def test_where_updates_may_be_skipped_each_step_is_waited_for():
    story = Story(wrong={2: float("nan")}, skips=(2,))
    story.waits = True
    assert story.run(4).step == 4
    assert story.told == [
        "step 1", "log 1", "step 2", "incident 2: ['a/loss'], 1 skipped, state 2", "log 2",
        "step 3", "log 3", "step 4", "log 4", "save 4",
    ]  # fmt: skip


def test_an_evaluation_that_is_not_finite_ends_the_run():
    story = Story()
    story.evaluate = lambda state: Evaluation({"eval_loss": float("nan")})
    with pytest.raises(NonFinite, match="step 2: a/eval_loss not finite"):
        story.run(9, eval_every=2, save_every=1)
    assert list(story.saved) == [1]


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
def test_the_first_signal_asks_and_the_second_goes_to_the_handler_of_before(number, handled):
    """In a command, that ends the program at once (tests/test_command.py)."""
    with loop.stop_signal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and not handled
        os.kill(os.getpid(), number)
        assert handled == [number]


def test_a_signal_is_raised_where_it_may_be_and_kept_where_not(handled):
    with pytest.raises(loop.Stopped, match="SIGTERM"), loop.stop_signal() as stop, stop.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    reached = []
    with pytest.raises(loop.Stopped), loop.stop_signal() as stop, stop.at_once():
        with stop.later():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the step is saved")
            with pytest.raises(loop.Stopped), stop.at_once():
                reached.append("never: it has come already")
        reached.append("never: raised at the end of `later`")
    assert reached == ["the step is saved"]


def test_no_except_exception_eats_a_stop():
    assert not issubclass(loop.Stopped, Exception)


def test_handlers_are_put_back_whatever_happens(handled):
    with pytest.raises(ZeroDivisionError), loop.stop_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert handled == [signal.SIGTERM, signal.SIGINT]
