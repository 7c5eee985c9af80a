"""Which stage of a run is at fault? Its recorded numbers beside the ranges of healthy runs, and what to do.

Nothing is computed anew: the numbers are those of metrics.jsonl and summary.json of each stage, and those of the last
`experiments/evaluate.py` where there are any.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import jsonfile
from rlhf_jax.algorithms import POLICY
from rlhf_jax.commands.evaluate import FOLDER
from rlhf_jax.errors import InputError

PASS, WARN, FAIL = "pass", "warn", "FAIL"
LAST = 0.2  # share of a stage's steps that its last values are means of


class Finding(NamedTuple):
    """One number of a stage."""

    stage: str
    name: str
    verdict: str  # PASS, WARN or FAIL
    value: float
    healthy: str  # the range of PASS
    advice: str  # what to do where it is not PASS


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage has recorded. Names have no stage before them."""

    name: str
    rows: list[dict]
    summary: dict
    reward_model: dict  # of the last evaluation, or empty

    def values(self, name) -> np.ndarray:
        """A metric at every step that has it."""
        return np.array([row[name] for row in self.rows if isinstance(row.get(name), int | float)], np.float64)

    def last(self, name) -> float | None:
        """The mean of a metric over the last steps; None where it was not recorded."""
        values = self.values(name)
        return float(values[-max(int(len(values) * LAST), 1) :].mean()) if len(values) else None

    def number(self, name) -> float | None:
        """A number of the summary, or None."""
        value = self.summary.get(name)
        return float(value) if isinstance(value, int | float) else None

    def change(self, name, before) -> float | None:
        """The share of its first value that a number of the summary has in the end."""
        first, last = self.number(f"{name}{before}"), self.number(name)
        return last / first if first and last is not None else None


def examine(workdir) -> list[Finding]:
    """The findings of every finished stage of a run, in order. Raises InputError where there is none."""
    workdir = Path(workdir).expanduser()
    config, found = configs.read(workdir), []
    for name in configs.stages(config):
        folder = configs.place(config, workdir, name) / name
        if not (folder / "summary.json").exists():
            continue
        stage = _read(folder, name, workdir / FOLDER)
        rules = _language_model if name in ("pretrain", "sft") else _reward_model if name == "reward" else _rl
        found += list(rules(stage, config))
    if not found:
        raise InputError(f"{workdir}: expected a run with a finished stage; there is none yet")
    return found


def verdict(findings: list[Finding]) -> str:
    """One line: the stage to look at first, which is the earliest with the worst finding."""
    for worst in (FAIL, WARN):
        for finding in findings:
            if finding.verdict == worst:
                return f"{finding.stage} first: {finding.name} is {finding.value:.3g}, expected {finding.healthy}"
    return "healthy: every number is in its range"


def show(findings: list[Finding], reporter) -> None:
    """Prints the findings as a table, advice on those that are not healthy, and the verdict."""
    rows = [(f"{each.stage}  {each.name}", each.verdict, each.value, each.healthy) for each in findings]
    reporter.table(("", "", "value", "healthy"), rows)
    for each in findings:
        if each.verdict != PASS:
            reporter.note(f"{each.verdict}  {each.stage}  {each.name}: {each.advice}")
    reporter.note(verdict(findings))


