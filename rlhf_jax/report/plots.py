"""Plots of a run, as PNG files: losses, reward accuracy, the dashboard of reinforcement learning, before and after.

Each function takes rows of `metrics.read`, leaves out metrics that they lack, and returns the saved Figure, or None if
there is nothing to plot. A colour is a quantity. A faint line is the value at each step, the bold line is its running
mean, and black dots are held-out evaluations; a ring is the one whose policy was kept. The number at the right of a
curve is its last running mean, or last dot. Nothing is written inside the axes, where a curve could cross it.
"""

import dataclasses
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.report.metrics import series

# Okabe and Ito's colours, distinct in any colour vision; darkened, so that text in them can be read.
BLUE, AMBER, GREEN, PURPLE, BLACK, GREY = "#0072B2", "#B36B00", "#007A5A", "#B0578D", "#222222", "#767676"
STYLE: dict[Any, Any] = {
    "figure.dpi": 130, "savefig.dpi": 130, "font.family": "DejaVu Sans", "font.size": 9, "text.color": BLACK,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9,
    "axes.labelcolor": GREY, "axes.edgecolor": "#BBBBBB", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.xmargin": 0.02, "axes.ymargin": 0.08,
    "grid.color": "#ECECEC", "grid.linewidth": 0.8, "xtick.color": "#BBBBBB", "ytick.color": "#BBBBBB",
    "xtick.labelcolor": GREY, "ytick.labelcolor": GREY, "figure.titlesize": 11, "figure.titleweight": "bold",
}  # fmt: skip
PANEL, SINGLE = (4.0, 2.75), (5.5, 3.5)  # inches: one panel among others, one alone
DASHED = 0, (4, 3)
STEPS: dict[str, Any] = dict(nbins=5, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1)  # ticks of a step axis
LONGEST = 14  # characters of a component's name
MARKERS = "osD^vPX"  # of runs; with ten colours, seventy differ
FEW = 20  # points of a curve that are drawn large
WIDE = 9  # characters of a title in an inch


def _styled(function):
    """The function, drawing in STYLE. Matplotlib is imported by the first drawing: that takes half a second."""

    @wraps(function)
    def styled(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return styled


@dataclasses.dataclass(frozen=True)
class Curve:
    name: str  # of the metric, without the stage's
    label: str = ""  # written at the curve's end if the panel has several
    color: str = BLUE
    kind: str = "mean"  # mean: a running mean over faint values; line: the values; dots: each of them, as they are few


@dataclasses.dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]
    view: tuple[float, float] = (-np.inf, np.inf)  # limits of the y axis: for values with bounds, or that diverge
    level: tuple[float, str] | None = None  # a reference value, and its name


def _one(metric, color=BLUE, kind="mean"):
    return (Curve(metric, "", color, kind),)


def _both(metric, color=BLUE, label="rollouts"):
    """The curve of a metric in training, and its held-out evaluations."""
    return Curve(metric, label, color), Curve(f"eval_{metric}", "held out", BLACK, "dots")


LR = Panel("Learning rate", "at the step's first update", _one("lr", GREY, "line"))
LOSS = {
    stage: Panel(f"{name} loss", "cross-entropy (nats per token)", _both("loss", label="training"))
    for stage, name in (("pretrain", "Pretraining"), ("sft", "Fine-tuning"))
}
SAMPLED = (
    Panel("Gold score of samples", "true reward (at most 1)", _one("eval_gold", AMBER, "dots")),
    Panel("Reward of samples", "mean reward", _one("eval_reward", AMBER, "dots")),
)
COIN = "coin flip"
ACCURACY = Panel("Reward model accuracy", "pairs ranked as labelled", _both("accuracy", GREEN, "training"),
                 view=(0, 1.01), level=(0.5, COIN))  # fmt: skip
