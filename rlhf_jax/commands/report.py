"""report.html and report.md of a run: what was trained on what, what came of it, and whether to believe it.

Each is one file. The page has its pictures inside and makes no request; the Markdown links to them.
"""

import base64
import dataclasses
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import fields, jsonfile
from rlhf_jax.commands import doctor, evaluate
from rlhf_jax.errors import InputError
from rlhf_jax.report import metrics
from rlhf_jax.training.workdir import Workdir

ABOUT = "about.json"  # of a workdir: the command, and what was cut or skipped of each kind of rows
NAMES = ("report.html", "report.md")
PICTURES = ("before_after", "over_optimization", "reward_over_kl")  # of a stage, after its own
CHOSEN = ("gold", "judge", "score", "reward", "exact")  # what samples are chosen by: the first that they have
LONGEST = 4_000  # characters of a text that are shown

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }
img { max-width: 100%; background: #fff }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #8886; padding-left: .8rem }
h2 { margin-top: 2.2rem }
</style>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for line in section.lines %}<p>{{ line }}</p>
{% endfor %}
{% for header, rows in section.tables %}
<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% for name, text in section.texts %}<p>{{ name }}</p><pre>{{ text }}</pre>
{% endfor %}
{% for name, path in section.pictures %}<p><img alt="{{ name }}" src="data:image/png;base64,{{ path | base64 }}"></p>
{% endfor %}
</section>
{% endfor %}
</html>
"""


@dataclasses.dataclass
class Section:
    """A heading and what is under it, in this order."""

    title: str
    lines: list[str] = dataclasses.field(default_factory=list)
    tables: list[tuple[tuple, list]] = dataclasses.field(default_factory=list)  # (header, rows), cells as text
    texts: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (what it is, the text)
    pictures: list[tuple[str, Path]] = dataclasses.field(default_factory=list)  # (what it shows, PNG)


def write(workdir) -> Path:
    """Writes both files of a run with a finished stage: the path of the page. Raises InputError."""
    workdir = Path(workdir).expanduser()
    config = configs.read(workdir)
    title = f"{workdir.name}: {config.algorithm} on {config.task}, seed {config.seed}"
    return save(workdir, NAMES, title, list(sections(workdir, config)))


def again(workdir) -> Path | None:
    """Writes both files again where they are there, with what has been evaluated since: the path of the page."""
    return write(workdir) if (Path(workdir).expanduser() / NAMES[0]).exists() else None


def save(folder: Path, names: tuple[str, str], title: str, made: list[Section]) -> Path:
    """Writes a page and its Markdown: the path of the page."""
    page, text = (folder / name for name in names)
    metrics.replace(page, html(title, made))
    metrics.replace(text, markdown(title, made, folder))
    return page


def command_line() -> str:
    """The command of this process, where it is a script; else ""."""
    return shlex.join(["python", *sys.argv]) if sys.argv[0].endswith(".py") else ""


def sections(workdir: Path, config) -> Iterable[Section]:
    """The sections of a run's report."""
    places = {name: configs.place(config, workdir, name) / name for name in configs.stages(config)}
    places = {name: place for name, place in places.items() if (place / "summary.json").exists()}
    if not places:
        raise InputError(f"{workdir}: expected a run with a finished stage; there is none yet")
    summaries = {name: jsonfile.read(place / "summary.json") for name, place in places.items()}
    plain = {
        name: {key.removeprefix(f"{name}/"): value for key, value in summary.items() if key.startswith(f"{name}/")}
        for name, summary in summaries.items()
    }
    yield _results(plain)
    yield _checks(workdir)
    yield _curves(workdir, places)
    yield from _samples(places)
    yield from _evaluations(workdir)
    about = jsonfile.read(workdir / ABOUT) if (workdir / ABOUT).exists() else {}
    yield Section("Data", [note for notes in about.get("data", {}).values() for note in notes])
    yield _config(config)
    yield _made_with(about.get("command", ""), summaries)
    rows = [(name, key, number(value)) for name, numbers in plain.items() for key, value in sorted(numbers.items())]
    yield Section("All numbers", tables=[(("stage", "number", "value"), [row for row in rows if row[2]])])


def _results(plain) -> Section:
    """What the stages ended with; of the last, before and after with the interval of the gain."""
    section = Section("Results")
    *before, last = plain
    rows: list[tuple] = []
    for name in before:
        numbers = plain[name]
        keys = [key for key in ("loss", "accuracy", "gold", "reward", "eos_rate") if key in numbers]
        rows += [(name, key, number(numbers[key]), number(numbers.get(f"{key}_ci95"))) for key in keys]
    if rows:
        section.tables.append((("stage", "held out", "value", "95%"), rows))
    numbers, rows = plain[last], []
    for key in [key.removesuffix("_gain") for key in numbers if key.endswith("_gain")]:
        first = next((numbers[f"{key}{side}"] for side in ("_sft", "_before") if f"{key}{side}" in numbers), None)
        gain = number(numbers[f"{key}_gain"])
        rows.append((key, number(first), number(numbers.get(key)), gain, number(numbers.get(f"{key}_ci95"))))
    if rows:
        section.tables.append(((last, "before", "after", "gain", "95%"), rows))
    keys = [key for key in ("win_rate", "kl_exact", "eos_rate", "length", "best_step") if key in numbers]
    rows = [(key, number(numbers[key]), number(numbers.get(f"{key}_ci95"))) for key in keys]
    section.tables.append(((last, "value", "95%"), rows))
    return section


