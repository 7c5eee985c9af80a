"""Plots of a run, as PNG files: losses, reward accuracy, the PPO dashboard, before and after.

Each function takes rows of `metrics.read`, leaves out metrics that they lack, and returns the saved Figure, or None if
there is nothing to plot. A colour is a quantity. A faint line is the value at each step, the bold line is its running
mean, and black dots are held-out evaluations. The number at the end of a curve is the last running mean, or last dot.
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
    "xtick.labelcolor": GREY, "ytick.labelcolor": GREY, "figure.titlesize": 12.5, "figure.titleweight": "bold",
}  # fmt: skip
PANEL, SINGLE = (4.0, 2.75), (5.5, 3.5)  # inches: one panel among others, one alone
DASHED = 0, (4, 3)
STEPS: dict[str, Any] = dict(nbins=5, steps=(1, 2, 5, 10), integer=True)  # ticks of a step axis


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
    name: str  # of the metric, in the rows
    label: str = ""  # written at the curve's end if the panel has several
    color: str = BLUE
    dots: bool = False  # plots each point: held-out evaluations are few


@dataclasses.dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]
    x: str = "training step"
    view: tuple[float, float] = (-np.inf, np.inf)  # limits of the y axis: for values with bounds, or that diverge
    level: tuple[float, str] | None = None  # a reference value, and its name


def _trained(stem, metric, color=BLUE, label="training"):
    """The curves of a metric: in training, and its held-out evaluations."""
    return Curve(f"{stem}/{metric}", label, color), Curve(f"{stem}/eval_{metric}", "held out", BLACK, dots=True)


SFT_LOSS = Panel("Fine-tuning loss", "cross-entropy (nats per token)", _trained("sft", "loss"))
SFT_GOLD = Panel("Gold score of samples", "true reward (at most 1)", (Curve("sft/gold", color=AMBER, dots=True),))
SFT_REWARD = Panel("Reward of samples", "mean reward", (Curve("sft/reward", color=AMBER, dots=True),))
PRETRAIN_LOSS = Panel("Pretraining loss", "cross-entropy (nats per token)", _trained("pretrain", "loss"))
PRETRAIN_REWARD = Panel("Reward of samples", "mean reward", (Curve("pretrain/reward", color=AMBER, dots=True),))
SUPERVISED = {"pretrain": (PRETRAIN_LOSS, PRETRAIN_REWARD), "sft": (SFT_LOSS, SFT_GOLD, SFT_REWARD)}
REWARD_LOSS = Panel("Reward model loss", "Bradley-Terry (nats per pair)", _trained("reward", "loss"),
                    level=(np.log(2), "coin flip"))  # fmt: skip
ACCURACY = Panel("Reward model accuracy", "pairs ranked as labelled", _trained("reward", "accuracy", GREEN),
                 view=(0, 1.01), level=(0.5, "coin flip"))  # fmt: skip
MARGIN = Panel("Reward margin", "score of chosen minus rejected", (Curve("reward/margin", color=PURPLE),))


def _rl(title, unit, *curves, **view):
    return Panel(title, unit, curves, x="iteration", **view)


def _both(metric, color=BLUE):
    """The curve of a metric in rollouts and its held-out evaluations."""
    return Curve(metric, "rollouts", color), Curve(f"eval_{metric}", "held out", BLACK, dots=True)


RL = {  # names in the rows are without the stage's
    "score": _rl("Learned score", "reward model's score", *_both("score")),
    "reward": _rl("Reward", "mean of a rollout", *_both("reward", AMBER)),
    "gold": _rl("Gold score", "true reward (at most 1)", *_both("gold", AMBER)),
    "kl": _rl("KL from the reference", "nats per response",
              Curve("kl", "k1"), Curve("kl_k3", "k3", PURPLE), Curve("kl_exact", "exact", GREEN)),
    "entropy": _rl("Entropy of the policy", "nats per token", Curve("entropy", color=PURPLE)),
    "distinct2": _rl("Distinct word bigrams", "share of a rollout's", Curve("distinct2", color=GREEN), view=(0, 1.01)),
    "repeat_rate": _rl("Samples that repeat a word", "share with one word 4 times", *_both("repeat_rate", PURPLE),
                       view=(0, 1.01)),
    "length": _rl("Response length", "tokens", *_both("length")),
    "eos_rate": _rl("Responses that end", "share with EOS", *_both("eos_rate", GREEN), view=(0, 1.01)),
    "clip_fraction": _rl("Clip fraction", "share of token ratios clipped", Curve("clip_fraction", color=GREEN),
                         view=(0, 1)),
    "approx_kl": _rl("Size of an update", "KL, old to new (nats per token)", Curve("approx_kl")),
    "ess": _rl("Effective sample size", "share of the tokens, last epoch", Curve("ess_last", color=GREEN),
               view=(0, 1.01)),
    "explained_variance": _rl("Explained variance of the value", "1 is perfect, 0 a constant",
                              Curve("explained_variance", color=PURPLE), view=(-1, 1.01)),
    "policy_loss": _rl("Policy loss", "surrogate", Curve("policy_loss")),
    "value_loss": _rl("Value loss", "half the squared error", Curve("value_loss", color=PURPLE)),
}  # fmt: skip


@_styled
def supervised(rows, path, stage="sft"):
    """Training and held-out loss of "sft" or "pretrain", and the score of its samples if it was measured."""
    return _save(_panels(SUPERVISED[stage], rows), path)


@_styled
def rl(rows, directory, stage, *, best_of_n=None):
    """directory/<stage>.png with every panel, and a file for each: {file name without .png: Figure}.

    Gold beside the learned score is over_optimization.png. With best_of_n, evaluate.best_of_n.curve's,
    reward_over_kl.png sets the policy beside it. Where rows have `_ci95` of a curve, its band is drawn.
    """
    rows = bare(rows, stage)
    plotters = {name: _panels([panel], rows) for name, panel in RL.items()}
    plotters["over_optimization"] = _score_and_gold(rows, x="kl")
    if best_of_n:
        plotters["reward_over_kl"] = [partial(_frontier, rows=rows, best_of_n=best_of_n)]
    plotters[stage] = [plotter for some in plotters.values() for plotter in some]
    figures = {name: _save(some, Path(directory) / f"{name}.png") for name, some in plotters.items()}
    return {name: figure for name, figure in figures.items() if figure}


def bare(rows, stage):
    """Rows of metrics without the stage's name before the slash."""
    return [{name.removeprefix(f"{stage}/"): value for name, value in row.items()} for row in rows]


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


