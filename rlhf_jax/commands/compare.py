"""Finished runs side by side: fields of their configs that differ, their numbers with intervals, and their curves.

A run is the folder of a stage that trained a policy by reward or preference (runs/demo/ppo), or a workdir, which stands
for all of its stages of that kind. A gain over the first run is a paired difference where both have the same held-out
prompts of one task in the same order; otherwise it is left out. Runs that differ in their seed alone are also one row
together.
"""

import dataclasses
from pathlib import Path

import numpy as np

from rlhf_jax import jsonfile
from rlhf_jax.commands import report
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import best_of_n, bootstrap, interval, seeds
from rlhf_jax.report import metrics, plots
from rlhf_jax.training.workdir import Workdir, flat

NUMBERS = ("kl_exact", "best_of_n_at_kl", "distinct2", "eos_rate", "length")  # of the summary, after the score
METRICS = ("gold", "judge", "reward", "score", "exact")  # what runs are compared by: the first that all of them have


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished stage."""

    name: str
    config: dict  # what its numbers depend on, flat: {"rloo.lr": ...}
    summary: dict  # without the stage's name
    rows: list[dict]  # of metrics, without the stage's name
    samples: list[dict]
    stage: str

    @property
    def batch(self) -> int:
        """Completions, or pairs, an iteration."""
        return self.config[f"{self.config['section']}.batch"]

    def _gains(self, metric) -> list[dict]:
        """What the samples say of the metric, before and after; the column `score` is that of the reward."""
        return report.gains(self.samples, self.stage, (metric, "score") if metric == "reward" else (metric,))[1]

    def scores(self, metric) -> np.ndarray | None:
        """The metric [N] of each held-out completion, where the samples have it."""
        return np.array([each["last"] for each in found]) if (found := self._gains(metric)) else None

    def wins(self, metric) -> np.ndarray | None:
        """[N]: 1 where the policy beats the one before it on a held-out prompt, .5 for a tie, where the samples say."""
        return (np.sign([each["gain"] for each in found]) + 1) / 2 if (found := self._gains(metric)) else None

    def best_of_n(self, metric) -> np.ndarray:
        """[M, 2]: exact KL and metric of the best of n samples of the policy before, where all answer one prompt."""
        scores = [each.get(f"{metric}_sft") for each in self.samples]
        points = [] if not scores or None in scores else [(nats, score) for _, score, nats in best_of_n.curve(scores)]
        return np.array(points).reshape(-1, 2)

    @property
    def setting(self) -> tuple:
        """The config without the seed: runs of the same setting differ in nothing else."""
        return (self.stage, *sorted((key, str(value)) for key, value in self.config.items() if key != "seed"))

    @property
    def task(self) -> str:
        """What the run was trained on."""
        parts = (self.config.get(key) for key in ("task", "data.source", "data.kind"))
        return " ".join(str(part) for part in parts if part)

    @property
    def prompts(self) -> list[str]:
        """The held-out prompts, in order."""
        return [row.get("prompt", "") for row in self.samples]

    def curve(self, metric) -> dict[str, np.ndarray]:
        """{"iterations", "samples", "seconds", "kl", "value"} of each evaluation."""
        found = [row for row in self.rows if f"eval_{metric}" in row]
        step_N = np.array([row["step"] for row in found], float)
        columns = {"seconds": "time", "kl": "eval_kl_exact", "value": f"eval_{metric}"}
        arrays = {name: np.array([row.get(column, np.nan) for row in found]) for name, column in columns.items()}
        return {"iterations": step_N, "samples": step_N * self.batch} | arrays


def read(place: str) -> list[Run]:
    """The runs of a folder. InputError where there is none that has finished."""
    path = Path(place).expanduser()
    if not path.is_dir():
        raise InputError(f"{place}: expected the folder of a run, found none")
    folders = (
        [path] if (path / "config.json").exists() and (path / "metrics.jsonl").exists() else sorted(path.iterdir())
    )
    found = [run for folder in folders if folder.is_dir() and (run := _stage(folder))]
    if not found:
        raise InputError(f"{place}: expected a finished stage of reinforcement learning or DPO, found none")
    return found


def _stage(folder):
    if not ((folder / "summary.json").exists() and (folder / "metrics.jsonl").exists()):
        return None
    record = jsonfile.read(folder / "config.json", "the config of a stage", "")
    if "algorithm" not in record:  # fine-tuning, or a reward model
        return None
    workdir, stage = Workdir(folder.parent), folder.name
    summary = {key.removeprefix(f"{stage}/"): value for key, value in workdir.summary(stage).items()}
    rows = plots.bare(metrics.read(folder / "metrics.jsonl"), stage)
    return Run(f"{folder.parent.name}/{stage}", flat(record), summary, rows, workdir.samples(stage), stage)


def compare(places: list[str], out: str, reporter) -> dict:
    """Prints the tables, writes the picture to `out` and the same as a page and as Markdown beside it.

    Returns the numbers: {name of the run: {name: number}}.
    """
    runs = [run for place in places for run in read(place)]
    if len(runs) < 2:
        raise InputError(f"RUN: expected at least 2 finished runs, got {len(runs)}")
    if len({run.name for run in runs}) < len(runs):
        raise InputError("RUN: expected different folders, got one of them twice")
    metric = next((name for name in METRICS if all(name in run.summary for run in runs)), None)
    if metric is None:
        raise InputError(f"RUN: expected runs that all have one of {', '.join(METRICS)}")
    names = [run.name for run in runs]
    results = {run.name: numbers(run, runs[0], metric) for run in runs}
    columns = [metric, f"{metric} 95%", f"over {names[0]}", "95%", *NUMBERS, "samples", "seconds"]
    tables = {
        "Differences": (["differs", *names], [[field, *map(_short, values)] for field, values in differing(runs)]),
        "Runs": (["run", *columns], [[name, *map(_cell, found.values())] for name, found in results.items()]),
    }
    for title, (header, rows) in (("Over seeds", over_seeds(runs, metric)), ("Over tasks", over_tasks(runs, metric))):
        if rows:
            tables[title] = (header, [list(map(_cell, row)) for row in rows])
    for header, rows in tables.values():
        reporter.table(header, rows)
    draw(runs, metric, out)
    path = Path(out)
    made = [report.Section(title, tables=[(tuple(header), _texts(rows))]) for title, (header, rows) in tables.items()]
    made.append(report.Section("Curves", pictures=[("curves", path)] if path.exists() and path.stat().st_size else []))
    page = report.save(path.parent, (f"{path.stem}.html", f"{path.stem}.md"), f"{len(runs)} runs", made)
    reporter.note(f"curves in {out}, everything in {page}")
    return results


def draw(runs: list[Run], metric: str, out) -> None:
    """Writes the curves of the runs to `out`, beside best-of-n."""
    curves = {run.name: run.curve(metric) for run in runs}
    plots.compare(curves, out, metric=metric, best_of_n=[run.best_of_n(metric) for run in runs])


def over_seeds(runs: list[Run], metric: str) -> tuple[list[str], list[list]]:
    """(header, rows): a row for each setting with several seeds.

    The metric's interval is Student's over seeds, the win rate's is `bootstrap.two_level`, prompts within seeds.
    """
    header = ["setting", "seeds", metric, "95% over seeds", "wins over the policy before", "95%, prompts within seeds"]
    rows = []
    for group in _grouped(runs, lambda run: run.setting):
        if len(group) > 1:
            values_K = np.array([run.summary[metric] for run in group], np.float64)
            mean, half = float(values_K.mean()), seeds.half_width(values_K)
            wins = [each for run in group if (each := run.wins(metric)) is not None]
            same = len(wins) == len(group) and len(set(map(len, wins))) == 1
            rate, ci95 = bootstrap.two_level(np.stack(wins)) if same else (None, None)
            names = ", ".join(run.name for run in group)
            rows.append([names, len(group), mean, (mean - half, mean + half), rate, ci95])
    return header, rows


def over_tasks(runs: list[Run], metric: str) -> tuple[list[str], list[list]]:
    """(header, rows): the interquartile mean over tasks and seeds of each algorithm with 2 tasks or more.

    Every task counts with as many seeds, of which there must be 5 or more.
    """
    rows = []
    for group in _grouped(runs, lambda run: run.config["algorithm"]):
        tasks = _grouped(group, lambda run: run.task)
        K = min(map(len, tasks))
        if len(tasks) > 1 and K >= 5:
            value, ci95 = bootstrap.stratified([[run.summary[metric] for run in task[:K]] for task in tasks])
            rows.append([group[0].config["algorithm"], len(tasks), K, value, ci95])
    return ["algorithm", "tasks", "seeds", f"{metric}, interquartile mean", "95%"], rows


def _grouped(runs, key) -> list[list[Run]]:
    """The runs with the same key, in order."""
    found: dict = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())


def differing(runs: list[Run]) -> list[tuple[str, list]]:
    """(field, its value in each run) of every field that some runs have otherwise; None where a run has no such field.

    The section of an algorithm counts by its fields' names alone, so that RLOO's and GRPO's lr are one row.
    """
    flats = []
    for run in runs:
        section = run.config["section"]
        flats.append(
            {
                key.replace(f"{section}.", "", 1) if key.startswith(f"{section}.") else key: value
                for key, value in run.config.items()
                if key != "section" and not key.startswith("sha256")
            }
        )
    fields = list(dict.fromkeys(key for each in flats for key in each))
    rows = [(field, [each.get(field) for each in flats]) for field in fields]
    return [(field, values) for field, values in rows if any(value != values[0] for value in values)]


def numbers(run: Run, first: Run, metric: str) -> dict:
    """The columns of a run: the metric and its interval, the paired gain over `first` and its interval, the others."""
    scores_N, others_N = run.scores(metric), first.scores(metric)
    found = {metric: run.summary[metric], "ci95": None, "gain": None, "gain_ci95": None}
    if scores_N is not None:
        found["ci95"] = interval.mean_ci95(scores_N)
        same = (run.task, run.prompts) == (first.task, first.prompts)
        if run is not first and others_N is not None and same:
            found["gain"], found["gain_ci95"] = interval.paired_gain(scores_N, others_N)
    found |= {name: run.summary.get(name) for name in NUMBERS}
    return found | {"samples": run.summary["steps"] * run.batch, "seconds": run.summary["seconds"]}


def _cell(value):
    if value is None:
        return "-"
    return f"{value[0]:.3f} to {value[1]:.3f}" if isinstance(value, tuple) else value


def _texts(rows):
    return [[cell if isinstance(cell, str) else report.number(cell) for cell in row] for row in rows]


def _short(value):
    return "-" if value is None else str(value)