REWARD = (
    Panel("Reward model loss", "Bradley-Terry (nats per pair)", _both("loss", label="training"),
          level=(np.log(2), COIN)),
    ACCURACY,
    Panel("Reward margin", "score of chosen minus rejected", _one("margin", PURPLE)),
    LR,
)  # fmt: skip
RL = {
    "score": Panel("Learned score", "reward model's score", _both("score")),
    "reward": Panel("Reward", "mean of a rollout", _both("reward", AMBER)),
    "judge": Panel("Hold-out judge", "score of a second reward model", _both("judge", AMBER)),
    "gold": Panel("Gold score", "true reward (at most 1)", _both("gold", AMBER)),
    "kl": Panel("KL from the reference", "nats per response",
                (Curve("kl", "k1"), Curve("kl_k3", "k3", PURPLE), Curve("kl_exact", "exact", GREEN))),
    "kl_coef": Panel("KL coefficient", "reward per nat", _one("kl_coef", PURPLE, "line")),
    "entropy": Panel("Entropy of the policy", "nats per token", _one("entropy", PURPLE)),
    "distinct2": Panel("Distinct word bigrams", "share of a rollout's", _one("distinct2", GREEN), view=(0, 1.01)),
    "repeat_rate": Panel("Samples that repeat a word", "share with one word 4 times", _both("repeat_rate", PURPLE),
                         view=(0, 1.01)),
    "length": Panel("Response length", "tokens", _both("length")),
    "eos_rate": Panel("Responses that end", "share with EOS", _both("eos_rate", GREEN), view=(0, 1.01)),
    "clip_fraction": Panel("Clip fraction", "share of token ratios clipped", _one("clip_fraction", GREEN), view=(0, 1)),
    "approx_kl": Panel("Size of an update", "KL, old to new (nats per token)", _one("approx_kl")),
    "ess": Panel("Effective sample size", "share of the tokens, last epoch", _one("ess_last", GREEN), view=(0, 1.01)),
    "explained_variance": Panel("Explained variance of the value", "1 is perfect, 0 a constant",
                                _one("explained_variance", PURPLE), view=(-1, 1.01)),
    "policy_loss": Panel("Policy loss", "surrogate", _one("policy_loss")),
    "value_loss": Panel("Value loss", "half the squared error", _one("value_loss", PURPLE)),
    "lr": LR,
}  # fmt: skip


@_styled
def supervised(rows, path, stage="sft", title=None):
    """Losses of "sft" or "pretrain", what its samples are worth if that was measured, and the learning rate."""
    return _save(_panels([LOSS[stage], *SAMPLED, LR], bare(rows, stage)), path, title=title)


@_styled
def reward(rows, path, stage="reward", title=None):
    """Loss, accuracy and margin of the reward model, beside what a coin flip scores, and the learning rate."""
    return _save(_panels(REWARD, bare(rows, stage)), path, title=title)


@_styled
def rl(rows, directory, stage, *, best_of_n=None, title=None):
    """directory/<stage>.png with every panel, and a file for each: {file name without .png: Figure}.

    Gold beside the learned score is over_optimization.png, the parts of a reward are reward_components.png. With
    best_of_n, evaluate.best_of_n.curve's, reward_over_kl.png sets the policy beside it. Where rows have `_ci95` of a
    curve, its band is drawn.
    """
    rows = bare(rows, stage)
    panels = RL | {"reward_components": _components(rows)}
    plotters = {name: _panels([panel], rows, "iteration") for name, panel in panels.items()}
    plotters["over_optimization"] = _score_and_gold(rows, x="kl")
    if best_of_n:
        plotters["reward_over_kl"] = [partial(_frontier, rows=rows, best_of_n=best_of_n)]
    plotters[stage] = [plotter for some in plotters.values() for plotter in some]
    figures = {name: _save(some, Path(directory) / f"{name}.png", title=title) for name, some in plotters.items()}
    return {name: figure for name, figure in figures.items() if figure}


