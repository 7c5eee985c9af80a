"""Sweeps: one config with other values in some fields, run by run, and a table of what each value is worth.

A sweep's folder has sweep.json (the config and the assignments, which never change), runs/000, runs/001, ...
(workdirs as any other), table.json, plots/, and best.py: the config of the best, ready for --config. A stage that
another run has finished with the same config, such as the fine-tuning before each value of ppo.kl_coef, is taken from
there. With successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943), halving.json has the rounds so far.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import itertools
import json
import math
import os
import pprint
import re
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import fields, pipeline, provenance
from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.evaluate import seeds
from rlhf_jax.report import plots
from rlhf_jax.training import loop
from rlhf_jax.training.workdir import Workdir

RANDOM = {"uniform": lambda low, high, u: low + u * (high - low)}
RANDOM["loguniform"] = lambda low, high, u: low * (high / low) ** u
PAUSE = 0.2  # seconds between two looks at the processes
SEED = "seed"  # the field whose values repeat a run; the table has means over it
INDEPENDENT = ("gold", "exact")  # measures of a policy that may not be its training reward, the first there is


def assignments(text: str, samples: int = 1) -> list[dict[str, Any]]:
    """[{field: value}] of each run: a sweep as text, or that of a Python file with a function `sweep() -> list`.

    ppo.kl_coef=.02,.05,.1 seed=1:3 is a grid: every combination. lr=loguniform(1e-6,1e-4) and uniform(a,b) are drawn
    `samples` times, the same at every start; each draw is combined with the grid.
    """
    if text.endswith(".py"):
        return _of_file(Path(text))
    grid: dict[str, list] = {}
    drawn: dict[str, tuple] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise InputError(f"--sweep: expected FIELD=VALUES, such as ppo.kl_coef=.02,.05, got {short(part)!r}")
        if name in grid or name in drawn:
            raise InputError(f"--sweep: {name}: expected once, got it twice")
        if found := re.fullmatch(r"(\w+)\(([^,]+),([^,]+)\)", value):
            kind, low, high = found[1], _value(found[2]), _value(found[3])
            numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
            if kind not in RANDOM or not numbers or not low < high or (kind == "loguniform" and low <= 0):
                raise InputError(
                    f"--sweep: {name}: expected {' or '.join(RANDOM)}(low,high) with low < high, got {value}"
                )
            drawn[name] = kind, low, high
        else:
            grid[name] = _values(name, value)
    if not (grid or drawn):
        raise InputError("--sweep: expected FIELD=VALUES or a file, got none")
    runs, random = [], np.random.default_rng(0)
    for _ in range(samples if drawn else 1):
        draw = {name: float(RANDOM[kind](low, high, random.random())) for name, (kind, low, high) in drawn.items()}
        runs += [draw | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return runs


def _of_file(path):
    if not path.is_file():
        raise InputError(f"--sweep: {path}: expected a Python file with a function sweep(), found none")
    function = runpy.run_path(str(path)).get("sweep")
    runs = function() if callable(function) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and run for run in runs):
        expected = "expected FIELD=VALUES, or a function sweep() that returns a list of {field: value}"
        raise InputError(f"--sweep: {path}: {expected}")
    return runs


def _values(name, text):
    if found := re.fullmatch(r"(-?\d+):(-?\d+)", text):
        first, last = int(found[1]), int(found[2])
        if first > last:
            raise InputError(f"--sweep: {name}: expected first:last, got {text}")
        return list(range(first, last + 1))
    values = [_value(each) for each in text.split(",")]
    if len(set(map(str, values))) < len(values):
        raise InputError(f"--sweep: {name}: expected each value once, got {text}")
    return values


def _value(text):
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def changed(config, assignment):
    """The config with these fields, checked as any other config."""
    values = configs.tree(config)
    for name, value in assignment.items():
        *path, last = name.split(".")
        section: Any = values
        for part in path:
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if not isinstance(section, dict) or last not in section or isinstance(section[last], dict):
            every = [field for field, *_ in fields.leaves(config)]
            near = difflib.get_close_matches(name, every, n=1)
            raise InputError(f"--sweep: {name}: no such field{f'; did you mean {near[0]}?' if near else ''}")
        section[last] = value
    return configs.parse(values)


def sweep(
    config, folder, runs, reporter, *, metric="", least=False, index=None, devices=1, halving=0, train=pipeline.run,
    start=None, processes=1,
):  # fmt: skip
    """Trains the runs, or the one at `index`; writes table, pictures and the best config of those that are finished.

    metric: a number of the last stage's summary that is not the training reward; empty: the task's own truth. least:
    smaller is better. halving: of the assignments, all begin with a share of the steps, and the best 1/halving of them
    go on with so many times as many, until the last ones have all steps; 0: all runs have all steps. processes: runs at
    once; start(index) begins one as a process, a subprocess.Popen. train: pipeline.run, or a function like it.
    """
    folder = Path(folder).expanduser()
    made = [changed(config, assignment) for assignment in runs]
    for each in made:  # processes have devices of their own
        configs.check(dataclasses.replace(each, mesh=configs.Config.mesh) if processes > 1 else each, devices=devices)
    if index is not None and not 0 <= index < len(runs):
        raise InputError(f"--index: expected 0 to {len(runs) - 1}, got {index}")
    if halving:
        _check_halving(config, made, halving, index, processes)
    with _alone(folder):
        _record(folder, config, runs)

    def trained(i, steps=None):
        reporter.note(f"run {i} of {len(runs)}: {described(runs[i])}{f', {steps} steps' if steps else ''}")
        train(_sharing(made, i, folder, steps), place(folder, i), reporter)

    if halving:
        _halve(made, folder, runs, reporter, trained, (metric, least, halving))
    elif processes > 1:
        _at_once(made, folder, reporter, start, processes)
    else:
        for i in range(len(runs)) if index is None else [index]:
            trained(i)
    with _alone(folder):
        _conclude(made, folder, runs, reporter, metric, least)


def _check_halving(config, made, halving, index, processes):
    if halving < 2:
        raise InputError(f"--halving: expected 0, or at least 2, got {halving}")
    if index is not None or processes > 1:
        raise InputError("--halving: expected no --index and --processes, as a round waits for all of its runs")
    for each in (config, *made):
        if each.rl.schedule != "constant":
            name = f"{each.algorithm}.schedule"
            raise InputError(f"--halving: expected {name} = constant, as runs get more steps, got {each.rl.schedule}")


def rounds(count: int, steps: int, halving: int) -> list[tuple[int, int]]:
    """[(assignments, steps)] of each round: nine with 90 steps, by thirds: (9, 10), (3, 30), (1, 90)."""
    found = [count]
    while found[-1] > 1:
        found.append(-(-found[-1] // halving))
    return [(left, max(1, -(-steps // halving ** (len(found) - 1 - i)))) for i, left in enumerate(found)]


def _halve(made, folder, runs, reporter, trained, how):
    """Trains round after round. Its decisions are kept: a run that went on does not have the numbers of before."""
    metric, least, halving = how
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(_group(run), []).append(i)
    left, record = list(groups), {"halving": halving, "kept": []}
    if (folder / "halving.json").exists():
        record = Workdir(folder).read_json("halving.json")
        if record["halving"] != halving:
            raise InputError(f"--halving: expected {record['halving']}, as {folder} has begun with, got {halving}")
    for i, (count, steps) in enumerate(plan := rounds(len(groups), made[0].rl.steps, halving)):
        left = record["kept"][i - 1] if i else left
        if i < len(record["kept"]):
            continue
        members = [run for group in left for run in groups[group]]
        for run in members:
            trained(run, steps)
        if i + 1 == len(plan):
            return
        numbers = _finished(made, folder, {run: steps for run in members})
        name = _ranked_by(metric, made[0], numbers)
        rows = table(runs, {run: found[name] for run, found in numbers}, least)
        kept = [_group(row["fields"]) for row in rows[: plan[i + 1][0]]]
        reporter.note(f"{count} of {len(groups)} had {steps} steps; {name} keeps {len(kept)}: {'; '.join(kept)}")
        record["kept"].append(kept)
        Workdir(folder).write_lines("halving.json", [record])


def _group(run):
    """The name of an assignment without its seed."""
    return described({name: value for name, value in run.items() if name != SEED}) or "as it is"


def _at_once(made, folder, reporter, start, processes):
    """Trains the runs as processes, so many at once. One that needs a stage that another one trains waits for it."""
    needs = [_needs(config) for config in made]
    waiting, failed = list(range(len(made))), []
    running: dict[int, Any] = {}

    def done(need):
        """Whether a run has finished this stage."""
        stage, steps, _ = need
        return any(need in needs[j] and Workdir(place(folder, j)).finished(stage, steps) for j in range(len(made)))

    def free(i):
        """Whether no process is at a stage that run i needs, too."""
        return all(done(need) for need in needs[i] if any(need in needs[j] for j in running))

    with loop.stop_signal() as stop:
        while waiting or running:
            while len(running) < processes and not stop() and (i := next(filter(free, waiting), None)) is not None:
                waiting.remove(i)
                reporter.note(f"run {i} of {len(made)} begins; its output is {place(folder, i)}.log")
                running[i] = start(i)
            for i, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[i]
                    reporter.note(f"run {i}: " + ("finished" if code == 0 else f"exit code {code}"))
                    failed += [i] * (code != 0)
            if stop():
                for process in running.values():
                    process.terminate()
                for process in running.values():
                    process.wait()
                raise loop.Stopped(f"stopped; {loop.AGAIN}")
            time.sleep(PAUSE)
    if failed:
        where = ", ".join(f"{place(folder, i)}.log" for i in failed)
        raise InputError(f"--sweep: {len(failed)} of {len(made)} runs have failed; see {where}")


def _needs(config):
    """[(stage, steps, what it depends on)] of the stages that other runs may share."""
    stages = configs.stages(config)[:-1]
    steps = {stage: getattr(config, configs.section(config, stage)).steps for stage in stages}
    return [(stage, steps[stage], provenance.depends(config, stage)) for stage in stages]


@contextlib.contextmanager
def _alone(folder):
    """Within it, no other run of a job array reads or writes the sweep's own files: they wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"workdir: cannot write {folder} ({error.strerror})") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def place(folder, index):
    """The workdir of a run."""
    return Path(folder, "runs", f"{index:03d}")


