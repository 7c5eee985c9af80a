"""Over-optimization: how the truth falls while the learned reward rises (Gao et al. 2022, arXiv 2210.10760).

Best-of-n and reinforcement learning at several KL coefficients go away from the same fine-tuned policy, by the same
reward model. The mean learned reward (proxy) and the gold score are set against d = sqrt(KL). Best-of-n is also done
by reward models of fewer pairs, which are over-optimized sooner.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import fields, pipeline
from rlhf_jax.commands import evaluate
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import scaling
from rlhf_jax.report import metrics, plots
from rlhf_jax.report.console import Silent

FOLDER = "overoptimization"  # of a workdir


@dataclasses.dataclass(frozen=True)
class Settings:
    """How far each way is followed."""

    kl_coefs: str = "0,0.02,0.05,0.2"  # of reinforcement learning, with commas
    seeds: int = fields.number(3, least=1, most=100)  # of reinforcement learning, for each coefficient
    n: int = fields.number(256, least=4, most=4096)  # largest n of best-of-n
    samples: int = fields.number(512, least=4, most=10_000)  # of a prompt: n of them are the best's competitors
    prompts: int = fields.number(64, least=2)  # held-out prompts of best-of-n, at most
    pairs: str = "100,1000"  # numbers of pairs of further reward models, with commas; empty: none

    def problems(self):
        """Checks beyond ranges."""
        if self.n > self.samples:
            yield "n", f"at most samples = {self.samples}"
        if len(set(self.coefs)) < len(self.kl_coefs.split(",")):
            yield "kl_coefs", "different numbers of at least 0, with commas"
        if self.pairs and len({size for size in self.sizes if size >= 1}) < len(self.pairs.split(",")):
            yield "pairs", "different whole numbers of at least 1, with commas, or nothing"

    @property
    def coefs(self) -> list[float]:
        """The coefficients as numbers; those that are none are left out."""
        return [value for value in _numbers(self.kl_coefs) if 0 <= value <= fields.LARGEST]

    @property
    def sizes(self) -> list[int]:
        """The numbers of pairs; what is no whole number is left out."""
        return [int(value) for value in _numbers(self.pairs) if value == value // 1]


def _numbers(texts: str) -> list[float]:
    """The numbers among texts with commas between them."""
    found = []
    for text in texts.split(","):
        with contextlib.suppress(ValueError):
            found.append(float(text))
    return found


@dataclasses.dataclass(frozen=True)
class Points:
    """Points on the ways from the first policy, [N] each; points with the same group are not independent."""

    kl: np.ndarray  # nats
    proxy: np.ndarray  # gain in the learned reward
    gold: np.ndarray  # gain in the gold score
    group: np.ndarray  # of a prompt, or of a run
    label: list[str]


def study(config, workdir, settings: Settings, reporter=None, stop=None) -> dict[str, Any]:
    """Trains what is missing, samples, fits and draws: a nested dict, also in workdir/overoptimization/summary.json.

    What is finished is not done again. Raises InputError, before anything is trained, where gold is not known.
    """
    fields.check(settings)
    reporter, workdir = reporter or Silent(), Path(workdir).expanduser()
    if not (config.learned and config.task == "summarize" and config.data.source == "world"):
        raise InputError(
            "config: expected a learned reward on the embedded world (data.source = world), whose gold is known"
        )
    if least := [size for size in settings.sizes if size < config.reward.batch]:
        raise InputError(f"pairs: expected at least reward.batch = {config.reward.batch}, got {least[0]}")
    train(config, workdir, settings, reporter, stop)
    rewards, gold_QO = sample(workdir, settings, reporter)
    by_name = {name: best_of_n(reward_QO, gold_QO, settings.n) for name, reward_QO in rewards.items()}
    found = {"best_of_n": by_name.pop("best_of_n"), "rl": of_runs(config, workdir, settings)} | by_name
    result = summary(found)
    result["settings"] = dataclasses.asdict(settings)
    metrics.summarize(workdir / FOLDER / "summary.json", result)
    fits = {name: fit_of(name, points) for name, points in found.items()}
    plots.over_optimization(found, fits, workdir / FOLDER / "over_optimization.png")
    return result


def place(workdir: Path, coef: float) -> Path:
    """The workdir of the runs with a coefficient."""
    return workdir / FOLDER / f"kl_coef-{coef:g}"


def train(config, workdir: Path, settings: Settings, reporter, stop=None) -> None:
    """Fine-tuning and the reward model in `workdir`, the smaller reward models, and the runs of each coefficient."""
    steps = pipeline.Stages(config, pipeline.Workdir(workdir), reporter)
    for name in steps.names[:-1]:
        if not steps.finished(name):
            steps.one(name, stop)
    shared = {name: dataclasses.replace(getattr(config, name), from_=str(workdir)) for name in ("sft", "reward")}
    for size in settings.sizes:
        data = dataclasses.replace(config.data, world_preferences=size)
        fewer = dataclasses.replace(config, data=data, sft=shared["sft"])
        steps = pipeline.Stages(fewer, pipeline.Workdir(of_pairs(workdir, size)), reporter)
        if not steps.finished("reward"):
            steps.one("reward", stop)
    for coef in settings.coefs:
        section = dataclasses.replace(config.rl, kl_coef=coef)
        other = dataclasses.replace(config, seeds=settings.seeds, **shared, **{config.algorithm: section})
        pipeline.run(other, place(workdir, coef), reporter, stop)


def of_pairs(workdir: Path, size: int) -> Path:
    """The workdir of the reward model of so many pairs."""
    return workdir / FOLDER / f"pairs-{size}"


def sample(workdir: Path, settings: Settings, reporter) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({"best_of_n": learned reward, ...}, gold), each [prompts, samples], of samples of the fine-tuned policy.

    There is a learned reward for each reward model. The samples are kept in the workdir.
    """
    config = configs.read(workdir)
    how = evaluate.Settings(stage="sft", rows=settings.prompts, temperature=config.rl.temperature)
    run = evaluate.opened(
        workdir, config, rlhf_jax.load(workdir, "sft"), how, repeat=settings.samples, reporter=reporter
    )
    made = run.completions(workdir, "sft")
    gold_N = np.asarray(run.scores["gold"]([each["completion"] for each in made]), np.float64)
    rewards = {"best_of_n": run.rewarded(made)}
    for size in settings.sizes:
        model = rlhf_jax.load(of_pairs(workdir, size), "reward")
        rewards[f"best_of_n, {size} pairs"] = dataclasses.replace(run, model=model).rewarded(made)
    shape = (-1, settings.samples)
    return {name: reward_N.reshape(shape) for name, reward_N in rewards.items()}, gold_N.reshape(shape)


