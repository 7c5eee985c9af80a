"""Reinforcement learning: any policy algorithm, any reward, any task. `Iteration` is the one place of an iteration.

    sample (compiled) -> judge (compiled): reference, KL, values -> reward -> learn (compiled): advantages and update

The device judges while the host decodes texts and computes a reward of theirs.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import alarms, rewards, rollout
from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.evaluate import best_of_n, diversity, interval, rouge, win_rate
from rlhf_jax.report import metrics, plots
from rlhf_jax.stages import Evaluation, Setup, Stage, Step, Summary, row_keys
from rlhf_jax.training import optim, sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Iteration:
    """The compiled functions of one iteration. Stages, the benchmark and the memory plan call these."""

    algorithm: ModuleType  # algorithms/policy.py says what it has
    config: policy_algorithm.Config
    apply: rollout.Apply
    sampling: Any  # generate.Sampling
    guard: str = "stop"
    jit: Callable = jax.jit

    @functools.cached_property
    def tx(self):
        """The optimizer."""
        return optim.adamw(self.config, self.config.updates)

    def begin(self, policy, key, *, value=None, reward=None):
        """The TrainState before the first iteration."""
        value = value if self.algorithm.NEEDS_VALUE else None
        return policy_algorithm.init(policy, key, config=self.config, tx=self.tx, value=value, reward=reward)

    @functools.cached_property
    def sample(self):
        """(state, prompt_BP, prompt_mask_BP) -> completions of the policy, a generate.State."""

        def sample(state, *prompts):
            keys_B = rollout.keys(state, self.config.batch)
            drawn = rollout.draw(self.apply, state.policy, *prompts, keys_B, self.sampling)
            return drawn.replace(step=None, keys_B=None, cache=None)  # what nobody needs any more

        return self.jit(sample)

    @functools.cached_property
    def judge(self):
        """(state, prompt_BP, prompt_mask_BP, completions) -> Rollout without a score."""

        def judge(state, prompt_BP, prompt_mask_BP, drawn):
            return rollout.judge(self.apply, state, prompt_BP, prompt_mask_BP, drawn, self.sampling)

        return self.jit(judge)

    @functools.cached_property
    def learn(self):
        """(state, scored Rollout) -> (state, numbers); the state is donated."""
        parts = {"config": self.config, "apply": self.apply, "tx": self.tx, "guard": self.guard}
        learn = functools.partial(policy_algorithm.step, self.algorithm, **parts)
        return self.jit(learn, donate_argnums=0)

    @functools.cached_property
    def statistics(self):
        """A scored Rollout -> what it says of the policy that wrote it; see Rollout.statistics."""
        return self.jit(lambda scored: scored.statistics(0.0))

    def collect(self, state, prompts, reward, rows, decode):
        """A scored Rollout of the prompts: (Rollout, Completions, {component: [B]})."""
        drawn = self.sample(state, *prompts)
        judged = self.judge(state, *prompts, drawn)  # goes on while the host reads and scores
        there = judged.replace(response_BR=drawn.response_BR, mask_BR=drawn.mask_BR)  # the same, known sooner
        completions = rewards.Completions(rows, there, decode)
        components = reward(state.reward, completions)
        return judged.replace(score_B=jnp.asarray(rewards.total(components))), completions, components


def rl(
    name: str,
    setup: Setup,
    config: policy_algorithm.Config,
    algorithm: ModuleType,
    reward: rewards.Reward,
    policy,
    *,
    value=None,
    watch: alarms.Config = alarms.OFF,
    keep_best: bool = False,
    key=None,
    sides: tuple[str, str] = ("_sft", ""),
    beside: tuple[dict, ...] = (),
) -> Stage:
    """Reinforcement learning of `policy` on the task's prompts.

    watch: limits on what a policy may become. keep_best: the result is the best evaluated policy within them, not the
    last one; its numbers are then of fresh samples. sides: the endings of a number's name before and after. beside:
    columns to set beside the samples, one dict a question.
    """
    apply, task = setup.apply, setup.task
    train_rows = task.rows("prompts").train
    _, questions = setup.questions("prompts")
    sampling = setup.sampling(config.temperature, lanes=config.lanes, widths=config.widths)
    iteration = Iteration(algorithm, config, apply, sampling, setup.guard.action, setup.jit)
    judge = _judge(task, reward)
    measure = _measurement(setup, config, reward)
    key = setup.key("rl") if key is None else key
    state = iteration.begin(policy, key, value=value, reward=reward.params)
    state = sharding.replicate(state, setup.mesh)  # before the first measurement, which would be compiled twice else
    before = measure(state)
    at = setup.batch_at("prompts", config.batch, name if name == "ppo" else "rl", f"{name}.batch")
    if watch.active:
        usual = _usual(iteration, state, at, setup, -(-setup.evaluation.prompts // config.batch))
        state = state.replace(alarms=sharding.replicate(alarms.begin(usual), setup.mesh))
    if keep_best:
        best = {"policy": state.policy, "score": jnp.float32(before.numbers[reward.metric]), "step": jnp.int32(0)}
        state = state.replace(best=sharding.replicate(jax.tree.map(jnp.copy, best), setup.mesh))

    def step(state, batch):
        if watch.active and watch.freeze and bool(state.alarms["tripped"]):
            return Step(state.replace(step=state.step + 1), {"alarms": 1})
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        rows = [train_rows[i] for i in np.asarray(batch["index_B"])]
        scored, completions, components = iteration.collect(state, prompts, reward, rows, setup.decode)
        watched = iteration.statistics(scored) if watch.active else None
        aside = {"best": state.best, "alarms": state.alarms}  # not the update's
        state, numbers = iteration.learn(state.replace(best=None, alarms=None), scored)
        state = state.replace(**aside)
        # The device learns while the host reads the texts.
        numbers |= _means(judge(rows, completions.texts)) | _diversity(completions.texts)
        if reward.on_host:
            numbers.pop("score")
            numbers |= _means(_named(reward, components))
        if not watch.active:
            return Step(state, numbers, scored)
        now = {key: float(value) for key, value in (numbers | watched).items() if key in alarms.WATCHED}
        tracked, tripped = alarms.track(state.alarms, now, usual, watch)
        place = f"alarm at step {int(state.step)}"
        notes = tuple(f"{place}: {each} (running mean of the last rollouts)" for each in tripped)
        return Step(state.replace(alarms=tracked), numbers | {"alarms": int(tracked["tripped"])}, scored, notes)

    def evaluate(state):
        measured = measure(state)
        shown = _samples(measured, state, config, reward.metric)[: setup.evaluation.samples]
        shown = [{"prompt": row["prompt"]} | sample for row, sample in zip(questions, shown, strict=False)]
        return Evaluation({f"eval_{k}": v for k, v in measured.numbers.items()}, measured, tuple(shown))

    def inside(numbers):
        return not watch.active or not any(alarms.outside(numbers, before.numbers, watch).values())

    def keep(state, evaluation):
        """The state with its policy put aside where it is the best so far and within the limits."""
        numbers = evaluation.details.numbers
        if not (numbers[reward.metric] > float(state.best["score"]) and inside(numbers)):
            return state
        found = {"policy": state.policy, "score": jnp.float32(numbers[reward.metric]), "step": state.step}
        return state.replace(best=jax.tree.map(jnp.copy, found))

    def complete(state, evaluation):
        best = jax.tree.map(jnp.copy, state.best["policy"])
        return state.replace(policy=best), {"best_step": float(state.best["step"])}

    def summarize(state, evaluation):
        first, last, metric = before, evaluation.details, reward.metric
        if keep_best:  # the policy was chosen on the samples of its evaluations: others measure what it is worth
            fresh = jax.random.fold_in(setup.key("evaluation"), 1)
            first, last = measure(state.replace(policy=state.reference), fresh), measure(state, fresh)
        numbers = _compare(first, last, sides, metric)
        curve = best_of_n.curve(first.rows[metric]) if task.same_prompt else None
        if curve:
            numbers["best_of_n_at_kl"] = best_of_n.at_kl(first.rows[metric], numbers["kl_exact"])
        if keep_best:
            numbers["best_step"] = float(state.best["step"])
        if "label" in questions[0]:
            labels = [row["label"] for row in questions]
            for suffix, texts in zip(sides, (first.texts, last.texts), strict=True):
                numbers |= {f"{key}{suffix}": value for key, value in rouge.rouge(labels, texts)}
        both = (_samples(each, state, config, metric) for each in (first, last))
        if task.same_prompt:
            samples = [
                more
                | {"sft": a["completion"], "rl": b["completion"]}
                | {f"{metric}_sft": a["score"], f"{metric}_rl": b["score"]}
                for more, a, b in zip(beside or [{}] * len(questions), *both, strict=True)
            ]
        else:
            samples = [{"prompt": row["prompt"], "sft": a, name: b} for row, a, b in zip(questions, *both, strict=True)]

        def plot(rows, folder):
            plots.rl(rows, folder, name, best_of_n=curve)
            known = "gold" if "gold" in last.rows else metric
            title = f"{known} score" if known != "reward" else known
            rate = win_rate.win_rate(last.rows[known], first.rows[known])
            plots.before_after(
                first.rows[known], last.rows[known], folder / "before_after.png", name=title, win_rate=rate,
                learner=name.upper() if name in ("ppo", "rl") else name,
            )  # fmt: skip
            return _of_updates(name, rows, config)

        return Summary(numbers, samples, plot, _table(first, last, numbers, metric))

    return Stage(
        name=name,
        config=config,
        state=state,
        batch_at=at,
        step=step,
        learn=iteration.learn,
        evaluate=evaluate,
        best=("eval_gold" if "gold" in before.numbers else f"eval_{reward.metric}", max),
        eligible=lambda numbers: inside({key.removeprefix("eval_"): value for key, value in numbers.items()}),
        result=("policy", "value") if value is not None else ("policy",),
        summarize=summarize,
        headlines=("score", "gold", "win_rate", "kl_exact", "eos_rate"),
        keep=keep if keep_best else None,
        complete=complete if keep_best else None,
        frozen=("reference", "reward"),
        guard=setup.guard,
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy's completions of the held-out questions, one each."""

    numbers: dict[str, float]  # means; entropy is per token
    rows: dict[str, np.ndarray]  # [N] each
    texts: list[str]