def described(assignment):
    """ppo.kl_coef=0.05 seed=2"""
    return " ".join(
        f"{name}={value:g}" if type(value) is float else f"{name}={value}" for name, value in assignment.items()
    )


def _record(folder, config, runs):
    """Writes sweep.json, or refuses the folder of another sweep."""
    record = json.loads(json.dumps({"config": fields.significant(config), "runs": runs}))
    workdir = Workdir(folder)
    if (folder / "sweep.json").exists():
        if workdir.read_json("sweep.json") != record:
            raise InputError(f"workdir: {folder} has another sweep, or one of another config; choose another --workdir")
        return
    if any(path.name != "lock" for path in folder.iterdir()):
        raise InputError(f"workdir: {folder}: expected a new folder, or that of this sweep")
    workdir.write_lines("sweep.json", [record])


def _sharing(made, index, folder, steps=None):
    """The config of a run, with `from` at the stages that another run has finished with the same config.

    steps: of its last stage, if not all.
    """
    config, workdir = made[index], Workdir(place(folder, index))
    if steps:
        config = dataclasses.replace(config, **{config.algorithm: dataclasses.replace(config.rl, steps=steps)})
    stages = configs.stages(config)[:-1]
    for name in dict.fromkeys(configs.section(config, stage) for stage in stages):
        section = getattr(config, name)
        own = [stage for stage in stages if configs.section(config, stage) == name]  # a hold-out judge is of `reward`
        if section.from_ or any(workdir.started(stage) for stage in own):
            continue
        depends = [provenance.depends(config, stage) for stage in own]
        for i, other in enumerate(made):
            there = Workdir(place(folder, i))
            if i == index or not set(own) <= set(configs.stages(other)):
                continue
            if [provenance.depends(other, stage) for stage in own] != depends:
                continue
            if all(there.finished(stage, section.steps) for stage in own):
                config = dataclasses.replace(config, **{name: dataclasses.replace(section, from_=str(there.path))})
                break
    return config