@_styled
def reward(rows, path, stage="reward"):
    """Loss, accuracy and margin of the reward model, beside what a coin flip scores."""
    return _save(_panels([REWARD_LOSS, ACCURACY, MARGIN], rows), path)


@_styled
def pipeline(rows, path, title):
    """A whole run in one picture: the losses, what reinforcement learning gained, and what that cost in KL.

    rows is {stage: its rows of metrics}, the last stage the one of reinforcement learning.
    """
    panels = {"pretrain": PRETRAIN_LOSS, "sft": SFT_LOSS, "reward": ACCURACY}
    *before, last = rows
    plotters = [plotter for stage in before for plotter in _panels([panels[stage]], rows[stage])]
    found = bare(rows[last], last)
    gain = _score_and_gold(found, x="step") or _panels([RL["score"], RL["reward"]], found)
    cost = (
        [RL["kl"]]
        if len(before) == 2 and "reward" in rows
        else [RL[name] for name in ("kl", "distinct2", "repeat_rate")]
    )
    return _save(plotters + gain + _panels(cost, found), path, columns=2, title=title)


@_styled
def before_after(before_N, after_N, path, *, name, win_rate, learner="PPO"):
    """Scores of the same N prompts under SFT and the learner: both distributions, and the change of each prompt.

    `name` is the name of the score; `win_rate` is (rate, (low, high)) as from evaluate.win_rate.
    """
    before_N, after_N = np.asarray(before_N, np.float64), np.asarray(after_N, np.float64)
    if not before_N.size:
        return None
    rate, (low, high) = win_rate
    between = f"(95% interval {low:.0%} to {high:.0%})"
    title = f"Win rate of {learner} over SFT: {rate:.0%} of {before_N.size:,} prompts {between}"
    distributions = partial(_distributions, scores={"SFT": before_N, learner: after_N}, name=name)
    return _save(
        [distributions, partial(_changes, change_N=after_N - before_N, name=name, learner=learner)], path, title=title
    )


def _save(plotters, path, *, columns=3, title=None):
    """Writes a Figure to `path`, with a cell for each of `plotters`, which are functions of axes."""
    if not plotters:
        return None
    columns = min(columns, len(plotters))
    lines = -(-len(plotters) // columns)
    width, height = PANEL if len(plotters) > 1 else SINGLE
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines + (0.4 if title else 0)))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1, wspace=0.02, hspace=0.04)
    for index, plot in enumerate(plotters, 1):
        plot(figure.add_subplot(lines, columns, index))
    if title:
        figure.suptitle(title, x=0.012, ha="left")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


