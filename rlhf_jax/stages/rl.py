"""Reinforcement learning: any policy algorithm, any reward, any task. `Iteration` defines an iteration.

    sample (compiled) -> judge (compiled): reference, KL, values -> reward -> learn (compiled): advantages and update

The device judges while the host decodes texts and scores them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import alarms, rewards, rollout
from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.algorithms import supervised
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import best_of_n, rouge, win_rate
from rlhf_jax.report import metrics, plots
from rlhf_jax.stages import Evaluation, Setup, Stage, Step, Summary, Times, measure
from rlhf_jax.training import optim, sharding

PROBES = 64  # held-out completions whose tokens a trace records


@dataclasses.dataclass(frozen=True, eq=False)
class Iteration:
    """The compiled functions of one iteration. Stages, the benchmark and the memory plan call these."""

    algorithm: policy_algorithm.Algorithm
    config: policy_algorithm.Config
    apply: rollout.Apply
    sampling: Any  # generate.Sampling
    guard: str = "stop"
    jit: Callable = jax.jit
    record: bool = False  # `learn` returns its arrays too

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
        how = {"apply": self.apply, "sampling": self.sampling, "rows": self.config.batch}
        return self.jit(functools.partial(rollout.sample, **how))

    @functools.cached_property
    def judge(self):
        """(state, prompt_BP, prompt_mask_BP, completions) -> Rollout without a score."""
        return self.jit(functools.partial(rollout.judge, self.apply, sampling=self.sampling))

    @functools.cached_property
    def learn(self):
        """(state, scored Rollout) -> (state, numbers); the state is donated. See policy.step for `record`."""
        parts = {name: getattr(self, name) for name in ("config", "apply", "tx", "guard", "record")}
        learn = functools.partial(policy_algorithm.step, self.algorithm, **parts, length=self.sampling.max_tokens)
        return self.jit(learn, donate_argnums=0)

    @functools.cached_property
    def look(self):
        """(state, scored Rollout) -> {name: array}: logits and likeliest tokens of the rows that a trace shows.

        It reads the policy as it is before the update: a scoring pass of its own, which checks the recorded log-probs.
        """
        return self.jit(functools.partial(rollout.look, self.apply, temperature=self.config.temperature))

    @functools.cached_property
    def statistics(self):
        """A scored Rollout -> its metrics, without a KL coefficient; see Rollout.statistics."""
        return self.jit(functools.partial(rollout.Rollout.statistics, kl_coef=0.0))

    def collect(self, state, prompts, reward, rows, decode):
        """A scored Rollout of the prompts: (Rollout, Completions, {component: [B]})."""
        return self.score(state, prompts, self.sample(state, *prompts), reward, rows, decode)

    def score(self, state, prompts, drawn, reward, rows, decode):
        """The same of completions that are sampled already."""
        judged = self.judge(state, *prompts, drawn)  # runs while the host decodes and scores
        there = judged.replace(response_BR=drawn.response_BR, mask_BR=drawn.mask_BR)  # the same arrays, ready earlier
        completions = rewards.Completions(rows, there, decode)
        components = reward(state.reward, completions)
        return judged.replace(score_B=jnp.asarray(rewards.total(components))), completions, components

    def programs(self, state, prompts, reward):
        """{name: (function, the shapes of its arguments)} of an iteration; nothing is computed.

        draw, judge, reward (where it is on the device) and update, in their order. Arguments may be shapes themselves.
        """
        drawn = self.sample.eval_shape(state, *prompts)
        judged = self.judge.eval_shape(state, *prompts, drawn)
        scored = judged.replace(score_B=jax.ShapeDtypeStruct((self.config.batch,), jnp.float32))
        if self.config.ptx_coef:
            whole = (self.config.batch, prompts[0].shape[1] + self.sampling.max_tokens)
            texts, real = (jax.ShapeDtypeStruct(whole, kind) for kind in (jnp.int32, bool))
            scored = scored.replace(mix_BT=texts, mix_mask_BT=real)
        return {
            "draw": (self.sample, (state, *prompts)),
            "judge": (self.judge, (state, *prompts, drawn)),
            **({} if reward.on_host else {"reward": (reward.score, (state.reward, judged))}),
            "update": (self.learn, (state, scored)),
        }


def rl(
    name: str,
    setup: Setup,
    config: policy_algorithm.Config,
    algorithm: policy_algorithm.Algorithm,
    reward: rewards.Reward,
    policy,
    *,
    value=None,
    watch: alarms.Config = alarms.OFF,
    keep_best: bool = False,
    judge: rewards.Reward | None = None,
    key=None,
    sides: tuple[str, str] = ("_sft", ""),
    beside: tuple[dict, ...] = (),
) -> Stage:
    """Reinforcement learning of `policy` on the task's prompts.

    watch: limits on the policy. keep_best: the result is the best evaluated policy within the limits instead of the
    last policy, measured on prompts that did not choose it, or on fresh samples where all prompts are the same. judge:
    a reward model that only evaluates. sides: suffixes of the numbers before and after. beside: more columns of the
    samples, one dict a question.
    """
    how = {"lanes": config.lanes, "widths": config.widths, "group": config.group}
    sampling = setup.sampling(config.temperature, **how)
    iteration = Iteration(algorithm, config, setup.apply, sampling, setup.guard.action, setup.jit, setup.record)
    halves = keep_best and not setup.task.same_prompt
    shares: tuple[Any, Any] = ((0, 2), (1, 2)) if halves else (None, None)
    if halves and len(setup.questions("prompts")[1]) < 4:
        raise InputError("evaluation.prompts: expected at least 4 held-out prompts where evaluation.result is best")
    measured = measure.measurement(setup, config, reward, judge, shares[0])
    final = measure.measurement(setup, config, reward, judge, shares[1]) if halves else measured
    key = setup.key("rl") if key is None else key
    state = iteration.begin(policy, key, value=value, reward=reward.params)
    state = sharding.place(state, setup.mesh)  # else the first measurement would be compiled twice
    before = measured(state)
    batch_at = setup.batch_at("prompts", config.batch, "rl", f"{name}.batch", config.group)
    mix_at = None
    if config.ptx_coef:
        # What the policy was trained on first: plain texts, or the rows of fine-tuning.
        kind = "pretrain" if "pretrain" in setup.task.questions else "sft"
        mix_at = setup.batch_at(kind, config.batch, "ptx", f"{name}.batch")
    usual = {}
    if watch.active:
        usual = _usual(iteration, state, batch_at, setup, -(-setup.evaluation.prompts // config.batch))
        watched = alarms.begin(usual)
        if watch.over_optimization:
            watched |= alarms.watch_judge(before.numbers[_judge(before, reward)], before.numbers[reward.metric])
        state = state.replace(alarms=sharding.place(watched, setup.mesh))
    chooses = _chooses(setup, before, reward)
    if keep_best:
        best = {"policy": state.policy, "score": jnp.float32(before.numbers[chooses]), "step": jnp.int32(0)}
        state = state.replace(best=sharding.place(jax.tree.map(jnp.copy, best), setup.mesh))
    parts = _Parts(
        name, setup, config, reward, iteration, measured, final, shares, before, chooses, watch, usual, keep_best,
        sides, beside,
    )  # fmt: skip
    return Stage(
        name=name,
        config=config,
        state=state,
        batch_at=batch_at if mix_at is None else lambda step: batch_at(step) | {"mix": mix_at(step)},
        step=parts.step,
        learn=iteration.learn,
        evaluate=parts.evaluate,
        best=(chooses, max),
        eligible=parts.inside,
        first=parts.evaluation(state, before),
        result=("policy", "value") if algorithm.NEEDS_VALUE else ("policy",),
        summarize=parts.summarize,
        headlines=("score", "reward", "judge", "gold", "win_rate", "kl_exact", "eos_rate"),
        keep=parts.keep if keep_best or watch.over_optimization else None,
        complete=parts.complete if keep_best else None,
        frozen=("reference", "reward"),
        guard=setup.guard,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """The values that the functions of a stage share."""

    name: str
    setup: Setup
    config: policy_algorithm.Config
    reward: rewards.Reward
    iteration: Iteration
    measured: Callable  # (state, key) -> measure.Measured
    final: Callable  # the same on the prompts of the final numbers
    shares: tuple  # of the held-out prompts that these two have, as `measure.questions_of` takes them
    before: measure.Measured  # of the first policy
    chooses: str  # the number that ranks policies
    watch: alarms.Config
    usual: dict[str, float]  # mean numbers of the first policy's rollouts; empty without alarms
    keep_best: bool
    sides: tuple[str, str]
    beside: tuple[dict, ...]

    @functools.cached_property
    def rows(self):
        """The rows of the training prompts."""
        return self.setup.task.rows("prompts").train

    @functools.cached_property
    def questions(self):
        """The rows of the held-out prompts that policies are evaluated on while they learn."""
        return measure.questions_of(self.setup, self.shares[0])[1]

    def step(self, state, batch, record=False):
        """One iteration, and the metrics of its rollout."""
        fallen: tuple[str, ...] = ()
        if self.watch.over_optimization and bool(state.alarms["judge"]["fell"]) and not bool(state.alarms["tripped"]):
            state = state.replace(alarms=state.alarms | {"tripped": jnp.array(True)})
            fallen = (f"alarm at step {int(state.step)}: over_optimization (the reward rose, {self.judge} fell)",)
        if self.watch.active and self.watch.freeze and bool(state.alarms["tripped"]):
            return Step(state.replace(step=state.step + 1), {"alarms": 1}, notes=fallen)
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        # An iteration does not need these. With them it would be compiled again whenever their placement changes.
        aside, state = {"best": state.best, "alarms": state.alarms}, state.replace(best=None, alarms=None)
        collected = 0.0

        def decode(response_BR, mask_BR):
            nonlocal collected
            collected = _ready(response_BR)
            return self.setup.decode(response_BR, mask_BR)

        drawn = self.iteration.sample(state, *prompts)
        rows = [self.rows[i] for i in sharding.gather(batch["index_B"])]
        before = _ready(state.step)  # no delay: the device has its next work, the sampling
        scored, completions, components = self.iteration.score(state, prompts, drawn, self.reward, rows, decode)
        rewarded = time.monotonic()
        watched = self.iteration.statistics(scored) if self.watch.active else None
        look = self.iteration.look(state, scored) if record else None
        if "mix" in batch:
            texts_BT, real_BT, _ = supervised.tokens(batch["mix"], "all")
            scored = scored.replace(mix_BT=texts_BT, mix_mask_BT=real_BT)
        state, numbers = self.iteration.learn(state, scored)
        state = state.replace(**aside)
        recorded = numbers.pop("record", None)
        if record:
            recorded = _by_name(recorded) | {"look": look, "components": components}
        # The device learns while the host reads the texts.
        judged = measure.judge(self.setup.task, self.reward, rows, completions.texts, drawn.done_B)
        numbers |= measure.means(judged)
        numbers |= measure.diversity_of(completions.texts)
        if self.reward.on_host:
            numbers.pop("score")
            numbers |= measure.means(measure.named(self.reward, components))
        else:
            rewarded = _ready(scored.score_B)  # no delay: the update follows on the device
        times = Times(before, collected, rewarded)
        if watched is None:
            return Step(state, numbers, scored, record=recorded if record else None, times=times)
        now = {key: float(value) for key, value in (numbers | watched).items() if key in alarms.WATCHED}
        tracked, tripped = alarms.track(state.alarms, now, self.usual, self.watch)
        place = f"alarm at step {int(state.step)}"
        notes = fallen + tuple(f"{place}: {each} (running mean of the last rollouts)" for each in tripped)
        numbers |= {"alarms": int(tracked["tripped"])}
        return Step(state.replace(alarms=tracked), numbers, scored, notes, recorded if record else None, times)

    def evaluate(self, state):
        """Measures the policy on the held-out questions, with some completions to show."""
        return self.evaluation(state, self.measured(state))

    def evaluation(self, state, found):
        """The Evaluation of a policy that is measured already."""
        samples = measure.samples(found, state, self.config, self.reward.metric)
        shown = [{"prompt": row["prompt"]} | each for row, each in zip(self.questions, samples, strict=False)]
        tokens = {f"{name}_NR": array[:PROBES] for name, array in found.tokens.items()}
        rows = {f"{name}_N": array for name, array in found.rows.items()}
        record = {"probes": tokens, "rows": rows, "samples": shown[:PROBES]}
        if self.setup.record:
            record["crossed"] = self.crossed(state)
        return Evaluation(found.numbers, found, tuple(shown[: self.setup.evaluation.samples]), record)

    def crossed(self, state):
        """The first policy's completions, {name: [N, R]}, with the log-probs of the policy that is evaluated."""
        first = {f"{name}_NR": array[:PROBES] for name, array in self.before.tokens.items()}
        del first["logp_NR"]
        prompts, count = measure.questions_of(self.setup, self.shares[0])[0], len(first["mask_NR"])
        rows = {name: array[:count] for name, array in prompts.items()} | first
        return first | {"logp_NR": self.setup.over(rows, functools.partial(self._logprobs, state.policy))}

    @functools.cached_property
    def _logprobs(self):
        """(policy, batch of prompts and responses) -> log-probs [B, R], 0 after the response."""
        temperature = self.setup.evaluation.temperature or self.config.temperature
        return self.setup.jit(functools.partial(rollout.logprobs_of, self.setup.apply, temperature=temperature))

    @property
    def judge(self):
        """The evaluated number that the reward is watched by."""
        return _judge(self.before, self.reward)

    def inside(self, numbers):
        """Whether a policy with these numbers is within the limits."""
        return not self.watch.active or not any(alarms.outside(numbers, self.before.numbers, self.watch).values())

    def keep(self, state, evaluation):
        """The state, with a copy of its policy if that is the best so far and within the limits."""
        numbers = evaluation.details.numbers
        if self.watch.over_optimization:
            judge_N, reward = evaluation.details.rows[self.judge], numbers[self.reward.metric]
            state = state.replace(alarms=alarms.judged(state.alarms, judge_N, reward, self.watch))
        if not self.keep_best:
            return state
        score = numbers[self.chooses]
        if not (score > float(state.best["score"]) and self.inside(numbers)):
            return state
        found = {"policy": state.policy, "score": jnp.float32(score), "step": state.step}
        return state.replace(best=jax.tree.map(jnp.copy, found))

    def complete(self, state, evaluation):
        """The state with the best policy."""
        best = jax.tree.map(jnp.copy, state.best["policy"])
        return state.replace(policy=best), {"best_step": float(state.best["step"])}

    def summarize(self, state, evaluation):
        """Compares the policies before and after on the same prompts with the same noise."""
        first, last, metric, task = self.before, evaluation.details, self.reward.metric, self.setup.task
        questions = measure.questions_of(self.setup, self.shares[1])[1]
        if self.keep_best:  # its evaluations selected the policy, so fresh samples measure it
            fresh = jax.random.fold_in(self.setup.key("evaluation"), 1)
            first, last = self.final(state.replace(policy=state.reference), fresh), self.final(state, fresh)
        numbers = measure.compare(first, last, self.sides, metric)
        numbers |= measure.passes(self.setup, self.config, state, self.sides, self.shares[1])
        curve = best_of_n.curve(first.rows[metric]) if task.same_prompt else None
        if curve:
            numbers["best_of_n_at_kl"] = best_of_n.at_kl(first.rows[metric], numbers["kl_exact"])
        if self.keep_best:
            numbers["best_step"] = float(state.best["step"])
        if "label" in questions[0]:
            labels = [row["label"] for row in questions]
            for suffix, texts in zip(self.sides, (first.texts, last.texts), strict=True):
                numbers |= {f"{key}{suffix}": value for key, value in rouge.rouge(labels, texts)}
        before, after = (measure.samples(each, state, self.config, metric) for each in (first, last))
        samples = measure.side_by_side(self.name, questions, before, after, self.beside, metric, task)
        plot = functools.partial(self.plot, first=first, last=last, curve=curve)
        return Summary(numbers, samples, plot, measure.table(first, last, numbers, metric))

    def plot(self, rows, folder, run, *, first, last, curve):
        """Writes the plots; returns numbers of the updates for the summary."""
        title = self.setup.title(run, self.name)
        plots.rl(rows, folder, self.name, best_of_n=curve, title=title)
        known = measure.known(last.rows, self.reward.metric)
        before_N, after_N = first.rows[known], last.rows[known]
        learner = self.name.upper() if len(self.name) < 4 else self.name.replace("_", " ")  # PPO
        labels = {"name": known if known == "reward" else f"{known} score", "learner": learner}
        rate = win_rate.win_rate(after_N, before_N)
        plots.before_after(before_N, after_N, folder / "before_after.png", win_rate=rate, title=title, **labels)
        return _of_updates(self.name, rows, self.config)