@_styled
def pipeline(rows, path, title):
    """A whole run in one picture: the losses, what reinforcement learning gained, and what that cost in KL.

    rows is {stage: its rows of metrics}, the last stage the one of reinforcement learning.
    """
    panels = LOSS | {"reward": ACCURACY, "judge": dataclasses.replace(ACCURACY, title="Hold-out judge accuracy")}
    *before, last = rows
    plotters = [plotter for stage in before for plotter in _panels([panels[stage]], bare(rows[stage], stage))]
    found = bare(rows[last], last)
    gain = _score_and_gold(found, x="step") or _panels([RL["score"], RL["reward"]], found, "iteration")
    cost = ("kl",) if len(before) == 2 and "reward" in rows else ("kl", "distinct2", "repeat_rate")
    plotters += gain + _panels([RL[name] for name in cost], found, "iteration")
    return _save(plotters, path, columns=2, title=title)


@_styled
def sweep(points, metric, path, title):
    """The metric of each run over the values of each field, {field: [(value, metric)]}; the line has means."""
    return _save(
        [partial(_field, name=name, pairs=pairs, metric=metric) for name, pairs in points.items()], path, title=title
    )


@_styled
def parallel(points, metric, path, title):
    """Parallel coordinates: a line for each run through its values of the fields and its metric; strong is more.

    points: {field: [(value, metric) of each run]}.
    """
    return _save([partial(_parallel, points=points, metric=metric)], path, title=title)


