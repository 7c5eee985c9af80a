"""Which stage of a run is at fault? Its numbers beside the ranges of healthy runs, and what to do.

`examine` computes nothing anew: it reads metrics.jsonl and summary.json of each stage, and the last result of
`experiments/evaluate.py` where there is one. `best_of` samples the policy that reinforcement learning began with, and
its findings tell a bad reward from a bad optimizer:

    a reward's best of n has a higher score by the reward but not by the judge    -> the reward is at fault
    it has a higher score by the judge, and reinforcement learning does not       -> reinforcement learning
    not even the judge's own best of n is better than one sample                  -> fine-tuning
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import jsonfile
from rlhf_jax.algorithms import POLICY
from rlhf_jax.commands import evaluate, generate
from rlhf_jax.commands.evaluate import FOLDER
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import interval
from rlhf_jax.report import metrics

PASS, WARN, FAIL = "pass", "warn", "FAIL"
LAST = 0.2  # share of a stage's steps that its last values are means of
N, PROMPTS = 16, 32  # samples of a prompt, and prompts, of `best_of`
TRIAL = "best_of.json"  # what it found, in workdir/evaluation

# Where a healthy range comes from.
DEFINED, CHANCE = "by definition", "chance"
RUNS = "healthy runs of the configs here"
CLIP = "PPO on TL;DR, first update: .07 (arXiv 2403.17031)"
CALIBRATION = "1 is calibrated (Guo et al. 2017)"


class Finding(NamedTuple):
    """One number of a stage."""

    stage: str
    name: str
    verdict: str  # PASS, WARN or FAIL
    value: float
    healthy: str  # the range of PASS
    source: str  # where that range comes from
    advice: str  # what to do where it is not PASS

    @property
    def line(self) -> str:
        """The finding in one line, with the advice where it is not PASS."""
        said = f"doctor  {self.verdict}  {self.stage}  {self.name}: {self.value:.3g} (healthy: {self.healthy})"
        return said if self.verdict == PASS else f"{said}; {self.advice}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage has recorded. Names have no stage before them."""

    name: str
    rows: list[dict]
    summary: dict
    reward_model: dict  # of the last evaluation, or empty

    def values(self, name) -> np.ndarray:
        """A metric at every step that has it as a finite number."""
        values = np.array([row[name] for row in self.rows if name in row], np.float64)
        return values[np.isfinite(values)]

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
    config = configs.read(workdir)
    found = [each for name in configs.stages(config) for each in of_stage(config, workdir, name)]
    if not found:
        raise InputError(f"{workdir}: expected a run with a finished stage; there is none yet")
    return found


def of_stage(config, workdir: Path, name: str) -> list[Finding]:
    """The findings of one stage of a run; none where it is not finished."""
    folder = configs.place(config, workdir, name) / name
    if not (folder / "summary.json").exists():
        return []
    rules = _language_model if name in ("pretrain", "sft") else _reward_model if name in configs.REWARD_MODELS else _rl
    return list(rules(_read(folder, name, workdir / FOLDER), config))


def verdict(findings: list[Finding], trial: Sequence[Finding] = ()) -> str:
    """One line: the stage to look at first, which is the earliest with the worst finding.

    trial: those of `best_of`. Where all of them pass, warnings are no fault: the policy has gained by the judge.
    """
    every = [*findings, *trial]
    order = {name: i for i, name in enumerate(dict.fromkeys(each.stage for each in every))}
    every.sort(key=lambda each: order[each.stage])
    for worst in (FAIL, WARN):
        wrong = [each for each in every if each.verdict == worst]
        if wrong and worst == WARN and trial:
            last = trial[-1]
            return f"healthy by the judge, warnings: {len(wrong)}; {last.name} is {last.value:.3g}"
        if wrong:
            return f"{wrong[0].stage} first: {wrong[0].name} is {wrong[0].value:.3g}, expected {wrong[0].healthy}"
    return "healthy: every number is in its range"