def _chooses(setup, before, reward):
    """The evaluated number that ranks policies."""
    name = setup.evaluation.best_by or measure.known(before.numbers, reward.metric)
    if name not in before.numbers:
        raise InputError(f"evaluation.best_by: expected one of {', '.join(sorted(before.numbers))}, got {name!r}")
    return name


def _judge(before, reward):
    """The evaluated number that is not the reward: gold or the hold-out judge."""
    name = measure.known(before.numbers, reward.metric)
    if name == reward.metric:
        raise InputError("alarms.over_optimization: expected 0 where there is neither gold nor reward.holdout_judge")
    return name


def _by_name(recorded):
    """What policy.step records, with the Rollout as {name: array} of the fields that it has."""
    names = [field.name for field in dataclasses.fields(rollout.Rollout)]
    arrays = {name: getattr(recorded["rollout"], name) for name in names}
    return recorded | {"rollout": {name: array for name, array in arrays.items() if array is not None}}


def _ready(array):
    """Waits for an array: the time on the clock of time.monotonic."""
    jax.block_until_ready(array)
    return time.monotonic()


def _usual(iteration, state, batch_at, setup, rounds):
    """Mean numbers of some rollouts of the first policy: alarms compare them with rollouts of the same size."""
    found = []
    for i in range(rounds):
        batch, now = batch_at(i), state.replace(step=jnp.int32(i))
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = iteration.sample(now, *prompts)
        judged = iteration.judge(now, *prompts, drawn).replace(score_B=jnp.zeros(iteration.config.batch))
        found.append(
            iteration.statistics(judged) | measure.diversity_of(setup.decode(drawn.response_BR, drawn.mask_BR))
        )
    return {name: float(np.mean([float(numbers[name]) for numbers in found])) for name in alarms.WATCHED}


def _of_updates(name, rows, config):
    """The last update's clip fraction, and the first update epoch by epoch if that was traced."""
    numbers = {}
    clipped = metrics.series(rows, f"{name}/clip_fraction")[1]
    if len(clipped):
        numbers["clip_fraction"] = clipped[-1]
    if config.trace_epochs:
        for metric in ("approx_kl", "clip_fraction"):
            epochs = [f"{name}/{metric}_epoch_{epoch}" for epoch in range(1, config.epochs + 1)]
            if first := next((row for row in rows if epochs[0] in row), None):
                numbers[f"{metric}_first_update"] = [first[key] for key in epochs]
    return numbers
