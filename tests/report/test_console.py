import inspect
import io
import re
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from rlhf_jax.report import console
from rlhf_jax.report.console import Reporter, Silent, duration, number

SAMPLE = {"prompt": "POST: it broke\n\nTL;DR:", "completion": " she broke it", "score": 1.25, "kl": 4.5, "total": 1.025}
ESCAPE = "\x1b"
SHOW_CURSOR = "\x1b[?25h"
ERASE_LINE = "\x1b[2K"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, in seconds, as a list of one number to set."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def lines(stream):
    return stream.getvalue().splitlines()


def plain(text):
    """What is left on a screen's lines: the text without its escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def whole_run(reporter):
    with reporter:
        reporter.note("sft: finished, skipped")
        reporter.stage("ppo", 20, start=5)
        for step in range(6, 21):
            reporter.update(step, {"ppo/score": step / 10, "ppo/kl": 3.0})
        reporter.samples([SAMPLE] * 3)
        reporter.finish("score 2.00")
        reporter.before_after([("gold", 0.5, 0.75, 0.25, (0.2, 0.3))])


def test_plain_lines_have_no_control_characters():
    stream = io.StringIO()
    whole_run(Reporter(stream))
    assert all(line.isprintable() and line == line.rstrip() for line in lines(stream))
    assert lines(stream)[:2] == ["sft: finished, skipped", "ppo  5/20"]
    assert "ppo  20/20  score 2.00  kl 3.00" in stream.getvalue()


def test_a_plain_line_each_tenth_with_pace_and_time_left(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.stage("sft", 600)
    clock[0] += 40  # the first step compiles; its pace is not that of the others
    for step in range(1, 122):
        clock[0] += 0.1
        reporter.update(step, {"sft/loss": jnp.float32(2.3125), "sft/lr": 1.9e-3, "sft/grad_norm": 1.0})
    assert lines(stream) == [
        "sft  0/600",
        "sft  1/600  loss 2.31  lr 1.9e-3",  # 40 s without a line
        "sft  60/600  loss 2.31  lr 1.9e-3  0.100 s/step  54s left",
        "sft  120/600  loss 2.31  lr 1.9e-3  0.100 s/step  48s left",
    ]


def test_slow_steps_are_reported_every_fifteen_seconds(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.stage("ppo", 1000)
    for step in range(1, 7):
        clock[0] += 5
        reporter.update(step, {})
    assert [line.split()[1] for line in lines(stream)] == ["0/1000", "3/1000", "6/1000"]


def test_what_is_waited_for_is_said_now_and_then(monkeypatch):
    """A reward that asks a slow service is no run that hangs."""
    monkeypatch.setattr(console, "LINE_EVERY", 0.01)
    stream = io.StringIO()
    with Reporter(stream) as reporter:
        with reporter.waiting("the reward of 4 texts"):  # before the first step
            time.sleep(0.05)
        reporter.stage("ppo", 3)
        with reporter.waiting("the reward of 4 texts"):
            time.sleep(0.05)
        count = len(lines(stream))
        time.sleep(0.05)
    assert lines(stream)[0] == "waits for the reward of 4 texts, 0s"
    assert lines(stream)[count - 1] == "ppo  0/3  waits for the reward of 4 texts, 0s"
    assert len(lines(stream)) == count


def test_a_bar_says_what_is_waited_for(terminal, clock):
    reporter = Reporter(terminal)
    with reporter:
        reporter.stage("ppo", 3)
        shown = io.StringIO()
        with reporter.waiting("the reward of 4 texts"):
            for seconds in 1, 11:
                clock[0] += seconds
                Console(file=shown, width=100).print(reporter._stage.panel())
        Console(file=shown, width=100).print(reporter._stage.panel())
    heads = [line.split("0/3")[1].strip() for line in shown.getvalue().splitlines() if "0/3" in line]
    assert heads == ["", "waits for the reward of 4 texts, 12s", ""]


def test_the_pace_is_that_of_the_last_steps(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.stage("ppo", 200)
    for step in range(1, 101):
        clock[0] += 10 if step <= 50 else 1
        reporter.update(step, {})
    assert lines(stream)[-1] == "ppo  100/200  1.00 s/step  1m40s left"


def test_the_pace_leaves_out_the_first_step_of_this_start(clock):
    """It compiles; before it, the evaluation of step 0 or the row of the checkpoint is shown."""
    for start in 0, 5:
        stream = io.StringIO()
        reporter = Reporter(stream)
        reporter.stage("ppo", start + 10, start=start)
        for step, seconds in enumerate((1, 40, 2, 2), start=start):
            clock[0] += seconds
            reporter.update(step, {})
        assert lines(stream)[-1].endswith("2.00 s/step  14s left")


def test_an_evaluation_stays_until_the_next_one():
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.stage("sft", 10)
    reporter.update(1, {"sft/loss": 3.0, "sft/eval_loss": 2.5})
    reporter.update(2, {"sft/loss": 2.0})
    assert lines(stream)[-1].startswith("sft  2/10  loss 2.00  eval_loss 2.50")


def test_finish_prints_how_long_it_took(clock):
    stream = io.StringIO()
    reporter = Reporter(stream)
    reporter.stage("sft", 10)
    clock[0] += 123
    reporter.finish("held-out loss 1.92")
    assert lines(stream)[-1] == "sft  done in 2m03s  held-out loss 1.92"


def test_a_terminal_has_a_bar_that_is_gone_at_the_end(terminal):
    whole_run(Reporter(terminal))
    text = terminal.getvalue()
    assert "━" in text and "score 2.00" in plain(text)
    assert text.rindex("━" * 30) < text.rindex(SHOW_CURSOR) < text.rindex(ERASE_LINE) < text.rindex("ppo  20/20")
    assert "ppo  12/20" not in text  # the bar is enough
    assert "ppo  done in" in text and "gold" in text


def test_an_exception_restores_the_terminal_and_leaves_the_last_numbers(terminal):
    with pytest.raises(KeyboardInterrupt), Reporter(terminal) as reporter:
        reporter.stage("sft", 10)
        reporter.update(3, {"sft/loss": 2.0})
        raise KeyboardInterrupt
    assert SHOW_CURSOR in terminal.getvalue()
    assert plain(lines(terminal)[-1]) == "sft  3/10  loss 2.00"


def test_a_terminal_that_cannot_redraw_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    whole_run(Reporter(terminal))
    assert ESCAPE not in terminal.getvalue() and "ppo  12/20" in terminal.getvalue()


def test_a_sample_is_the_end_of_the_prompt_and_the_completion(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")  # a terminal's width does not matter to a file
    stream = io.StringIO()
    Reporter(stream).samples([SAMPLE | {"prompt": "x" * 1000 + " TL;DR:", "completion": "y" * 1000}])
    text = stream.getvalue()
    assert lines(stream)[0] == "sample  score 1.25  kl 4.50  total 1.02"
    assert text.count("x") == console.PROMPT_TAIL - len(" TL;DR:") and "TL;DR:" in text
    assert text.count("y") == console.COMPLETION_HEAD
    assert max(map(len, lines(stream))) == console.PLAIN_WIDTH


@pytest.mark.parametrize("is_terminal", [False, True])
def test_text_of_a_model_cannot_control_the_terminal(is_terminal, terminal):
    stream = terminal if is_terminal else io.StringIO()
    hostile = "[red]a[/red] [/] :smile: \x1b[2J\r\n\t\x07\u202e\ud800"
    Reporter(stream).samples([SAMPLE | {"prompt": hostile, "completion": hostile}])
    shown = r"[red]a[/red] [/] :smile: \x1b[2J\r\n\t\x07\u202e\ud800"
    assert plain(stream.getvalue()).count(shown) == 2
    assert "\x1b[2J" not in stream.getvalue()


def test_what_the_stream_cannot_encode_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Reporter(stream).samples([SAMPLE | {"completion": "naïve \N{PARTY POPPER}"}])
    whole_run(Reporter(stream))
    assert rb"na\xefve \U0001f389" in raw.getvalue()


def test_before_and_after_are_aligned():
    stream = io.StringIO()
    gold = "gold", 0.529, 0.577, 0.048, (0.03, 0.066)
    Reporter(stream).before_after([gold, ("win rate", None, 0.58, None, None), ("[kl]", 0, 11, 11, None)])
    assert lines(stream) == [
        "          before  after  change      95% interval",
        "gold       0.529  0.577  +0.048  +0.030 to +0.066",
        "win rate       -  0.580       -                 -",
        "[kl]           0   11.0   +11.0                 -",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.3125, "2.31"), (0.7834, "0.783"), (12.44, "12.4"), (512.3, "512"), (0.0019, "1.9e-3"), (1234567.0, "1.2e6"),
     (0, "0"), (-0.5, "-0.500"), (99.96, "100.0"), (None, "-"), (float("nan"), "nan"), (float("-inf"), "-inf")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_number_with_its_sign():
    assert [number(value, "+") for value in (0.048, -0.048, 3e-5)] == ["+0.048", "-0.048", "+3.0e-5"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (45, "45s"), (102, "1m42s"), (59.7, "1m00s"), (7500, "2h05m"), (3599.9, "1h00m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_silent_has_every_method_of_a_reporter_and_prints_nothing(capfd):
    whole_run(Silent())
    methods = [name for name, _ in inspect.getmembers(Reporter, inspect.isfunction) if not name.startswith("_")]
    assert methods and all(hasattr(Silent, name) for name in methods)
    assert capfd.readouterr() == ("", "")