def show(findings: list[Finding], reporter, trial: Sequence[Finding] = ()) -> None:
    """Prints the findings as a table, advice on those that are not healthy, and the verdict."""
    every = [*findings, *trial]
    rows = [(f"{each.stage}  {each.name}", each.verdict, each.value, each.healthy, each.source) for each in every]
    reporter.table(("", "", "value", "healthy", "source"), rows)
    for each in every:
        if each.verdict != PASS:
            reporter.note(f"{each.verdict}  {each.stage}  {each.name}: {each.advice}")
    reporter.note(verdict(findings, trial))


def best_of(workdir, *, n: int = N, prompts: int = PROMPTS, judge: str = "", reporter=None) -> list[Finding]:
    """Findings of best-of-n by the policy before reinforcement learning: is it the reward, or what optimizes it?

    judge: what says how good a text is, one of `evaluate.Settings.judge` that gives a number; empty: gold, the hold-out
    judge, or the reward itself where that is a function. No findings where there is no judge, or no stage before
    reinforcement learning. Samples are kept in workdir/evaluation. Raises InputError.
    """
    workdir = Path(workdir).expanduser()
    config = configs.read(workdir)
    stages = evaluate.finished(config, workdir)
    last = configs.rl_name(config)
    if last not in stages or len(stages) < 2:
        return []
    before = stages[stages.index(last) - 1]
    temperature = getattr(config.rl, "temperature", config.evaluation.temperature)
    settings = evaluate.Settings(stage=before, rows=prompts, temperature=temperature)
    model = rlhf_jax.load(workdir, before)
    run = evaluate.opened(workdir, config, model, settings, repeat=n, reporter=reporter)
    name = judge or next((name for name in run.scores if name != "learned"), "")
    if not name:
        return []
    score = run.score_of(name)
    if score is None:
        raise InputError(f"judge: expected one that gives a text a number, got the program {name!r}")

    def scored(stage):
        """(by the reward or None, by the judge), each [prompts, n], of the texts of a stage."""
        made = run.completions(workdir, stage)
        texts = [each["completion"] for each in made]
        by_judge_N = np.asarray(score(texts), np.float64)
        by_reward_N = run.rewarded(made) if config.learned else None
        return by_reward_N if by_reward_N is None else by_reward_N.reshape(-1, n), by_judge_N.reshape(-1, n)

    reward_QO, judge_QO = scored(before)
    _, after_QO = scored(last)
    references_Q = None
    if run.labelled and name != "rouge":  # a reference is its own best text by ROUGE
        references_Q = np.asarray(score([row["label"] for row in run.rows])).reshape(-1, n)[:, 0]
    found = list(_trial(before, last, name, n, reward_QO, judge_QO, after_QO, references_Q))
    record = {"run": _weights(workdir), "findings": [each._asdict() for each in found]}
    metrics.summarize(workdir / FOLDER / TRIAL, record)
    return found


def tried(workdir) -> list[Finding]:
    """What `best_of` has found of these weights; nothing where it was not called since."""
    path = Path(workdir).expanduser() / FOLDER / TRIAL
    record = jsonfile.read(path) if path.exists() else {}
    if record.get("run") != _weights(workdir):
        return []
    return [Finding(**each) for each in record["findings"]]


def _weights(workdir) -> str:
    """Changes with the weights of the run."""
    return generate.made_of(workdir, generate.Settings(), [])["run"]


def _trial(before, last, judge, n, reward_QO, judge_QO, after_QO, references_Q) -> Iterator[Finding]:
    """The findings from scores [prompts, n] of the texts before and after reinforcement learning."""
    stage, mean_Q = Stage(before, [], {}, {}), judge_QO.mean(axis=1)

    def gain(stage, name, gained_Q, advice):
        low = interval.mean_ci95(gained_Q)[0]
        yield from _finding(stage, name, low, lambda x: x > 0, lambda x: False, "more than 0", DEFINED, advice)

    best_Q = judge_QO.max(axis=1)
    advice = f"of {n} samples none is better than the others: more {before}.steps or rows, or another model"
    yield from gain(stage, f"gain in {judge} of its best of {n} by {judge}, lower end", best_Q - mean_Q, advice)
    if references_Q is not None:
        over = float(best_Q.mean() - references_Q.mean())
        advice = f"even its best of {n} is worse than a reference: more {before}.steps, a larger lr or model"
        name = f"best of {n} by {judge}, above the references"
        yield from _least(stage, name, over, 0.0, 0.0, "its references", advice)
    if reward_QO is not None:
        stage = Stage("reward", [], {}, {})
        chosen_Q1 = reward_QO.argmax(axis=1)[:, None]
        gained_Q = reward_QO.max(axis=1) - reward_QO.mean(axis=1)
        advice = "it gives all samples of a prompt the same score: more pairs, more steps"
        yield from gain(stage, f"gain in the reward of its best of {n}, lower end", gained_Q, advice)
        gained_Q = np.take_along_axis(judge_QO, chosen_Q1, axis=1)[:, 0] - mean_Q
        advice = (
            f"what it prefers is no better by {judge}: consistent labels, more pairs, pairs of the policy's own texts"
        )
        yield from gain(stage, f"gain in {judge} of the reward's best of {n}, lower end", gained_Q, advice)
    advice = "the reward can choose better texts, the policy does not write them: lr, kl_coef, epochs, steps"
    gained_Q = after_QO.mean(axis=1) - mean_Q
    yield from gain(Stage(last, [], {}, {}), f"gain in {judge} over {before}, lower end", gained_Q, advice)


