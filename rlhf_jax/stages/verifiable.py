"""Reinforcement learning on a reward that is computed, not learned: any number of seeds in one compiled program.

Arrays and parameters have a leading axis [K], one entry a seed, also when there is one. The reward runs on the host
while the device compares the policy with its reference.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import alarms, rollout
from rlhf_jax.algorithms import policy_gradient
from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.evaluate import best_of_n, diversity, interval, win_rate
from rlhf_jax.report import plots
from rlhf_jax.stages import common
from rlhf_jax.training import guard, optim, sharding
from rlhf_jax.training.state import TrainState

# What differs between seeds; the reference and the step are one.
AXES = TrainState(
    step=None, key=0, policy=0, reference=None, value=0, reward=None, optimizer=0, kl_coef=0, skipped=None
)


def rl(run):
    """Policy gradient (or PPO) of the fine-tuned policy against run.reward: its summary, which compares it with SFT."""
    began = common.began(run, "rl")
    learner = Learner(run)
    state, _, _ = common.train(run, prepare(run, "rl", learner))
    # The policy was chosen on the samples of its evaluations: what it is worth is told by others.
    fresh = jax.random.fold_in(run.key("evaluation"), 1)
    before, texts_before, rows_before = learner.measure(jax.tree.map(lambda x: x[None], learner.reference), fresh)
    before = {name: float(value_K[0]) for name, value_K in before.items()}
    after, texts_after, rows_after = learner.measure(state.policy, fresh)
    reward_N = rows_before["reward"][0]
    numbers = _compare(before, after, reward_N, rows_after) | {"rl/best_step": np.mean(state.best["step"])}
    columns = {
        "pretrain": _completions(run, "pretrain"),
        "sft": texts_before[0],
        "rl": texts_after[0],
        "reward_sft": reward_N.tolist(),
        "reward_rl": rows_after["reward"][0].tolist(),
    }
    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def draw(rows, folder):
        plots.rl(rows, folder, best_of_n=best_of_n.curve(reward_N))
        rate = win_rate.win_rate(rows_after["reward"][0], reward_N)
        path = folder / "before_after.png"
        plots.before_after(reward_N, rows_after["reward"][0], path, name="reward", win_rate=rate, learner="RL")

    summary = common.finish(run, "rl", began, numbers, samples, draw)
    run.reporter.before_after(_table(before, after, numbers))
    return summary


def prepare(run, name, learner=None):
    """What the stage trains."""
    learner = learner or Learner(run)
    policy = learner.reference
    before, texts_before, _ = learner.measure(jax.tree.map(lambda x: x[None], policy))
    before = {name: float(value_K[0]) for name, value_K in before.items()}
    # Distinct-2 falls with the number of samples: what is watched during training is compared at a rollout's.
    watched = before | {"distinct2": _mean_distinct(texts_before[0], learner.config.batch)}

    def step(state, batch):
        if np.all(state.alarms["rung"]) and run.config.alarms.freeze:
            return state.replace(step=state.step + 1), {"rl/alarms": run.config.seeds}
        drawn = learner.draw(state, batch)
        compared, heard = learner.compare(state, batch, drawn)  # goes on while the host reads and scores
        texts = learner.texts(drawn)
        judged = learner.judge(texts)
        state, numbers = learner.learn(state, compared, judged["reward"])
        numbers = {f"rl/{name.split('/')[1]}": value for name, value in numbers.items()}
        numbers.pop("rl/score")  # it is the reward, told below with its components
        spoken = {name: values_KB.mean(axis=1) for name, values_KB in judged.items()} | learner.diversity(texts)
        state, rung = learner.listen(state, spoken | jax.tree.map(np.asarray, heard), watched)
        for name in rung:
            run.reporter.note(f"rl: alarm at step {int(state.step)}: {name} (running mean of the last rollouts)")
        told = over_seeds({f"rl/{name}": value_K for name, value_K in spoken.items()})
        return state, numbers | told | {"rl/alarms": np.sum(state.alarms["rung"])}

    def evaluate(state):
        numbers, texts, rows = learner.measure(state.policy)
        run.reporter.samples(
            [
                {"prompt": "", "completion": text, "score": rows["reward"][0][i], "kl": rows["kl"][0][i]}
                for i, text in enumerate(texts[0][: run.config.evaluation.samples])
            ]
        )
        return over_seeds({f"rl/eval_{name}": value_K for name, value_K in numbers.items()}), (numbers, texts, rows)

    def keep(state, details):
        return learner.keep(state, details[0], before)

    def complete(state):
        state = keep(state, evaluate(state)[1])
        return state.replace(policy=jax.tree.map(jnp.copy, state.best["policy"])), {
            "rl/best_step": float(np.mean(state.best["step"]))
        }

    return common.Training(
        name=name,
        state=learner.begin(policy, before, watched),
        step=step,
        evaluate=evaluate,
        best=("rl/eval_reward", max),
        result=("policy",),
        complete=complete,
        keep=keep,
    )


class Learner:
    """The compiled functions of the stage, and the bookkeeping around them that needs the host."""

    def __init__(self, run, algorithm=None):
        name = algorithm or run.config.algorithm
        self.run, self.config = run, getattr(run.config, name)
        self.algorithm = {"policy_gradient": policy_gradient, "ppo": ppo_algorithm}[name]
        updates = self.config.epochs * getattr(self.config, "minibatches", 1)
        self.tx = optim.adamw(self.config, self.config.steps * updates)
        self.draw = run.jit(self._draw)
        self.compare = run.jit(self._compare)
        self._learn_jit = run.jit(guard.guarded(self._learn, run.config.guard), donate_argnums=0)
        self._measure_jit = run.jit(self._measure)

    def begin(self, policy, before, watched):
        """The state before the first rollout, every seed with its own key."""
        run, K = self.run, self.run.config.seeds
        parts = {"config": self.config, "tx": self.tx}

        def init(key):
            if self.algorithm is policy_gradient:
                return policy_gradient.init(policy, key, **parts)
            return ppo_algorithm.init(policy, run.apply.scalar.zero_head(policy), None, key, **parts)

        # fold_in, not split: a seed draws the same alone and among others.
        keys_K = jax.vmap(jax.random.fold_in, (None, 0))(run.key("rl"), jnp.arange(K))
        state = jax.vmap(init, out_axes=AXES)(keys_K)
        best = {
            "policy": jax.tree.map(lambda x: jnp.tile(x, (K,) + (1,) * x.ndim), policy),
            "reward": jnp.full(K, before["reward"], jnp.float32),
            "step": jnp.zeros(K, jnp.int32),
        }
        state = state.replace(best=best, alarms=alarms.begin(watched, K))
        return sharding.replicate(state, run.mesh)

    def _draw(self, state, batch):
        sampling = self.run.sampling(self.config.temperature)

        def one(state):
            prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
            return rollout.draw(
                self.run.apply, state.policy, *prompts, rollout.keys(state, self.config.batch), sampling
            )

        return _per_seed(one, (AXES,))(_core(state))

    def _compare(self, state, batch, drawn):
        apply, sampling = self.run.apply, self.run.sampling(self.config.temperature)

        def one(state, drawn):
            prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
            compared = rollout.compare(apply, state.policy, state.reference, *prompts, drawn, sampling)
            numbers = compared.replace(score_B=jnp.zeros(self.config.batch)).statistics(0.0)
            heard = {name: numbers[name] for name in ("entropy", "length", "kl_exact")}
            return compared if state.value is None else rollout.value(apply, state.value, compared), heard

        return _per_seed(one, (AXES, 0))(_core(state), drawn)

    def learn(self, state, compared, reward_KB):
        """One step of the algorithm for every seed that has had no alarm: (state, numbers over seeds)."""
        rung_K = state.alarms["rung"] & self.run.config.alarms.freeze
        learned, numbers = self._learn_jit(_core(state), compared, reward_KB, rung_K)
        return learned.replace(best=state.best, alarms=state.alarms), numbers

    def _learn(self, state, compared, reward_KB, rung_K):
        parts = {"config": self.config, "apply": self.run.apply, "tx": self.tx}

        def one(state, compared, score_B, rung):
            new, numbers = self.algorithm.step(state, compared.replace(score_B=score_B), **parts)

            def unless_rung(name):
                return jax.tree.map(lambda x, y: jnp.where(rung, x, y), getattr(state, name), getattr(new, name))

            learned = {name: unless_rung(name) for name in ("policy", "value", "optimizer", "kl_coef")}
            return new.replace(**learned), numbers

        learned, numbers = _per_seed(one, (AXES, 0, 0, 0), (AXES, 0))(state, compared, reward_KB, rung_K)
        return learned, over_seeds(numbers)

    def _measure(self, policy, reference, batch, key):
        run = self.run
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        sampling = run.sampling(run.config.evaluation.temperature)

        def one(policy):
            drawn = rollout.sample(run.apply, policy, reference, *prompts, common.row_keys(key, batch), sampling)
            return {
                "response": drawn.response_BR,
                "mask": drawn.mask_BR,
                "kl": jnp.sum(drawn.kl_BR, axis=1),
                "kl_exact": jnp.sum(drawn.kl_exact_BR, axis=1),
                "entropy": jnp.sum(drawn.entropy_BR, axis=1),
                "eos_rate": drawn.eos_B,
                "length": drawn.length_B,
            }

        return _per_seed(one, (0,), 1)(policy)  # rows first, as run.over joins them

    def measure(self, policy, key=None):
        """({name: [K] mean}, K lists of texts, {name: [K, N]}) of the held-out samples of K policies.

        The samples are those of all evaluations, or others, from another key.
        """
        run = self.run
        key = run.key("evaluation") if key is None else key
        rows = run.over(run.arrays("prompts")[1], lambda batch: self._measure_jit(policy, self.reference, batch, key))
        rows = {name: np.moveaxis(values, 1, 0) for name, values in rows.items()}
        texts = [run.decode(*pair) for pair in zip(rows.pop("response"), rows.pop("mask"), strict=True)]
        rows |= self.judge(texts)
        tokens_K = rows["length"].sum(axis=1)
        numbers = {name: values.mean(axis=1) for name, values in rows.items()}
        numbers["entropy"] = rows.pop("entropy").sum(axis=1) / np.maximum(tokens_K, 1)  # per token, not per sample
        return numbers | self.diversity(texts), texts, rows

    @functools.cached_property
    def reference(self):
        """The fine-tuned policy."""
        like = self.run.apply.policy.init(self.run.key("policy init"))
        return sharding.replicate(self.run.parameters("sft", "policy", like), self.run.mesh)

    def texts(self, drawn):
        """K lists of the texts of a rollout."""
        pairs = zip(np.asarray(drawn.response_BR), np.asarray(drawn.mask_BR), strict=True)
        return [self.run.decode(*pair) for pair in pairs]

    def judge(self, texts):
        """{"reward" and its components: [K, N]}: one call of the reward for all seeds."""
        flat = self.run.judge(None, [text for seed in texts for text in seed])
        return {name: values.reshape(len(texts), -1) for name, values in flat.items()}

    def diversity(self, texts):
        """{"distinct2", "repeat_rate": [K]} of the texts."""
        return {
            "distinct2": np.array([diversity.distinct(seed, 2) for seed in texts]),
            "repeat_rate": np.array([diversity.repeat_rate(seed) for seed in texts]),
        }

    def listen(self, state, heard, watched):
        """(state, names of new alarms) after one rollout."""
        heard_state, new = alarms.listen(state.alarms, heard, watched, self.run.config.alarms)
        return state.replace(alarms=heard_state), [name for name, new_K in new.items() if np.any(new_K)]

    def keep(self, state, numbers, before):
        """The state with the policy of every seed put aside that is the best so far and within the limits."""
        wrong = alarms.outside(numbers, before, self.run.config.alarms)
        better_K = (numbers["reward"] > np.asarray(state.best["reward"])) & ~np.any(list(wrong.values()), axis=0)
        found = {
            "policy": state.policy,
            "reward": jnp.asarray(numbers["reward"], jnp.float32),
            "step": jnp.full(better_K.shape, state.step, jnp.int32),
        }

        def choose(old, new):
            return jnp.where(better_K.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        return state.replace(best=jax.tree.map(choose, state.best, found))


def _core(state):
    """What the algorithms know of the state."""
    return state.replace(best=None, alarms=None)


def _per_seed(one, in_axes, out_axes=0):
    """`one` for every seed: jax.vmap. A single seed goes without the axis, as one more batch axis on the parameters
    makes products on a CPU twice as slow."""

    def several(*args):
        mapped = jax.tree.map(lambda axis, part: None if axis is None else part, in_axes, args, is_leaf=_is_none)
        if jax.tree.leaves(mapped)[0].shape[0] > 1:
            return jax.vmap(one, in_axes, out_axes)(*args)
        return _on_axes(lambda x, axis: jnp.expand_dims(x, axis), out_axes, one(*_on_axes(_first, in_axes, args)))

    return several


def _on_axes(function, axes, tree):
    """function(leaf, axis) where the prefix `axes` of the tree has an axis; the leaf itself where it has None."""

    def below(axis, part):
        return part if axis is None else jax.tree.map(lambda x: function(x, axis), part)

    return jax.tree.map(below, axes, tree, is_leaf=_is_none)


def _first(x, _):
    return x[0]  # in_axes are 0 or None


def _is_none(x):
    return x is None


def over_seeds(numbers):
    """{name: [K]} as means over seeds and, for more than one, the half-width of their 95% interval."""
    told = {}
    for name, value_K in numbers.items():
        told[name] = value_K.mean()
        if len(value_K) > 1:
            told[f"{name}_ci95"] = value_K.std(ddof=1) * interval.t95(len(value_K))
    return told


def _mean_distinct(texts, count):
    """Distinct-2 of `count` samples, the mean over as many groups as there are."""
    groups = [texts[i : i + count] for i in range(0, max(len(texts) - count, 0) + 1, count)]
    return float(np.mean([diversity.distinct(group, 2) for group in groups]))


def _compare(before, after, reward_N, rows_after):
    """The numbers of the summary: means over seeds; each seed's own under rl/seeds where there are several."""
    numbers = {}
    for name, value_K in after.items():
        numbers |= {f"rl/{name}_before": before[name], f"rl/{name}_after": float(value_K.mean())}
    numbers |= {f"rl/{name}": numbers[f"rl/{name}_after"] for name in ("kl", "kl_exact", "repeat_rate", "length")}
    gain, ci95 = interval.paired_gain(rows_after["reward"].mean(axis=0), reward_N)
    numbers |= {"rl/reward_gain": gain, "rl/reward_ci95": ci95}
    numbers["rl/best_of_n_at_kl"] = best_of_n.at_kl(reward_N, numbers["rl/kl_exact"])
    if len(after["reward"]) > 1:
        numbers["rl/seeds"] = {name: value_K.tolist() for name, value_K in after.items()}
    return numbers


def _table(before, after, numbers):
    """Rows of the final table."""
    rows = []
    for name in ("reward", "kl_exact", "distinct2", "repeat_rate", "entropy", "length", "eos_rate"):
        value = float(after[name].mean())
        ci95 = numbers["rl/reward_ci95"] if name == "reward" else None
        rows.append((name, before[name], value, value - before[name], ci95))
    return [*rows, ("best-of-n reward at this KL", None, numbers["rl/best_of_n_at_kl"], None, None)]


def _completions(run, stage):
    with open(run.workdir / stage / "samples.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["completion"] for line in file]