def best_of_n(reward_QO: np.ndarray, gold_QO: np.ndarray, most: int) -> Points:
    """The points of n = 2, 4, 8, ... of each prompt; the KL of n is log n - (n - 1) / n."""
    sizes = [2**i for i in range(1, most.bit_length())]
    found = []
    for q, (reward_O, gold_O) in enumerate(zip(reward_QO, gold_QO, strict=True)):
        for n in sizes:
            proxy, gold = scaling.best_of_n(reward_O, gold_O, n)
            found.append((np.log(n) - (n - 1) / n, proxy - reward_O.mean(), gold - gold_O.mean(), q))
    kl, proxy, gold, group = map(np.array, zip(*found, strict=True))
    return Points(kl, proxy, gold, group, [f"best of {n}" for _ in reward_QO for n in sizes])


def of_runs(config, workdir: Path, settings: Settings) -> Points:
    """The points of every evaluation of every run, over the evaluation of the first policy."""
    found: list[tuple] = []
    labels: list[str] = []
    name = configs.rl_name(config)
    for coef in settings.coefs:
        for seed in range(settings.seeds):
            folder = place(workdir, coef)
            folder = folder / "seeds" / str(seed) if settings.seeds > 1 else folder
            rows = plots.bare(metrics.read(folder / name / "metrics.jsonl"), name)
            first, *others = [row for row in rows if "eval_gold" in row]
            for row in others:
                gains = (row["eval_score"] - first["eval_score"], row["eval_gold"] - first["eval_gold"])
                found.append((max(row["eval_kl_exact"], 1e-9), *gains, len(labels)))
            labels.append(f"kl_coef {coef:g}, seed {seed}")
    kl, proxy, gold, group = map(np.array, zip(*found, strict=True))
    return Points(kl, proxy, gold, group, [labels[i] for i in group])


def fit_of(kind: str, points: Points) -> scaling.Fit:
    """The curve of the gold score."""
    return scaling.fit(kind.split(",")[0], points.kl, points.gold, points.group)


def summary(found: dict[str, Points]) -> dict[str, Any]:
    """Each way's fit, peak and points; points with the same label and KL are means."""
    result: dict[str, Any] = {}
    for kind, points in found.items():
        fitted = fit_of(kind, points)
        rows = []
        for label, kl in dict.fromkeys(zip(points.label, points.kl.tolist(), strict=True)):
            here_N = np.array([each == label for each in points.label]) & (points.kl == kl)
            gains = {"proxy": float(points.proxy[here_N].mean()), "gold": float(points.gold[here_N].mean())}
            rows.append({"label": label, "kl": kl} | gains)
        result[kind] = dataclasses.asdict(fitted) | {"points": rows}
    return result


def show(result: dict[str, Any], reporter) -> None:
    """Prints the fits and what was best."""
    rows = []
    for kind, each in result.items():
        if kind == "settings":
            continue
        best = max(each["points"], key=lambda point: point["gold"])
        ends = each["peak_ci95"]
        within = "outside the data" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
        rows.append((kind, each["a"], each["b"], each["peak"], within, best["gold"], best["label"], best["kl"]))
    header = ("", "a", "b", "peak, sqrt(KL)", "95%", "best gold gain", "of", "KL, nats")
    reporter.table(header, rows)