def _parallel(axes, points, metric):
    numbers = [number for _, number in next(iter(points.values()))]
    columns = {name: ([value for value, _ in pairs], _distinct(pairs)) for name, pairs in points.items()}
    columns[metric] = numbers, sorted(set(numbers))
    heights_FN, low, high = [], min(numbers), max(numbers)
    for x, (name, (values, distinct)) in enumerate(columns.items()):
        if name == metric:
            heights_FN.append([(number - low) / ((high - low) or 1) for number in numbers])
            ends = [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
        else:  # evenly, as values are as often a decade apart as a step
            ends = [(i / max(len(distinct) - 1, 1), str(value)[:LONGEST]) for i, value in enumerate(distinct)]
            heights_FN.append([ends[distinct.index(value)][0] for value in values])
        for y, text in ends[:: max(len(ends) // 8, 1)]:
            axes.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize="small")
        axes.axvline(x, color=BLACK, linewidth=0.5)
    for i in np.argsort(numbers):
        share = (numbers[i] - low) / ((high - low) or 1)
        axes.plot([heights[i] for heights in heights_FN], color=BLUE, alpha=0.15 + 0.85 * share, linewidth=1 + share)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks([])
    axes.set_xlim(0, len(columns) - 0.8)


def _distinct(pairs):
    """The different values of a field, in their order."""
    return list(dict.fromkeys(value for value, _ in sorted(pairs, key=lambda pair: (str(type(pair[0])), pair[0] or 0))))


def _field(axes, name, pairs, metric):
    values = _distinct(pairs)
    numeric = all(type(value) in (int, float) for value in values)
    places = {value: value if numeric else i for i, value in enumerate(values)}
    axes.plot([places[value] for value, _ in pairs], [number for _, number in pairs], "o", color=BLACK, markersize=3)
    means = [np.mean([number for other, number in pairs if other == value]) for value in values]
    axes.plot([places[value] for value in values], means, color=BLUE, linewidth=2)
    if numeric and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
    if not numeric:
        axes.set_xticks(range(len(values)), [str(value)[:LONGEST] for value in values])
    axes.set(title=name, ylabel=metric)


@_styled
def before_after(before_N, after_N, path, *, name, win_rate, learner="PPO", title=None):
    """Scores of the same N prompts under SFT and the learner: both distributions, and the change of each prompt.

    `name` is the name of the score; `win_rate` is (rate, (low, high)) as from evaluate.win_rate.
    """
    before_N, after_N = np.asarray(before_N, np.float64), np.asarray(after_N, np.float64)
    if not before_N.size:
        return None
    rate, (low, high) = win_rate
    between = f"(95% interval {low:.0%} to {high:.0%})"
    won = f"Win rate of {learner} over SFT: {rate:.0%} of {before_N.size:,} prompts {between}"
    distributions = partial(_distributions, scores={"SFT": before_N, learner: after_N}, name=name)
    changes = partial(_changes, change_N=after_N - before_N, name=name, learner=learner)
    return _save([distributions, changes], path, title=f"{title}\n{won}" if title else won)


REUSE = {  # {name in the results of stages/reuse.py: (title, unit)}
    "ratio_max": ("Largest importance weight", "of a token"),
    "ess_token": ("Effective sample size, tokens", "share of the rollout"),
    "ess": ("Effective sample size, samples", "share of the rollout"),
    "clip_fraction": ("Beyond the clip", "share of token ratios"),
    "kl_exact": ("KL from where it began", "nats per sample"),
    "reward_gain": ("Reward gained", "on fresh samples"),
}


@_styled
def reuse(results, path):
    """Each update after 1, 2, 4 and 8 uses of one rollout; bands are 95% intervals over rollouts."""
    panels = [partial(_reuse, results=results, name=name) for name in REUSE]
    return _save(panels, path, title="One rollout, used again")


SCALING = {  # {name of a count of commands/topology.py: (title, unit, what it is divided by)}
    "flops": ("work", "GFLOP", 1e9),
    "traffic": ("memory read and written", "GB", 1e9),
    "collectives": ("collectives", "MB of results", 1e6),
    "peak": ("peak of memory", "MiB", 2**20),
}
DIVIDED = "draw", "judge", "update"  # programs


@_styled
def compare(curves, path, *, metric, best_of_n=()):
    """The metric of several runs over iterations, samples, seconds and exact KL: {name: arrays [N] by axis}.

    best_of_n: curves of best-of-n, [M, 2] of KL and metric each, to set beside the last.
    """
    axes_of = {
        "iterations": "iteration",
        "samples": "completions",
        "seconds": "seconds",
        "kl": "exact KL from the reference (nats)",
    }
    beside = {x: best_of_n if x == "kl" else () for x in axes_of}
    parts = {"curves": curves, "metric": metric}
    panels = [partial(_curves, **parts, x=x, label=axes_of[x], beside=beside[x]) for x in axes_of]
    return _save(panels, path, columns=2, legend=True)


@_styled
def over_optimization(points, fits, path):
    """Gold and the learned reward over sqrt(KL), with the curve of each fit: {kind: arrays} and {kind: Fit}.

    Points with the same KL are drawn as their mean. More than FEW points are small.
    """
    titles = {"best_of_n": "Best of n", "rl": "Reinforcement learning"}
    panels = []
    for kind in points:
        name, comma, by = kind.partition(",")  # "best_of_n, 100 pairs": by another reward model
        panels.append(partial(_gains, points=points[kind], fit=fits[kind], title=f"{titles[name]}{comma}{by}"))
    return _save(panels, path, columns=2, title="Gain over the fine-tuned policy")


@_styled
def scaling(points, path):
    """What a device does among ever more: the points of commands/topology.py: scaling."""
    panels = [partial(_scaling, points=points, name=name, program=program) for name in SCALING for program in DIVIDED]
    return _save(panels, path, title="A device among ever more: compiled, not timed")


def bare(rows, stage):
    """Rows of metrics without the stage's name before the slash."""
    return [{name.removeprefix(f"{stage}/"): value for name, value in row.items()} for row in rows]


def _components(rows):
    """A panel of the parts of a reward that has several."""
    found = dict.fromkeys(name for row in rows for name in row if name.startswith("reward_"))
    names = [name for name in found if not name.endswith("_ci95")]
    colors = (BLUE, AMBER, GREEN, PURPLE, BLACK, GREY)
    labels = [_short(name.removeprefix("reward_"), LONGEST) for name in names]
    curves = [Curve(*each, colors[i % len(colors)]) for i, each in enumerate(zip(names, labels, strict=True))]
    return Panel("Reward components", "mean of a rollout", tuple(curves))


def _save(plotters, path, *, columns=3, title=None, legend=False):
    """Writes a Figure to `path`, with a cell for each of `plotters`, which are functions of axes.

    legend: what the curves of the first cell are, two in a line under the cells.
    """
    if not plotters:
        return None
    columns = min(columns, len(plotters))
    lines = -(-len(plotters) // columns)
    width, height = PANEL if len(plotters) > 1 else SINGLE
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width * columns, height * lines + (0.4 if title else 0)))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.02, hspace=0.04)
    for index, plot in enumerate(plotters, 1):
        plot(figure.add_subplot(lines, columns, index))
    if title:
        lines = [_short(line, int(WIDE * width * columns)) for line in title.split("\n")]
        figure.suptitle("\n".join(lines), x=0.012, ha="left")
    if legend:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(names) // 2))
        names = [_short(name, int(WIDE * width)) for name in names]
        figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False, fontsize="small")
    layout.execute(figure)  # here, because savefig would draw twice for it
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