def _panels(panels, rows):
    """A plotter for each panel that has values in `rows`."""
    return [partial(_panel, panel=panel, rows=rows) for panel in panels if _present(panel, rows)]


def _present(panel, rows):
    """[(curve, steps, values)] of the curves with a finite value."""
    curves = [(curve, *series(rows, curve.name)) for curve in panel.curves]
    return [(curve, steps, values) for curve, steps, values in curves if np.isfinite(values).any()]


def _panel(axes, panel, rows):
    present, ends = _present(panel, rows), []
    if panel.level:
        axes.axhline(panel.level[0], color=GREY, linewidth=1, linestyle=DASHED)
        ends.append((*panel.level, GREY))
    for curve, steps, values in present:
        if curve.dots:
            axes.plot(steps, values, "o-", color=curve.color, markersize=4, linewidth=0.8, label=curve.name, zorder=3)
        else:
            axes.plot(steps, values, color=curve.color, linewidth=0.7, alpha=0.3)
            values = smooth(values)
            band_steps, half = series(rows, f"{curve.name}_ci95")  # of several seeds
            if len(band_steps) == len(steps):
                half = smooth(half)
                axes.fill_between(steps, values - half, values + half, color=curve.color, alpha=0.2, linewidth=0)
            marker = "o" if len(steps) == 1 else None
            axes.plot(steps, values, color=curve.color, linewidth=2, marker=marker, label=curve.name)
        last = values[np.isfinite(values)][-1]
        ends.append((last, f"{curve.label if len(present) > 1 else ''} {_number(last)}".strip(), curve.color))
    low, high = np.clip(axes.get_ylim(), *panel.view)
    if low < high:  # otherwise all values are out of view, and all are shown
        axes.set_ylim(low, high)
    axes.set(title=panel.title, ylabel=panel.unit, xlabel=panel.x)
    _step_ticks(axes)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _label_ends(axes, ends)


def _step_ticks(axes):
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(**STEPS))


def _label_ends(axes, ends):
    """Writes each (value, text, color) to the right of the axes, near the height of its value, without overlap."""
    low, high = axes.get_ylim()
    heights = [float(np.clip((value - low) / (high - low), 0, 1)) for value, _, _ in ends]
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
        side.set_ylabel(panel.title.lower(), color=curve.color)
        side.tick_params(axis="y", labelcolor=curve.color)
        side.grid(visible=side is axes)
    axes.set(title="Learned and gold score", xlabel="iteration")
    if over_kl:  # an estimate of KL may be negative: its root is set to 0
        axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        axes.set(title="Over-optimization", xlabel="KL from the reference (nats, square root scale)", xlim=(0, None))
    _step_ticks(axes)


def _frontier(axes, rows, best_of_n):
    """Reward over KL. A policy below the curve of best-of-n has less reward than best-of-n at the same KL."""
    points_N3 = np.array(best_of_n)
    axes.plot(points_N3[:, 2], points_N3[:, 1], ".-", color=GREY, linewidth=1, markersize=4, label="best of n")
    for n, score, nats in points_N3:
        if int(n) in (1, 4, 16):
            axes.annotate(
                f"best of {n:.0f}", (nats, score), (5, -9), textcoords="offset points", color=GREY, fontsize=7
            )
    names = "eval_kl_exact", "eval_reward" if any("eval_reward" in row for row in rows) else "eval_score"
    points_N2 = np.array([[row[name] for name in names] for row in rows if all(name in row for name in names)])
    if len(points_N2):
        axes.plot(*points_N2.T, "o-", color=AMBER, linewidth=1, markersize=3.5, label="policy")
        axes.plot(*points_N2[-1], "o", color=BLACK, markersize=7, label="kept", zorder=4)
    axes.set(title="Reward over KL", xlabel="exact KL from the SFT policy (nats per sample)", ylabel="mean reward")
    axes.legend(frameon=False, loc="lower right")


def _distributions(axes, scores, name):
    for (label, scores_N), color, height in zip(scores.items(), (GREY, BLUE), (0.15, 0.05), strict=True):
        axes.ecdf(scores_N, complementary=True, color=color, linewidth=2, label=label)
        axes.axvline(scores_N.mean(), color=color, linewidth=1, linestyle=DASHED)
        axes.text(0.02, height, f"{label}, mean {_number(scores_N.mean())}", color=color, transform=axes.transAxes)
    axes.set(title=f"Distribution of the {name}", xlabel=name, ylabel="share of prompts at or above")


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


def _number(value):
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


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