def _read(folder, name, evaluations) -> Stage:
    def plain(row):
        return {key.removeprefix(f"{name}/"): value for key, value in row.items()}

    rows = [plain(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = sorted(evaluations.glob("*.json"), key=lambda path: path.stat().st_mtime)  # of completions, too
    found = [numbers for path in results if (numbers := jsonfile.read(path).get("reward_model"))]
    return Stage(name, rows, plain(jsonfile.read(folder / "summary.json")), found[-1] if found else {})


def _finding(stage, name, value, passes, warns, healthy, advice) -> Iterator[Finding]:
    """The finding of a value, if it was recorded. passes, warns: whether it is healthy, or not so bad."""
    if value is not None:
        word = PASS if passes(value) else WARN if warns(value) else FAIL
        yield Finding(stage.name, name, word, value, healthy, advice)


def _least(stage, name, value, good, bad, advice):
    yield from _finding(stage, name, value, lambda x: x >= good, lambda x: x >= bad, f"{good:g} or more", advice)


def _most(stage, name, value, good, bad, advice):
    yield from _finding(stage, name, value, lambda x: x <= good, lambda x: x <= bad, f"{good:g} or less", advice)


def _language_model(stage, config) -> Iterator[Finding]:
    """Pretraining and fine-tuning: it has learned, it has not learned by heart, and its texts end."""
    losses = stage.values("eval_loss")
    if len(losses) > 1:
        fell = losses[-1] / losses[0]
        yield from _most(stage, "loss, share of the first", fell, 0.95, 1.0, f"more {stage.name}.steps or a larger lr")
        rise = losses[-1] / losses.min()
        yield from _most(stage, "loss, share of its least", rise, 1.05, 1.2, "fewer steps, more rows or a smaller lr")
    if config.task != "write":  # its texts are cut from longer ones
        advice = "do the labels end, and do they fit in data.response_length? More steps teach EOS"
        yield from _least(stage, "eos_rate", stage.number("eos_rate"), 0.9, 0.5, advice)


def _reward_model(stage, config) -> Iterator[Finding]:
    """It agrees with held-out labels, more than length does, and is as sure as it is right."""
    interval = stage.summary.get("accuracy_ci95")
    if interval:
        advice = "are the labels consistent, and are there enough pairs? A larger model, more steps"
        yield from _least(stage, "accuracy, lower end", float(interval[0]), 0.55, 0.5, advice)
    losses = stage.values("eval_loss")
    if len(losses) > 1:
        rise = losses[-1] / losses.min()
        yield from _most(stage, "loss, share of its least", rise, 1.1, 1.3, "fewer steps: it is over-confident")
    numbers = {name: each["value"] for name, each in stage.reward_model.items()}
    if numbers:
        by_length = max(numbers["accuracy_of_longer"], numbers["accuracy_of_shorter"])
        advice = "it knows no more than the length of a text; balance the lengths of the pairs"
        yield from _least(stage, "accuracy above length's", numbers["accuracy"] - by_length, 0.02, 0.0, advice)
        advice = "fewer steps or more pairs: its margins are too large for how often it is right"
        yield from _most(stage, "temperature", numbers["temperature"], 2.0, 4.0, advice)
        advice = "it reads the summary alone: pairs whose texts fit other posts too teach no more"
        yield from _least(stage, "prefers the own post", numbers["accuracy_prefers_own_prompt"], 0.6, 0.5, advice)


def _rl(stage, config) -> Iterator[Finding]:
    """It begins at the reference, stays near it, and what it gains is worth something to the judge, too."""
    before = "_before" if config.task == "write" else "_sft"
    first = stage.values("kl_exact")[:1]
    if len(first):
        advice = "the first policy is not the reference: are both scored at the same temperature?"
        yield from _most(stage, "exact KL of the first rollout, nats", float(abs(first[0])), 1e-4, 1e-2, advice)
    limit = config.alarms.kl_exact or 15.0
    advice = f"a larger {stage.name}.kl_coef, a smaller lr or fewer steps"
    yield from _most(stage, "exact KL, nats", stage.number("kl_exact"), limit, 2 * limit, advice)
    if stage.last("clip_fraction") is not None:
        yield from _most(stage, "clip fraction", stage.last("clip_fraction"), 0.2, 0.4, "a smaller lr or fewer epochs")
    if config.algorithm in POLICY and POLICY[config.algorithm].NEEDS_VALUE:
        advice = f"{stage.name}.value_init=reward, a larger value coefficient or lr"
        yield from _least(stage, "explained variance", stage.last("explained_variance"), 0.1, 0.0, advice)
    collapse = "the policy writes the same again and again: a larger kl_coef, or alarms that end the learning"
    if config.task != "arithmetic":  # the right answer is certain
        yield from _least(stage, "entropy, share of the first", stage.change("entropy", before), 0.3, 0.1, collapse)
    length = stage.change("length", before)
    yield from _finding(
        stage, "length, share of the first", length, lambda x: 0.5 <= x <= 2, lambda x: 0.25 <= x <= 4, "0.5 to 2",
        "does the reward prefer long or short texts? See length_correlation in experiments/evaluate.py",
    )  # fmt: skip
    if config.task != "write":
        yield from _least(
            stage, "eos_rate", stage.number("eos_rate"), 0.9, 0.5, f"{stage.name}.missing_eos punishes it"
        )
    yield from _most(stage, "repeat_rate", stage.number("repeat_rate"), 0.05, 0.2, collapse)
    yield from _gains(stage)


def _gains(stage) -> Iterator[Finding]:
    """The reward rises, and the judge's score with it."""
    intervals = {name: stage.summary.get(f"{name}_ci95") for name in ("score", "reward", "gold")}
    trained = intervals["score"] or intervals["reward"]
    if trained:
        advice = f"more {stage.name}.steps, a larger lr or a smaller kl_coef"
        yield from _least(stage, "gain in reward, lower end", float(trained[0]), 0.0, -np.inf, advice)
    if intervals["gold"] and trained is not intervals["gold"]:
        advice = "the reward rises and the truth does not: the reward model is at fault, or kl_coef is too small"
        yield from _least(stage, "gain in gold, lower end", float(intervals["gold"][0]), 0.0, -0.02, advice)