def _conclude(made, folder, runs, reporter, metric, least):
    found = _finished(made, folder, {i: config.rl.steps for i, config in enumerate(made)})
    if len(found) < len(runs):
        reporter.note(f"{len(found)} of {len(runs)} runs are finished")
    if not found:
        return
    metric = _ranked_by(metric, made[0], found)
    rows = table(runs, {i: numbers[metric] for i, numbers in found}, least)
    workdir = Workdir(folder)
    workdir.write_lines("table.json", [{"metric": metric, "rows": rows}])
    names = [name for name in dict.fromkeys(itertools.chain(*runs)) if name != SEED]
    shown = [(described(row["fields"]), str(row["runs"]), row["mean"], row["ci95"]) for row in rows]
    reporter.table((metric, "seeds", "mean", "+- 95%"), shown)
    points = {name: [(runs[i].get(name), numbers[metric]) for i, numbers in found] for name in names or [SEED]}
    title = f"{folder.name}: {len(found)} runs"
    plots.sweep(points, metric, folder / "plots" / "sweep.png", title=title)
    if len(names) > 1:
        plots.parallel(points, metric, folder / "plots" / "parallel.png", title=title)
    best = rows[0]
    (folder / "best.py").write_text(_config_file(changed(made[0], best["fields"]), folder.name, metric, best))
    reporter.note(f"best: {described(best['fields'])}; its config is {folder / 'best.py'}")