def _measurement(setup, config, reward):
    """A function (state, key) -> Measured.

    KL belongs to the policy as it was trained and is measured at the temperature of training; all else at that of
    evaluation.
    """
    arrays, questions = setup.questions("prompts")
    evaluation, judge = setup.evaluation, _judge(setup.task, reward)

    @functools.partial(setup.jit, static_argnums=4)
    def sample(policy, reference, batch, key, temperature):
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = rollout.draw(setup.apply, policy, *prompts, row_keys(key, batch), setup.sampling(temperature))
        # The most likely tokens (temperature 0) have no distribution to compare: it is done at that of training.
        sampling = setup.sampling(temperature or config.temperature)
        return rollout.compare(setup.apply, policy, reference, *prompts, drawn, sampling)

    def at(state, key, temperature):
        def one(batch):
            drawn = sample(state.policy, state.reference, batch, key, temperature)
            rows = {
                "response": drawn.response_BR,
                "mask": drawn.mask_BR,
                "kl": jnp.sum(drawn.kl_BR, axis=1),
                "kl_exact": jnp.sum(drawn.kl_exact_BR, axis=1),
                "entropy": jnp.sum(drawn.entropy_BR, axis=1),
                "eos_rate": drawn.eos_B,
                "length": drawn.length_B,
            }
            if not reward.on_host:
                rows[reward.metric] = rewards.total(reward(state.reward, rewards.Completions((), drawn, setup.decode)))
            return rows

        return setup.over(arrays, one, len(questions))

    def measure(state, key=None):
        key = setup.key("evaluation") if key is None else key
        rows = at(state, key, evaluation.temperature)
        if evaluation.temperature != config.temperature:
            trained = at(state, key, config.temperature)
            rows |= {name: trained[name] for name in ("kl", "kl_exact")}
        texts = setup.decode(rows.pop("response"), rows.pop("mask"))
        if reward.on_host:
            rows |= _named(reward, reward.scores(questions, texts))
        rows |= judge(questions, texts)
        numbers = {name: float(np.mean(values)) for name, values in rows.items()}
        numbers["entropy"] = float(rows.pop("entropy").sum() / max(rows["length"].sum(), 1))
        return Measured(numbers | _diversity(texts), rows, texts)

    return measure