def _checks(workdir) -> Section:
    findings, trial = doctor.examine(workdir), doctor.tried(workdir)
    every = [*findings, *trial]
    rows = [(each.stage, each.name, each.verdict, number(each.value), each.healthy, each.source) for each in every]
    wrong = [each for each in every if each.verdict != doctor.PASS]
    said = [f"{each.verdict}  {each.stage}  {each.name}: {each.advice}" for each in wrong]
    header = ("stage", "check", "", "value", "healthy", "source")
    return Section("Checks (doctor)", [doctor.verdict(findings, trial), *said], [(header, rows)])


def _curves(workdir, places) -> Section:
    paths = [("the whole run", workdir / "plots" / "pipeline.png")]
    for name, place in places.items():
        paths += [(f"{name}: {file.replace('_', ' ')}", place / "plots" / f"{file}.png") for file in (name, *PICTURES)]
    there = [(name, path) for name, path in paths if path.exists() and path.stat().st_size]
    return Section("Curves", pictures=there)


def _samples(places) -> Iterable[Section]:
    """Three held-out samples of the last stage, chosen by their gain."""
    stage, place = list(places.items())[-1]
    name, found = gains(Workdir(place.parent).samples(stage), stage)
    if not found:
        return
    order = sorted(range(len(found)), key=lambda i: found[i]["gain"])
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    section = Section(
        "Samples", [f"Of {len(found)} held-out prompts, those with the best, the median and the worst gain in {name}."]
    )
    for rule, i in chosen.items():
        row, said = found[i], f"{rule} gain, {number(found[i]['gain'])}"
        section.texts += [(f"{said}: prompt", short(row["prompt"]))] if row["prompt"] else []
        section.texts.append((f"{said}: before, {name} {number(row['first'])}", short(row["before"])))
        section.texts.append((f"{said}: after, {name} {number(row['last'])}", short(row["after"])))
    yield section


def gains(rows: list[dict], stage: str, names: Iterable[str] = CHOSEN) -> tuple[str, list[dict]]:
    """(the number, [{"prompt", "before", "after", "first", "last", "gain"}]) of the rows of a samples.jsonl.

    The number is the first of `names` that the samples have. Nothing where they have none, as those of fine-tuning.
    """
    found = []
    for name in names:
        for row in rows:
            before, after = row.get("sft"), row.get(stage)
            if isinstance(before, dict) and isinstance(after, dict):
                first, last = before.get(name), after.get(name)
                before, after = before["completion"], after["completion"]
            else:
                first, last, after = row.get(f"{name}_sft"), row.get(f"{name}_rl"), row.get("rl")
            if isinstance(first, int | float) and isinstance(last, int | float):
                sides = {"before": before, "after": after, "first": first, "last": last, "gain": last - first}
                found.append({"prompt": row.get("prompt", "")} | sides)
        if found:
            return name, found
    return "", []


def _evaluations(workdir) -> Iterable[Section]:
    """The results of experiments/evaluate.py."""
    for path in sorted((workdir / evaluate.FOLDER).glob("*.json")):
        result = jsonfile.read(path)
        if "stage" not in result:  # of completions
            continue
        section = Section(f"Evaluation of {result['stage']}")
        rows: list[tuple]
        for name in "text", "reward_model":
            rows = [
                (key, number(each["value"]), number(each.get("ci95"))) for key, each in result.get(name, {}).items()
            ]
            if rows:
                section.tables.append(((name.replace("_", " "), "value", "95%"), rows))
        wins = dict(result.get("win_rate", {}))
        against, rows = wins.pop("against", ""), []
        for name, each in wins.items():
            both = (each, each["length_controlled"])
            rows.append((name, *(number(rate[key]) for rate in both for key in ("value", "ci95"))))
        if rows:
            header = (f"win rate over {against}, by", "value", "95%", "at equal lengths", "95%")
            section.tables.append((header, rows))
        yield section


def _config(config) -> Section:
    """The fields that have an effect, as flags."""
    unused = fields.unused(config)
    rows = [(f"--config.{name}", str(value)) for name, _, value in fields.leaves(config) if name not in unused]
    return Section("Config", tables=[(("field", "value"), rows)])


def _made_with(command, summaries) -> Section:
    *_, last = summaries.values()
    seconds = sum(summary.get("seconds") or 0 for summary in summaries.values())
    rows = [("seconds of all stages", number(seconds))]
    rows += [(name, str(value)) for part in ("machine", "versions") for name, value in last.get(part, {}).items()]
    return Section("Made with", [f"command: {command}"] if command else [], [(("", ""), rows)])


def number(value: Any) -> str:
    """A number, or an interval, as text; empty for anything else."""
    if isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value):
        return " to ".join(map(number, value)) if len(value) == 2 else ", ".join(map(number, value))
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return ""
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def short(text: str) -> str:
    """The text, or its two ends where it is long."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}\n[...]\n{text[-half:]}"


def html(title: str, made: list[Section]) -> str:
    """The page. Every text is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return environment.from_string(PAGE).render(title=title, sections=made)


def markdown(title: str, made: list[Section], folder: Path) -> str:
    """The same as Markdown, with links to the pictures from `folder`."""

    def line(cells):
        return f"| {' | '.join(map(_escaped, cells))} |"

    lines = [f"# {_escaped(title)}", ""]
    for section in made:
        lines += [f"## {_escaped(section.title)}", ""]
        for said in section.lines:
            lines += [_escaped(said), ""]
        for header, rows in section.tables:
            lines += [line(header), f"|{'---|' * len(header)}", *map(line, rows), ""]
        for name, text in section.texts:
            fence = "`" * (1 + max(2, *map(len, re.findall("`*", text))))
            lines += [f"{_escaped(name)}:", "", fence, text, fence, ""]
        for name, path in section.pictures:
            lines += [f"![{_escaped(name)}]({os.path.relpath(path, folder).replace(' ', '%20')})", ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """A text on one line whose characters mean nothing in Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