def _panels(panels, rows, x="training step"):
    """A plotter for each panel that has values in `rows`."""
    return [partial(_panel, panel=panel, rows=rows, x=x) for panel in panels if _present(panel, rows)]


def _present(panel, rows):
    """[(curve, steps, values)] of the curves with a finite value."""
    curves = [(curve, *series(rows, curve.name)) for curve in panel.curves]
    return [(curve, steps, values) for curve, steps, values in curves if np.isfinite(values).any()]


def _panel(axes, panel, rows, x):
    present, ends = _present(panel, rows), []
    kept_step = rows[-1].get("eval_best_step")  # if the last evaluation is of the policy of that step
    if panel.level:
        axes.axhline(panel.level[0], color=GREY, linewidth=1, linestyle=DASHED)
        ends.append((*panel.level, GREY))
    for curve, steps, values in present:
        label, last = curve.label, values[np.isfinite(values)][-1]
        if curve.kind != "dots":
            last = _line(axes, curve, steps, values, rows)
        elif kept_step is None:
            axes.plot(steps, values, "o-", color=curve.color, markersize=4, linewidth=0.8, label=curve.name, zorder=3)
        else:
            label = "kept"
            _with_kept(axes, steps, values, kept_step, curve.color, curve.name)
        ends.append((last, f"{label if len(present) > 1 else ''} {_number(last)}".strip(), curve.color))
    axes.set(title=panel.title, ylabel=panel.unit, xlabel=x)
    _view(axes, panel, np.concatenate([values for *_, values in present]))
    _ticks(axes, **STEPS)
    _label_ends(axes, ends)


def _line(axes, curve, steps, values, rows):
    """Plots the curve, and the band of several seeds; returns the last value, or mean."""
    band_steps, half = series(rows, f"{curve.name}_ci95")
    seeds = len(band_steps) == len(steps)
    if curve.kind == "mean":
        axes.plot(steps, values, color=curve.color, linewidth=0.7, alpha=0.3)
        values, half = smooth(values), smooth(half) if seeds else half
    if seeds:
        axes.fill_between(steps, values - half, values + half, color=curve.color, alpha=0.2, linewidth=0)
    known = np.pad(np.isfinite(values), 1)
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])  # a line needs two points
    marker = {"marker": "o", "markersize": 4, "markevery": alone.tolist()} if len(alone) else {}
    axes.plot(steps, values, color=curve.color, linewidth=2, label=curve.name, **marker)
    return values[np.isfinite(values)][-1]


