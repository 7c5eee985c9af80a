import contextlib
import dataclasses
import os
import signal
import types

import numpy as np
import pytest

from rlhf_jax.stages import Evaluation, Step, Times
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
    keep = first = None
    lr = np.arange(100) / 100

    def __init__(self, *, stop_after=None, wrong=None, skips=(), signal_in=None, best=(), checkpoints=None):
        self.told = []
        self.rows = {}  # step -> numbers, as logged last, without those of the machine
        self.used = {}  # step -> those of the machine
        self.saved = {}  # step -> (notes, numbers compared by)
        self.shown, self.notes = [], []
        self.texts = {}  # step -> samples, as logged
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
        return Evaluation({"loss": float(state.step)}, "details", (f"sample {state.step}",))

    def tokens(self, batch, numbers):
        assert numbers["loss"] and batch.startswith("batch")
        return 60

    def eligible(self, numbers):
        assert numbers.keys() == {"loss"}
        return True

    def write(self, step, numbers):
        self.told.append(f"log {step}")
        self.rows[step] = trained(numbers)
        self.used[step] = {name: value for name, value in numbers.items() if name.removeprefix("a/") in MACHINE}

    def update(self, step, numbers):
        assert self.rows[step].items() <= numbers.items()  # what is shown is what was logged

    def samples(self, *args):
        """The reporter's, and the log's."""
        if len(args) == 1:
            self.shown += args[0]
        elif args[2]:
            assert args[1] == "a"
            self.texts[args[0]] = args[2]

    def flush(self):
        self.told.append("flush")

    def note(self, text):
        self.notes.append(text)

    def save(self, step, state, notes, found):
        assert step == state.step and state.reference is None
        assert self.rows[step].items() <= notes["row"]["numbers"].items()
        assert self.told.pop() == "flush"  # what a resumed run will not log again is on the disk
        self.told.append(f"save {step}")
        row = notes["row"] | {"numbers": trained(notes["row"]["numbers"])}
        self.saved[step] = {"row": row}, found
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

    def evaluating(self):
        return self.at_once()

    @contextlib.contextmanager
    def at_once(self):
        if self():
            raise loop.Stopped
        self.raises = True
        yield
        self.raises = False


MACHINE = ("lr", "seconds", "seconds_collect", "seconds_reward", "seconds_learn", "tokens_per_second")
MACHINE += ("host_memory_gib", "device_memory_gib")


def trained(numbers):
    """What a row has of the training itself."""
    return {name: value for name, value in numbers.items() if name.removeprefix("a/") not in (*MACHINE, "skipped")}


def test_the_device_is_busy_with_a_step_while_the_one_before_is_read():
    story = Story()
    assert story.run(3).step == 3
    assert story.told == ["step 1", "step 2", "log 1", "step 3", "log 2", "log 3", "save 3"]