def _judge(task, reward):
    """`task.judge`, or nothing where that is the reward itself: its function is called once for each completion."""
    return (lambda rows, texts: {}) if getattr(task, "reward", None) == reward.name else task.judge


def _usual(iteration, state, batch_at, setup, rounds):
    """What rollouts of the first policy are like, the mean of some: alarms compare with as many samples at a time."""
    found = []
    for i in range(rounds):
        batch, now = batch_at(i), state.replace(step=jnp.int32(i))
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = iteration.sample(now, *prompts)
        judged = iteration.judge(now, *prompts, drawn).replace(score_B=jnp.zeros(iteration.config.batch))
        found.append(iteration.statistics(judged) | _diversity(setup.decode(drawn.response_BR, drawn.mask_BR)))
    return {name: float(np.mean([float(numbers[name]) for numbers in found])) for name in alarms.WATCHED}


def _means(rows):
    return {name: np.mean(values) for name, values in rows.items()}


def _named(reward, components):
    """The components under their names, and the total under the reward's."""
    return {reward.metric: rewards.total(components)} | components


def _diversity(texts):
    return {"distinct2": diversity.distinct(texts, 2), "repeat_rate": diversity.repeat_rate(texts)}


def _compare(first, last, sides, metric):
    """The summary's numbers before and after, and what the difference is worth: on gold, where there is gold."""
    before, after = sides
    numbers = {}
    for name, value in last.numbers.items():
        numbers |= {name: value, f"{name}{after}": value, f"{name}{before}": first.numbers[name]}
    for name in (name for name in (metric, "gold") if name in last.rows):
        gain, ci95 = interval.paired_gain(last.rows[name], first.rows[name])
        spread = float(np.std(first.rows[name]))
        numbers |= {f"{name}_gain": gain, f"{name}_ci95": ci95, f"{name}{before}_sd": spread}
    best = "gold" if "gold" in last.rows else metric
    rate, ci95 = win_rate.win_rate(last.rows[best], first.rows[best])
    return numbers | {"win_rate": rate, "win_rate_ci95": ci95}