def _read(folder, name, evaluations) -> Stage:
    def plain(row):
        return {key.removeprefix(f"{name}/"): value for key, value in row.items()}

    rows = [plain(row) for row in metrics.read(folder / "metrics.jsonl")]
    results = sorted(evaluations.glob("*.json"), key=lambda path: path.stat().st_mtime)  # of completions, too
    found = [numbers for path in results if (numbers := jsonfile.read(path).get("reward_model")) and name != "judge"]
    return Stage(name, rows, plain(jsonfile.read(folder / "summary.json")), found[-1] if found else {})


def _finding(stage, name, value, passes, warns, healthy, source, advice) -> Iterator[Finding]:
    """The finding of a value, if it was recorded. passes, warns: whether it is healthy, or not so bad."""
    if value is not None:
        word = PASS if passes(value) else WARN if warns(value) else FAIL
        yield Finding(stage.name, name, word, value, healthy, source, advice)


def _least(stage, name, value, good, bad, source, advice):
    healthy = f"{good:g} or more"
    yield from _finding(stage, name, value, lambda x: x >= good, lambda x: x >= bad, healthy, source, advice)


def _most(stage, name, value, good, bad, source, advice):
    healthy = f"{good:g} or less"
    yield from _finding(stage, name, value, lambda x: x <= good, lambda x: x <= bad, healthy, source, advice)


def _language_model(stage, config) -> Iterator[Finding]:
    """Pretraining and fine-tuning: it has learned, it has not learned by heart, and its texts end."""
    losses = stage.values("eval_loss")
    if len(losses) > 1:
        fell = losses[-1] / losses[0]
        yield from _most(
            stage, "loss, share of the first", fell, 0.95, 1.0, RUNS, f"more {stage.name}.steps or a larger lr"
        )
        rise = losses[-1] / losses.min()
        yield from _most(
            stage, "loss, share of its least", rise, 1.05, 1.2, RUNS, "fewer steps, more rows or a smaller lr"
        )
    if config.task != "write":  # its texts are cut from longer ones
        advice = "do the labels end, and do they fit in data.response_length? More steps teach EOS"
        yield from _least(stage, "eos_rate", stage.number("eos_rate"), 0.9, 0.5, RUNS, advice)


def _reward_model(stage, config) -> Iterator[Finding]:
    """It agrees with held-out labels, more than length does, and is as sure as it is right."""
    ends = stage.summary.get("accuracy_ci95")
    if ends:
        advice = "are the labels consistent, and are there enough pairs? A larger model, more steps"
        yield from _least(stage, "accuracy, lower end", float(ends[0]), 0.55, 0.5, CHANCE, advice)
    losses = stage.values("eval_loss")
    if len(losses) > 1:
        rise = losses[-1] / losses.min()
        yield from _most(stage, "loss, share of its least", rise, 1.1, 1.3, RUNS, "fewer steps: it is over-confident")
    numbers = {name: each["value"] for name, each in stage.reward_model.items()}
    if numbers:
        by_length = max(numbers["accuracy_of_longer"], numbers["accuracy_of_shorter"])
        advice = "it knows no more than the length of a text; balance the lengths of the pairs"
        above = numbers["accuracy"] - by_length
        yield from _least(stage, "accuracy above length's", above, 0.05, 0.02, RUNS, advice)
        advice = "fewer steps or more pairs: its margins are too large for how often it is right"
        yield from _most(stage, "temperature", numbers["temperature"], 2.0, 4.0, CALIBRATION, advice)
        advice = "it reads the summary alone: pairs whose texts fit other posts too teach no more"
        own = numbers["accuracy_prefers_own_prompt"]  # never a failure: style alone can be worth a lot
        yield from _least(stage, "prefers the own post", own, 0.6, -np.inf, CHANCE, advice)


