"""A run's console output; the only module that prints.

On a terminal a stage is a progress bar above its last metrics, updated in place. Anywhere else, such as a file or a CI
log, it is a plain line now and then, without bars or control characters.
"""

import contextlib
import math
import sys
import threading
import time
from collections import deque
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

# The metrics shown, in this order and without the stage before the slash; metrics.jsonl has all of them.
SHOWN = (
    "loss",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "score",
    "eval_score",
    "gold",
    "eval_gold",
    "eval_judge",
    "reward",
    "eval_reward",
    "distinct2",
    "repeat_rate",
    "alarms",
    "kl",
    "entropy",
    "clip_fraction",
    "length",
    "eos_rate",
    "lr",
)
SAMPLE_NUMBERS = "score", "kl", "total", "gold"
PROMPT_TAIL, COMPLETION_HEAD = 240, 480  # characters of a sample that are shown
SLOW = 2.0  # seconds that are waited before a progress bar says what for
LINE_EVERY = 15.0  # seconds between plain lines; a line also follows each tenth of a stage
PACE_STEPS = 50  # the pace is the mean of this many last steps: some are slow
PLAIN_WIDTH = 120  # columns where there is no terminal


class Reporter:
    """Reports stages to `stream`, standard output by default, and restores the terminal, even after an exception.

    with Reporter() as reporter:
        reporter.stage("sft", 600)
        reporter.update(1, {"sft/loss": 2.3})  # one step is done
        reporter.finish("held-out loss 1.92")
    """

    def __init__(self, stream=None):
        stream = stream or sys.stdout
        terminal = stream.isatty()
        width = None if terminal else PLAIN_WIDTH
        self._console = Console(file=stream, force_terminal=terminal, force_jupyter=False, width=width, highlight=False)
        self._redraws = terminal and not self._console.is_dumb_terminal
        self._stage: Any = None  # a _Stage while one is in progress
        self._live: Live | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._close()

    def stage(self, name, total_steps, start=0):
        """Begins a stage of `total_steps` steps; a resumed run has already done `start` of them."""
        self._close()
        self._stage = _Stage(name, total_steps, start)
        self._printed = time.monotonic()
        if self._redraws:
            self._live = Live(get_renderable=self._stage.panel, console=self._console, transient=True)
            self._live.start()
        else:
            self.note(self._stage.line())

    def update(self, step, metrics):
        """Shows that `step` steps are done; `metrics`, {name: float or 0-d array}, are those of the last one."""
        tenth = self._stage.tenth
        self._stage.update(step, metrics)
        due = self._stage.tenth > tenth or time.monotonic() - self._printed >= LINE_EVERY
        if due and not self._redraws:
            self._printed = time.monotonic()
            self.note(self._stage.line())

    @contextlib.contextmanager
    def waiting(self, what):
        """Inside it, if that takes long, the progress says what the run waits for, and since when."""
        since, stage = time.monotonic(), self._stage
        done = threading.Event()

        def remind():
            while not done.wait(LINE_EVERY):
                line = [stage.line()] if stage else []
                self.note("  ".join([*line, f"waits for {what}, {duration(time.monotonic() - since)}"]))

        if self._redraws:
            if stage:
                stage.waiting = (what, since)
        else:
            threading.Thread(target=remind, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            if stage:
                stage.waiting = None

    def finish(self, note=""):
        """Ends the stage, and prints how long it took and `note`."""
        stage = self._stage
        self._close()
        self.note(f"{stage.name}  done in {duration(time.monotonic() - stage.began)}  {note}".rstrip())

    def note(self, text):
        """Prints one line."""
        self._console.print(Text(self._visible(text)), soft_wrap=True)

    def samples(self, rows):
        """Prints completions: dicts with "prompt", "completion" and any of "score", "kl", "total", "gold"."""
        for row in rows:
            grid = Table.grid("", Column(overflow="fold"), padding=(0, 2))
            numbers = "  ".join(f"{name} {number(row[name])}" for name in SAMPLE_NUMBERS if name in row)
            prompt, completion = row["prompt"], row["completion"]
            prompt = "..." * (len(prompt) > PROMPT_TAIL) + prompt[-PROMPT_TAIL:]
            completion = completion[:COMPLETION_HEAD] + "..." * (len(completion) > COMPLETION_HEAD)
            grid.add_row(Text("prompt", "dim"), Text(self._visible(prompt), "dim"))
            grid.add_row(Text("completion", "dim"), Text(self._visible(completion), "bold"))
            self._print(Group(Text(f"sample  {numbers}", "cyan"), grid, ""))

    def before_after(self, table):
        """Prints rows (name, before, after, change, (low, high) of the change); None is an unknown number."""
        grid = self._grid(("", "before", "after", "change", "95% interval"))
        for name, before, after, change, interval in table:
            between = "-" if interval is None else f"{number(interval[0], '+')} to {number(interval[1], '+')}"
            grid.add_row(Text(self._visible(name)), number(before), number(after), number(change, "+"), between)
        self._print(grid)

    def table(self, header, rows):
        """Prints rows of texts and numbers under a header."""
        grid = self._grid(header)
        for row in rows:
            grid.add_row(*(Text(self._visible(cell)) if isinstance(cell, str) else number(cell) for cell in row))
        self._print(grid)

    def _grid(self, header):
        grid = Table(*header, box=box.SIMPLE_HEAD if self._redraws else None, pad_edge=False)
        for column in grid.columns[1:]:
            column.justify = "right"
        return grid

    def _visible(self, text):
        """`text` on one line, escaped where the stream cannot encode it or where it would move the cursor."""
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return text.encode(self._console.encoding, "backslashreplace").decode(self._console.encoding)

    def _print(self, renderable):
        if self._redraws:
            self._console.print(renderable)
        else:  # strips the spaces that pad each line to the table's width
            with self._console.capture() as capture:
                self._console.print(renderable)
            for line in capture.get().splitlines():
                self.note(line.rstrip())

    def _close(self):
        if self._live:
            self._live.stop()
            self.note(self._stage.line())  # the bar is gone; this line keeps its last metrics
        self._stage = self._live = None


class Silent:
    """A Reporter that prints nothing, for tests and for use as a library."""

    def __enter__(self):
        return self

    def _nothing(self, *args, **kwargs):
        pass

    def waiting(self, what):
        return contextlib.nullcontext()

    __exit__ = stage = update = finish = note = samples = before_after = table = _nothing


class _Stage:
    """A stage's progress, pace and last metrics."""

    def __init__(self, name, total, start):
        self.name, self.total, self.step, self.start = name, total, start, start
        self.began = time.monotonic()
        self._marks: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)  # (step, seconds)
        self._numbers = {}
        self.waiting: tuple[str, float] | None = None  # for what, and since when

    def update(self, step, metrics):
        self.step = step
        if step > self.start:  # else it is an evaluation before the first step, which compiles
            self._marks.append((step, time.monotonic()))
        # A new dict, because another thread renders the bar. An evaluation's metrics stay until the next one.
        self._numbers = self._numbers | {name.split("/")[-1]: float(value) for name, value in metrics.items()}

    @property
    def tenth(self):
        return 10 * self.step // max(self.total, 1)

    def numbers(self):
        last = self._numbers
        return [f"{name} {number(last[name])}" for name in SHOWN if name in last]

    def pace(self):
        """["0.21 s/step", "1m42s left"], or [] before the second step: the first one compiles."""
        if len(self._marks) < 2:
            return []
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        seconds = (ended - began) / max(last - first, 1)
        return [f"{number(seconds)} s/step", f"{duration(seconds * (self.total - self.step))} left"]

    def line(self):
        return "  ".join([self.name, f"{self.step}/{self.total}", *self.numbers(), *self.pace()])

    def panel(self):
        head = Table.grid("", "", "", padding=(0, 2))
        bar = ProgressBar(total=max(self.total, 1), completed=self.step, width=30, complete_style="cyan")
        waiting = self.waiting  # another thread ends it
        seconds = time.monotonic() - waiting[1] if waiting else 0
        waits = [f"waits for {waiting[0]}, {duration(seconds)}"] if waiting and seconds > SLOW else self.pace()
        head.add_row(Text(self.name, "bold"), bar, "  ".join([f"{self.step}/{self.total}", *waits]))
        return Group(head, Columns(map(Text, self.numbers()), padding=(0, 3)))


def number(value, sign=""):
    """About three digits: 2.31, 0.783, 12.4, 512, 1.9e-3. `sign` "+" signs positive numbers too; None is "-"."""
    if value is None:
        return "-"
    size = abs(value)
    if size and not 0.01 <= size < 1e5 and math.isfinite(value):
        mantissa, exponent = f"{value:{sign}.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = 0 if size == 0 or size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:{sign}.{decimals}f}"


def duration(seconds):
    """45s, 1m42s, 2h05m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