def _table(first, last, numbers, metric):
    """Rows of the final table: (name, before, after, change, its 95% interval)."""
    rows = []
    order = ("gold", metric, "kl", "kl_exact", "distinct2", "repeat_rate", "entropy", "eos_rate", "length")
    for name in dict.fromkeys(name for name in order if name in last.numbers):
        change = last.numbers[name] - first.numbers[name]
        ci95 = interval.paired_gain(last.rows[name], first.rows[name])[1] if name in last.rows else None
        rows.append((name, first.numbers[name], last.numbers[name], change, ci95))
    if "best_of_n_at_kl" in numbers:
        rows.append((f"best-of-n {metric} at this KL", None, numbers["best_of_n_at_kl"], None, None))
    return tuple(rows)


def _samples(measured, state, config, metric):
    """Completions with their numbers. `total` is what the algorithm maximizes: the score after the rule for a missing
    EOS, less the KL penalty with the coefficient of the moment."""
    rows = {name: measured.rows[name] for name in dict.fromkeys((metric, "kl", "gold")) if name in measured.rows}
    score_N = np.asarray(policy_algorithm.final_score(
        rows[metric], measured.rows["eos_rate"], missing_eos=config.missing_eos, penalty=config.missing_eos_penalty
    ))  # fmt: skip
    rows["total"] = score_N - float(state.kl_coef) * rows["kl"]
    named = {"score" if name == metric else name: values for name, values in rows.items()}
    return [
        {"completion": text} | {name: float(values[i]) for name, values in named.items()}
        for i, text in enumerate(measured.texts)
    ]


def _of_updates(name, rows, config):
    """{"clip_fraction": of the last update}, and the first update epoch by epoch, where it was traced."""
    numbers = {}
    clipped = metrics.series(rows, f"{name}/clip_fraction")[1]
    if len(clipped):
        numbers["clip_fraction"] = clipped[-1]
    if config.trace_epochs:
        for metric in ("approx_kl", "clip_fraction"):
            epochs = [f"{name}/{metric}_epoch_{epoch}" for epoch in range(1, config.epochs + 1)]
            if epochs[0] in rows[0]:
                numbers[f"{metric}_first_update"] = [rows[0][key] for key in epochs]
    return numbers