def _with_kept(axes, x, y, kept_x, color, name):
    """Plots the points (x, y); the last is of the policy that was kept: a ring at kept_x, under the others."""
    axes.plot(kept_x, y[-1], "o", color=BLACK, markerfacecolor="none", markersize=9, label="kept")
    axes.plot(x[:-1], y[:-1], "o-", color=color, markersize=4, linewidth=0.8, label=name, zorder=3)


def _view(axes, panel, values):
    """Cuts the y axis to the panel's view. An axis that leaves values out says so."""
    low, high = panel.view
    values = values[np.isfinite(values)]
    inside = (values >= low) & (values <= high)
    if not inside.any():  # all are shown
        return
    axes.set_ylim(np.clip(axes.get_ylim(), low, high))
    if not inside.all():
        beyond = " and ".join(_number(end) for end in (values.min(), values.max()) if not low <= end <= high)
        axes.set_ylabel(f"{panel.unit}\n(axis cut, values to {beyond})")


def _ticks(axes, **where):
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(**where))
    axes.xaxis.set_major_formatter("{x:,.6g}")


def _label_ends(axes, ends):
    """Writes each (value, text, color) to the right of the axes, near the height of its value, without overlap."""
    scaled = axes.yaxis.get_transform().transform  # of a logarithmic axis too
    low, high, *values = scaled([*axes.get_ylim(), *(value for value, _, _ in ends)])
    heights = [float(np.clip((value - low) / (high - low), 0, 1)) for value in values]
    for height, (_, text, color) in zip(spread(heights, gap=0.075), ends, strict=True):
        axes.annotate(text, (1, height), (4, 0), "axes fraction", "offset points", color=color, va="center")


def _score_and_gold(rows, x):
    """[a plotter of the learned and the gold score over `x`, "step" or "kl"], or [] if no row has all three.

    Over KL it shows over-optimization (Gao et al. 2023): where gold falls while the learned score still rises, the
    policy exploits errors of the reward model.
    """
    names = x, "score", "gold"
    points_N3 = np.array([[row.get(name, np.nan) for name in names] for row in rows]).reshape(-1, 3)
    points_N3 = points_N3[np.isfinite(points_N3).all(axis=1)]
    return [partial(_twins, points_N3=points_N3, over_kl=x == "kl")] if len(points_N3) else []


def _twins(axes, points_N3, over_kl):
    x_N, *both = points_N3.T
    for side, panel, values in zip((axes, axes.twinx()), (RL["score"], RL["gold"]), both, strict=True):
        curve = panel.curves[0]
        side.plot(x_N, values, "." if over_kl else "-", color=curve.color, markersize=3, linewidth=0.7, alpha=0.3)
        side.plot(smooth(x_N), smooth(values), color=curve.color, linewidth=2, label=curve.name)
        if over_kl:
            _direction(side, smooth(x_N), smooth(values), curve.color)
        side.set_ylabel(panel.title.lower(), color=curve.color)
        side.tick_params(axis="y", labelcolor=curve.color)
        side.grid(visible=side is axes)
    axes.set(title="Learned and gold score", xlabel="iteration")
    _ticks(axes, **STEPS)
    if over_kl:  # an estimate of KL may be negative: its root is set to 0
        axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        marks = "\N{WHITE CIRCLE} first iteration, \N{BLACK CIRCLE} last, arrows along time"
        marks += ", values below 0 at 0" * bool((x_N < 0).any())
        axes.set(title="Over-optimization", xlim=(0, None))
        axes.set_xlabel(f"KL from the reference (nats, square root scale)\n{marks}")
        _ticks(axes, nbins=4, steps=(1, 2, 2.5, 5, 10))