def test_the_last_step_is_saved_and_left_to_the_caller_to_evaluate():
    story = Story()
    story.run(6, eval_every=2, save_every=3)
    assert [line for line in story.told if "step" not in line] == [
        "evaluate 0", "log 0", "log 1", "evaluate 2", "log 2", "log 3", "save 3", "evaluate 4", "log 4", "log 5",
        "log 6", "save 6",
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
    story.eligible = lambda numbers: numbers["loss"] != 2
    story.run(6, eval_every=2)
    assert list(story.saved) == [4, 6] and story.rows[2]["a/eval_loss"] == 2
    story.run(6, eval_every=2, save_every=2)
    assert {step: found for step, (_, found) in story.saved.items()} == {2: None, 4: {"a/eval_loss": 4}, 6: None}
    assert story.saved[2][0]["row"] == {
        "numbers": {"a/loss": 1, "a/eval_loss": 2}, "complete": True,
    }  # fmt: skip


def test_what_an_evaluation_found_may_be_put_aside():
    """And its samples are shown."""
    found, story = [], Story()

    def keep(state, evaluation):
        found.append((state.step, evaluation.details))
        return state

    story.keep = keep
    story.run(6, eval_every=2)
    assert found == [(2, "details"), (4, "details")] and story.shown == ["sample 2", "sample 4"]
    assert story.texts == {step: (f"sample {step}",) for step in (0, 2, 4)}


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
    evaluated = {0: {"a/eval_loss": 0.0}, 2: {"a/loss": 1.0, "a/eval_loss": 2.0}}
    assert story.rows == evaluated | {1: {"a/loss": 0.5}, 3: {"a/loss": 1.5}}


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
    row = {"numbers": {"a/loss": 7, "a/eval_loss": 2}, "complete": True}
    assert notes["row"] == row and found["a/eval_loss"] == 2


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
    assert story.saved[2][0]["row"] == {"numbers": {"a/loss": 1}, "complete": False}


# Step 0


def test_the_evaluation_before_any_step_is_step_0():
    """Known already, it is not made again; and where there is none but the last, there is none at step 0."""
    story = Story()
    story.run(2, eval_every=2)
    assert story.told[:3] == ["evaluate 0", "log 0", "step 1"] and story.rows[0] == {"a/eval_loss": 0}
    known = Story()
    known.first = Evaluation({"loss": 7.0}, None, ("sample",))
    known.run(2)
    assert known.told[:2] == ["log 0", "step 1"]
    assert known.rows[0] == {"a/eval_loss": 7} and known.texts == {0: ("sample",)}
    never = Story()
    never.run(2)
    assert 0 not in never.rows


def test_a_signal_before_any_step_stops_the_run_and_leaves_nothing():
    story = Story(signal_in=0)
    with pytest.raises(loop.Stopped, match="stopped after step 0 of 9"):
        story.run(9, eval_every=2)
    assert story.told == ["evaluate 0"] and not story.rows


# What a step used


class Timed(Story):
    """A device that needs 10 s a step, one after another. The host needs 1 s for a batch, and 100 s to evaluate."""

    now = ready = 100.0
    parts = None  # of an iteration: seconds until it is sampled, and scored

    def batch_at(self, step):
        self.now += 1
        return super().batch_at(step)

    def step(self, state, batch):
        done = super().step(state, batch)
        before, self.ready = self.ready, max(self.now, self.ready) + 10
        loss, ready = Loss(), self.ready
        loss.wait = lambda: setattr(self, "now", max(self.now, ready))
        if not self.parts:
            return done._replace(numbers=done.numbers | {"loss": loss})
        collected, rewarded = (self.ready - 10 + seconds for seconds in self.parts)
        self.now = max(self.now, rewarded)  # the host has seen it
        return done._replace(numbers=done.numbers | {"loss": loss}, times=Times(before, collected, rewarded))

    def evaluate(self, state):
        self.now += 100
        return super().evaluate(state)


class Loss:
    """A number that the device is not done with."""

    def __float__(self):
        self.wait()
        return 0.5


@pytest.fixture
def timed(monkeypatch):
    story = Timed()
    monkeypatch.setattr(loop.time, "monotonic", lambda: story.now)
    return story


def test_seconds_are_those_of_the_device_without_evaluations(timed):
    """The batch of the first step, and of the first after an evaluation, is fetched while the device waits."""
    timed.run(5, eval_every=3)
    assert [timed.used[step]["a/seconds"] for step in range(1, 6)] == [11, 10, 10, 11, 10]
    assert [timed.used[step]["a/tokens_per_second"] for step in (1, 2)] == [5.455, 6]
    assert timed.used[0] == {} and all(used["a/host_memory_gib"] > 0.01 for step, used in timed.used.items() if step)


def test_an_iteration_has_three_parts(timed):
    """Sampled after 6 of 10 s, scored after 7. The first and the fourth wait for their prompts too."""
    timed.parts = (6, 7)
    timed.run(5, eval_every=3)
    parts = [[timed.used[step][f"a/seconds_{part}"] for part in ("collect", "reward", "learn")] for step in range(1, 6)]
    assert parts == [[7, 1, 3], [6, 1, 3], [6, 1, 3], [7, 1, 3], [6, 1, 3]]
    assert [timed.used[step]["a/seconds"] for step in range(1, 6)] == [11, 10, 10, 11, 10]


def test_the_learning_rate_is_that_of_the_first_update_of_a_step_and_a_skipped_one_does_not_move_it():
    """Here 100 updates of 50 steps, two a step."""
    story = Story(skips=(2,))
    story.waits = True
    story.run(50)
    assert [story.used[step]["a/lr"] for step in (1, 2, 3, 50)] == [0, 0.02, 0.02, 0.96]


def test_a_step_that_learns_nothing_uses_nothing():
    story = Story()
    step = story.step
    story.step = lambda state, batch: step(state, batch)._replace(numbers={"alarms": 1})
    story.run(2)
    assert story.used == {1: {}, 2: {}} and story.rows[1] == {"a/alarms": 1}


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
    story.evaluate = lambda state: Evaluation({"loss": float("nan")})
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