def _finished(made, folder, steps):
    """[(index, numbers of the last stage)] of the runs in {index: steps} that have so many steps."""
    found = []
    for i, count in steps.items():
        there, last = Workdir(place(folder, i)), configs.rl_name(made[i])
        if there.finished(last, count):
            summary = there.summary(last)
            numbers = {key.split("/", 1)[1]: value for key, value in summary.items() if key.startswith(f"{last}/")}
            found.append((i, numbers))
    return found


def _ranked_by(metric, config, found):
    """The metric that ranks the runs: the one that was given, or the first of INDEPENDENT that they have."""
    metric = metric or next((name for name in INDEPENDENT if _independent(name, config, found)), "")
    if not _independent(metric, config, found):
        numbers = sorted(name for name in found[0][1] if _independent(name, config, found))
        raise InputError(
            f"--metric: expected a number of the summary that is not the training reward ({listed(numbers)}), "
            f"got {metric or 'none'!r}"
        )
    return metric


def _independent(name, config, found):
    """Whether a number is in all summaries, finite, and not what the runs were trained to maximize."""
    reward = "score" if config.learned else "reward"
    truth = "gold" in found[0][1]
    trained = name.split("_")[0] == reward or (name.startswith("win_rate") and not truth)
    trained |= name.split("_")[0] == config.reward.kind or (config.sampled and name.startswith("best_of_n"))
    values = [numbers.get(name) for _, numbers in found]
    return not trained and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def table(runs, values, least=False):
    """Rows {"fields", "runs", "mean", "ci95"} of the assignments without their seed, the best mean first.

    values: {index of a run: its number}. ci95 is the half-width of Student's interval over seeds; None of one seed.
    """
    groups: dict[str, list[int]] = {}
    for i in sorted(values):
        groups.setdefault(json.dumps({name: value for name, value in runs[i].items() if name != SEED}), []).append(i)
    rows = []
    for key, members in groups.items():
        numbers = np.array([values[i] for i in members], np.float64)
        half = seeds.half_width(numbers) if len(numbers) > 1 else None
        rows.append({"fields": json.loads(key), "runs": len(members), "mean": float(numbers.mean()), "ci95": half})
    return sorted(rows, key=lambda row: row["mean"] if least else -row["mean"])


def _config_file(config, name, metric, best):
    interval = "" if best["ci95"] is None else f" +- {best['ci95']:.4g}"
    return (
        f'"""The best of the sweep {name}: {metric} {best["mean"]:.4g}{interval} over {best["runs"]} seeds."""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        f"    return ConfigDict({pprint.pformat(configs.tree(config), width=100, sort_dicts=False)})\n"
    )