def _direction(axes, x_N, y_N, color):
    """Marks where a path starts and ends, and which way it goes."""
    for i, face in (0, "white"), (-1, color):
        axes.plot(x_N[i], y_N[i], "o", color=color, markersize=7, markerfacecolor=face, clip_on=False, zorder=4)
    last = len(x_N) - 1
    for i in sorted({last // 4, last // 2, 3 * last // 4}):
        here, there = (x_N[i], y_N[i]), (x_N[min(i + 1, last)], y_N[min(i + 1, last)])
        if here != there:
            axes.annotate("", there, here, arrowprops={"arrowstyle": "-|>", "color": color, "mutation_scale": 14})


def _frontier(axes, rows, best_of_n):
    """Reward over KL. A policy below the curve of best-of-n has less reward than best-of-n at the same KL."""
    n_N, score_N, nats_N = np.array(best_of_n).T
    axes.plot(nats_N, score_N, ".-", color=GREY, linewidth=1, markersize=4, label="best of n")
    ends = [(score_N[-1], f"best of {n_N[-1]:.0f}", GREY)]
    names = "eval_kl_exact", "eval_reward" if any("eval_reward" in row for row in rows) else "eval_score"
    points_N2 = np.array([[row[name] for name in names] for row in rows if all(name in row for name in names)])
    if len(points_N2):
        kl_N, reward_N = points_N2.T
        _with_kept(axes, kl_N, reward_N, kl_N[-1], AMBER, "policy")
        ends.append((reward_N[-1], f"kept {_number(reward_N[-1])}", BLACK))
    axes.set(title="Reward over KL", xlabel="exact KL from the SFT policy (nats per sample)", ylabel="mean reward")
    _label_ends(axes, ends)


def _distributions(axes, scores, name):
    ends = []
    for (label, scores_N), color in zip(scores.items(), (GREY, BLUE), strict=True):
        axes.ecdf(scores_N, complementary=True, color=color, linewidth=2, label=label)
        axes.axvline(scores_N.mean(), color=color, linewidth=1, linestyle=DASHED)
        ends.append((0.1, f"{label} {_number(scores_N.mean())}", color))
    axes.set(title=f"Distribution of the {name}", xlabel=f"{name} (dashed: means)", ylabel="share of prompts above")
    _label_ends(axes, ends)


def _changes(axes, change_N, name, learner):
    """The change of each prompt, sorted from the most improved to the most worsened."""
    change_N, edges = np.sort(change_N)[::-1], np.linspace(0, 100, change_N.size + 1)
    better_N, worse_N = change_N > 0, change_N < 0
    for kind_N, color in (better_N, BLUE), (worse_N, AMBER):
        axes.stairs(np.where(kind_N, change_N, 0), edges, fill=True, color=color, alpha=0.45)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    shares = f"{better_N.mean():.0%} better, {worse_N.mean():.0%} worse"
    axes.set(
        title="Change of each prompt", xlabel=f"% of prompts, sorted: {shares}", ylabel=f"{name}, {learner} minus SFT"
    )


def _reuse(axes, results, name):
    title, unit = REUSE[name]
    ends = []
    for (update, by_uses), color in zip(results.items(), (GREY, AMBER, BLUE), strict=True):
        uses = np.array([int(uses) for uses in by_uses])
        values = np.array([numbers[name] for numbers in by_uses.values()])
        half = np.array([numbers.get(f"{name}_ci95", 0) for numbers in by_uses.values()])
        axes.fill_between(uses, values - half, values + half, color=color, alpha=0.15, linewidth=0)
        axes.plot(uses, values, "o-", color=color, linewidth=1.5, markersize=4)
        ends.append((values[-1], update.replace("_", " "), color))
    axes.set_xscale("log", base=2)
    axes.set(title=title, ylabel=unit, xlabel="gradient steps on the rollout", xticks=uses, xticklabels=uses)
    _label_ends(axes, ends)


def _scaling(axes, points, name, program):
    from matplotlib.ticker import LogLocator, NullLocator

    title, unit, one = SCALING[name]
    axes.set_xscale("log", base=2)
    if name != "collectives":  # there may be none
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    ends = []
    for kind, line in (("strong", "-"), ("weak", "--")):
        for mesh, color in (("data", BLUE), ("fsdp", AMBER)):
            own = [point for point in points if (point["scaling"], point["mesh"]) == (kind, mesh)]
            devices_N = np.array([point["devices"] for point in own])
            values_N = np.array([point["programs"][program][name] for point in own]) / one
            axes.plot(devices_N, values_N, f"{line}o", color=color, linewidth=1.5, markersize=3.5)
            ends.append((values_N[-1], f"{kind}, {mesh} {_number(values_N[-1])}", color))
    ticks_N = devices_N[:: 1 + len(devices_N) // 7]  # 128 and 256 would touch
    axes.set(title=f"{program}: {title}", ylabel=unit, xlabel="devices", xticks=ticks_N, xticklabels=ticks_N)
    _label_ends(axes, ends)


def _curves(axes, curves, x, label, metric, beside):
    for points_M2 in beside:
        axes.plot(*points_M2.T, linestyle=DASHED, color=GREY, linewidth=1)
    if ends := [tuple(points_M2[-1]) for points_M2 in beside if len(points_M2)]:
        axes.annotate("best of n", max(ends), (4, 0), textcoords="offset points", color=GREY, va="center")
    for i, (name, arrays) in enumerate(curves.items()):
        if len(y_N := arrays["value"]):
            looks = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
            axes.plot(arrays[x], y_N, label=f"{name} {_number(y_N[-1])}", **looks)
    axes.set(title=f"By {label.partition(' (')[0]}", xlabel=label, ylabel=f"held-out {metric}")
    _ticks(axes, nbins=5, steps=(1, 2, 5, 10))


def _gains(axes, points, fit, title):
    ends = []
    for name, color in ("proxy", BLUE), ("gold", AMBER):
        gain_N = getattr(points, name)
        kl_M, place_N = np.unique(points.kl, return_inverse=True)
        mean_M = np.bincount(place_N, gain_N) / np.bincount(place_N)
        looks = {"marker": "o"} if len(kl_M) <= FEW else {"marker": ".", "alpha": 0.6}
        axes.plot(np.sqrt(kl_M), mean_M, linestyle="", color=color, markersize=4, label=name, **looks)
        label = "learned reward" if name == "proxy" else name
        ends.append((mean_M[-1], f"{label} {_number(mean_M[-1])}", color))
    d_N = np.linspace(fit.most / 100, fit.most, 200)
    axes.plot(d_N, fit(d_N), color=AMBER, linewidth=1.5)
    said = "peak of the fit outside the data"
    if fit.peak is not None:
        axes.axvline(fit.peak, color=GREY, linewidth=1, linestyle=DASHED)
        said = f"peak of the fit at {_number(fit.peak)} ({_number(fit.peak_ci95[0])} to {_number(fit.peak_ci95[1])})"
    axes.set(title=title, ylabel="gain", xlabel=f"square root of the KL (nats)\n{said}")
    _label_ends(axes, ends)


def _number(value):
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _short(text, most):
    """The text without its middle, if it has more characters than that."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def smooth(values):
    """Centred running mean over a twentieth of the curve, of fewer values at its ends; NaN are skipped."""
    half = len(values) // 40
    kernel, known = np.ones(2 * half + 1), np.isfinite(values)
    count = np.convolve(known, kernel, "full")[half : half + len(values)]
    total = np.convolve(np.where(known, values, 0), kernel, "full")[half : half + len(values)]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def spread(heights, *, gap):
    """Moves the heights in [0, 1] apart until no two are closer than `gap`; their order is kept."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, np.float64)
    for _ in range(100):
        for lower, upper in zip(order, order[1:], strict=False):
            push = max(0, gap - (placed[upper] - placed[lower])) / 2
            placed[lower], placed[upper] = placed[lower] - push, placed[upper] + push
    return placed