def _rl(stage, config) -> Iterator[Finding]:
    """It begins at the reference, stays near it, and what it gains is worth something to the judge, too."""
    before = "_before" if config.task == "write" else "_sft"
    first = stage.values("kl_exact")[:1]
    if len(first):
        advice = "the first policy is not the reference: are both scored at the same temperature?"
        yield from _most(
            stage, "exact KL of the first rollout, nats", float(abs(first[0])), 1e-4, 1e-2, DEFINED, advice
        )
    sampled = stage.values("kl")[:1]
    if len(sampled):
        advice = "sampler and learner give a token different log-probs: temperature, top-k, top-p, number types"
        yield from _most(stage, "k1 KL of the first rollout, nats", float(abs(sampled[0])), 0.01, 0.1, DEFINED, advice)
    limit = config.alarms.kl_exact or 15.0
    advice = f"a larger {stage.name}.kl_coef, a smaller lr or fewer steps"
    yield from _most(stage, "exact KL, nats", stage.number("kl_exact"), limit, 2 * limit, RUNS, advice)
    if stage.last("clip_fraction") is not None:
        yield from _most(
            stage, "clip fraction", stage.last("clip_fraction"), 0.2, 0.4, CLIP, "a smaller lr or fewer epochs"
        )
    if config.algorithm in POLICY and POLICY[config.algorithm].NEEDS_VALUE:
        advice = f"{stage.name}.value_init=reward, a larger value coefficient or lr"
        yield from _least(
            stage, "explained variance", stage.last("explained_variance"), 0.1, 0.02, "0: a constant", advice
        )
    collapse = "the policy writes the same again and again: a larger kl_coef, or alarms that end the learning"
    if config.task != "arithmetic":  # the right answer is certain
        yield from _least(
            stage, "entropy, share of the first", stage.change("entropy", before), 0.3, 0.1, RUNS, collapse
        )
    length = stage.change("length", before)
    yield from _finding(
        stage, "length, share of the first", length, lambda x: 0.5 <= x <= 2, lambda x: 0.25 <= x <= 4, "0.5 to 2",
        RUNS, "does the reward prefer long or short texts? See length_correlation in experiments/evaluate.py",
    )  # fmt: skip
    if config.task != "write":
        yield from _least(
            stage, "eos_rate", stage.number("eos_rate"), 0.9, 0.5, RUNS, f"{stage.name}.missing_eos punishes it"
        )
    yield from _most(stage, "repeat_rate", stage.number("repeat_rate"), 0.05, 0.2, RUNS, collapse)
    advice = "their advantages are 0: a larger group, a higher temperature, or harder prompts"
    yield from _most(stage, "groups of equal scores", stage.last("groups_equal"), 0.5, 0.9, RUNS, advice)
    yield from _gains(stage)


def _gains(stage) -> Iterator[Finding]:
    """The reward rises, and the judge's score with it."""
    intervals = {name: stage.summary.get(f"{name}_ci95") for name in ("score", "reward", "judge", "gold")}
    trained = intervals["score"] or intervals["reward"]
    if trained:
        advice = f"more {stage.name}.steps, a larger lr or a smaller kl_coef"
        yield from _least(stage, "gain in reward, lower end", float(trained[0]), 0.0, -np.inf, DEFINED, advice)
    for judge in ("judge", "gold"):
        if intervals[judge]:
            advice = f"the reward rises and {judge} does not: the reward model is at fault, or kl_coef is too small"
            name = f"gain in {judge}, lower end"
            yield from _least(stage, name, float(intervals[judge][0]), 0.0, -0.02, DEFINED, advice)
