"""What a policy is worth on the held-out questions, and what reinforcement learning has changed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import rewards, rollout
from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.evaluate import diversity, interval, win_rate
from rlhf_jax.evaluate.pass_at_k import pass_at_k
from rlhf_jax.stages import row_keys
from rlhf_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy's completions of the held-out questions, one each."""

    numbers: dict[str, float]  # means; entropy is per token
    rows: dict[str, np.ndarray]  # [N] each
    texts: list[str]
    tokens: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [N, R] each: ids, mask, log-probs


def questions_of(setup, part=None):
    """(arrays, rows) of the held-out prompts of a policy; part: (i, n), the i-th of n shares of them; None: all."""
    arrays, rows = setup.questions("prompts")
    if part is None:
        return arrays, rows
    share = slice(part[0], len(rows), part[1])
    return {name: array[share] for name, array in arrays.items()}, rows[share]


def sample(policy, batch, key, *, apply, sampling):
    """A completion of each prompt of a batch of questions: {"response" [B, R], "mask" [B, R], "eos_rate" [B]}."""
    drawn = rollout.draw(apply, policy, batch["prompt_BP"], batch["prompt_mask_BP"], row_keys(key, batch), sampling)
    return {"response": drawn.response_BR, "mask": drawn.mask_BR, "eos_rate": drawn.done_B}


def _compared(policy, reference, batch, key, *, apply, sampling, at):
    """The Rollout of a completion of each prompt, compared with the reference as the Sampling `at` says."""
    prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
    drawn = rollout.draw(apply, policy, *prompts, row_keys(key, batch), sampling)
    return rollout.compare(apply, policy, reference, *prompts, drawn, at)


def measurement(setup, config, reward, holdout=None, part=None):
    """A function (state, key) -> Measured; reward: None where there is none, and only `task.judge` says how good it is.

    holdout: a second reward model, as a Learned, whose scores are "judge". part: as of `questions_of`. KL is measured
    at the training temperature, everything else at the evaluation temperature.
    """
    arrays, questions = questions_of(setup, part)
    evaluation = setup.evaluation

    def compiled(temperature):
        # Temperature 0 has no distribution to compare, so policies are compared at the training temperature.
        samplings = {"sampling": setup.sampling(temperature), "at": setup.sampling(temperature or config.temperature)}
        return setup.jit(functools.partial(_compared, apply=setup.apply, **samplings))

    compared = {temperature: compiled(temperature) for temperature in (evaluation.temperature, config.temperature)}

    def at(state, key, temperature):
        def one(batch):
            drawn = compared[temperature](state.policy, state.reference, batch, key)
            rows = {
                "response": drawn.response_BR,
                "mask": drawn.mask_BR,
                "logp": drawn.logp_BR,
                "logp_ref": drawn.logp_ref_BR,
                "kl": jnp.sum(drawn.kl_BR, axis=1),
                "kl_exact": jnp.sum(drawn.kl_exact_BR, axis=1),
                # The most likely token is certain.
                "entropy": jnp.sum(drawn.entropy_BR if temperature else 0 * drawn.mask_BR, axis=1),
                "eos_rate": drawn.eos_B,
                "length": drawn.length_B,
            }
            if reward and not reward.on_host:
                rows[reward.metric] = rewards.total(reward(state.reward, rewards.Completions((), drawn, setup.decode)))
            if holdout:
                rows["judge"] = rewards.total(holdout(holdout.params, rewards.Completions((), drawn, setup.decode)))
            return rows

        return setup.over(arrays, one, len(questions))

    def measure(state, key=None):
        key = setup.key("evaluation") if key is None else key
        rows = at(state, key, evaluation.temperature)
        if evaluation.temperature != config.temperature:
            trained = at(state, key, config.temperature)
            rows |= {name: trained[name] for name in ("kl", "kl_exact")}
        tokens = {name: rows.pop(name) for name in ("response", "mask", "logp", "logp_ref")}
        texts = setup.decode(tokens["response"], tokens["mask"])
        if reward and reward.on_host:
            rows |= named(reward, reward.scores(questions, texts))
        rows |= judge(setup.task, reward, questions, texts, rows["eos_rate"])
        numbers = {name: float(np.mean(values)) for name, values in rows.items()}
        numbers["entropy"] = float(rows.pop("entropy").sum() / max(rows["length"].sum(), 1))
        return Measured(numbers | diversity_of(texts), rows, texts, tokens)

    return measure


def passes(setup, config, state, sides, part=None):
    """{"pass_1" and the suffix of a side, "pass_2", "pass_4", ...}: pass@k of the held-out questions, 0 to 1.

    The sides are the reference and the policy of a state, at the training temperature. {} where the task does not say
    which answer is right. pass@k is the unbiased estimate of Chen et al. 2021 (evaluate/pass_at_k.py).
    """
    arrays, questions = questions_of(setup, part)
    draws, sampling = setup.evaluation.draws, setup.sampling(config.temperature)
    once = setup.jit(functools.partial(sample, apply=setup.apply, sampling=sampling))

    def measure(policy):
        columns = []
        for i in range(draws if draws > 1 else 0):
            key = jax.random.fold_in(setup.key("evaluation"), i)
            found = setup.over(arrays, lambda batch, key=key: once(policy, batch, key), len(questions))
            texts = setup.decode(found["response"], found["mask"])
            judged = judge(setup.task, None, questions, texts, found["eos_rate"])
            if "exact" not in judged:
                return {}
            columns.append(judged["exact"])
        sizes = [2**i for i in range(draws.bit_length())] if columns else []
        return {f"pass_{k}": float(pass_at_k(np.stack(columns, axis=1), k).mean()) for k in sizes}

    both = zip(sides, (state.reference, state.policy), strict=True)
    return {f"{name}{suffix}": value for suffix, policy in both for name, value in measure(policy).items()}


def judge(task, reward, rows, texts, ended_N):
    """`task.judge`, or nothing where that is the reward itself, so that a function scores each completion once.

    An answer is exact only where its completion has ended: ended_N [N], on a device or not.
    """
    if reward and getattr(task, "reward", None) == reward.name:
        return {}
    found = task.judge(rows, texts)
    return found | ({"exact": found["exact"] * sharding.gather(ended_N)} if "exact" in found else {})


def means(rows):
    return {name: np.mean(values) for name, values in rows.items()}


def named(reward, components):
    """The components by name, and the total by the name of the reward's metric."""
    return {reward.metric: rewards.total(components)} | components


def diversity_of(texts):
    return {"distinct2": diversity.distinct(texts, 2), "repeat_rate": diversity.repeat_rate(texts)}


def compare(first, last, sides, metric):
    """The summary's numbers before and after, the gains, and the win rate by what `known` says."""
    before, after = sides
    numbers: dict[str, Any] = {}
    for name, value in last.numbers.items():
        numbers |= {name: value, f"{name}{after}": value, f"{name}{before}": first.numbers[name]}
    for name in dict.fromkeys(name for name in (metric, "judge", "gold") if name in last.rows):
        gain, ci95 = interval.paired_gain(last.rows[name], first.rows[name])
        spread = float(np.std(first.rows[name]))
        numbers |= {f"{name}_gain": gain, f"{name}_ci95": ci95, f"{name}{before}_sd": spread}
    best = known(last.rows, metric)
    if best is None:
        return numbers
    rate, ci95 = win_rate.win_rate(last.rows[best], first.rows[best])
    return numbers | {"win_rate": rate, "win_rate_ci95": ci95}


def known(names, metric):
    """What a policy is judged by: gold where it is known, else the hold-out judge, else the reward, `metric`."""
    return next((name for name in ("gold", "judge") if name in names), metric)


def metric_of(measured, reward):
    """The number that is the score of a policy which learns from pairs, or None.

    It is the reward that only measures it; else the task's own number, gold, or the hold-out judge's.
    """
    names = (reward.metric if reward else "", "exact", "reward", "gold", "judge")
    return next((name for name in names if name in measured.rows), None)


def table(first, last, numbers, metric):
    """Rows of the final table: (name, before, after, change, its 95% interval)."""
    rows = []
    order = ("gold", "judge", metric, "kl", "kl_exact", "distinct2", "repeat_rate", "entropy", "eos_rate", "length")
    for name in dict.fromkeys(name for name in order if name in last.numbers):
        change = last.numbers[name] - first.numbers[name]
        ci95 = interval.paired_gain(last.rows[name], first.rows[name])[1] if name in last.rows else None
        rows.append((name, first.numbers[name], last.numbers[name], change, ci95))
    if "best_of_n_at_kl" in numbers:
        rows.append((f"best-of-n {metric} at this KL", None, numbers["best_of_n_at_kl"], None, None))
    return tuple(rows)


def samples(measured, state, config, metric):
    """Completions with their numbers.

    `total` is what the algorithm maximizes: the score after the rule for a missing EOS, minus the KL penalty with the
    current coefficient.
    """
    rows = measured.rows
    score_N = np.asarray(policy_algorithm.final_score(
        rows[metric], rows["eos_rate"], missing_eos=config.missing_eos, penalty=config.missing_eos_penalty
    ))  # fmt: skip
    return columns(measured, metric, total=score_N - float(state.kl_coef) * rows["kl"])


def columns(measured, metric, **more):
    """Completions, each with its score (the number `metric`, if any), its other numbers, and `more` arrays [N]."""
    names = {"score": metric} | {name: name for name in ("kl", "judge", "gold", "exact")}
    found = {name: measured.rows[each] for name, each in names.items() if each in measured.rows} | more
    return [
        {"completion": text} | {name: float(values[i]) for name, values in found.items()}
        for i, text in enumerate(measured.texts)
    ]


def side_by_side(name, questions, first, last, beside, metric, task):
    """Rows of samples.jsonl: each question's completion before and after, lists as `samples` makes them."""
    if not task.same_prompt:
        pairs = zip(questions, first, last, strict=True)
        return [{"prompt": row["prompt"], "sft": before, name: after} for row, before, after in pairs]
    rows = []
    for more, before, after in zip(beside or [{}] * len(questions), first, last, strict=True):
        texts = {"sft": before["completion"], "rl": after["completion"]}
        rows.append(more | texts | {f"{metric}_sft": before["score"], f"{metric}_rl": after["score"]})
    return rows
