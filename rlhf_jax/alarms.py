"""Detects and stops collapse: a policy can earn reward by repeating one text, and these numbers show it.

Limits are relative to the first policy of reinforcement learning, measured on the same number of samples.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from rlhf_jax.fields import number

WATCHED = ("distinct2", "repeat_rate", "entropy", "length", "kl_exact")


@dataclasses.dataclass(frozen=True)
class Config:
    """Outside these limits a policy has collapsed, whatever its reward. "Before" is before reinforcement learning."""

    distinct2: float = number(0.7, least=0, most=1)  # smallest share of distinct word bigrams, relative to before
    # Largest increase, over before, of the share of samples that repeat a word four times.
    repeat_rate: float = number(0.05, least=0, most=1)
    entropy: float = number(0.3, least=0, most=1)  # smallest entropy per token, relative to before
    length: float = number(0.5, least=0, most=1)  # smallest number of tokens a sample, relative to before
    kl_exact: float = number(5.0, least=0)  # largest KL from the reference, nats a sequence; 0: no limit
    # Largest fall of gold, or of the hold-out judge, below its best evaluation while the reward has risen, in standard
    # errors of the difference, as 2; 0: no limit
    over_optimization: float = number(0.0, least=0, most=100)
    patience: int = number(10, least=1)  # iterations that the running means average over
    freeze: bool = True  # an alarm ends the learning; False: the alarm is only counted

    def unused(self):
        """Fields without effect, and why."""
        if not self.active:
            yield "patience", "no limit is set"
            yield "freeze", "no limit is set"

    @property
    def active(self):
        """Whether any limit is set."""
        limits = dataclasses.replace(self, patience=OFF.patience, freeze=OFF.freeze)
        return limits != OFF


OFF = Config(distinct2=0.0, repeat_rate=1.0, entropy=0.0, length=0.0, kl_exact=0.0, freeze=False)  # no limit


def outside(numbers, before, config):
    """{name: bool}: which of WATCHED are beyond their limits. `before` has the first policy's numbers."""
    wrong = {
        "distinct2": numbers["distinct2"] < config.distinct2 * before["distinct2"],
        "repeat_rate": numbers["repeat_rate"] > before["repeat_rate"] + config.repeat_rate,
        "entropy": numbers["entropy"] < config.entropy * before["entropy"],
        "length": numbers["length"] < config.length * before["length"],
        "kl_exact": bool(config.kl_exact) and numbers["kl_exact"] > config.kl_exact,
    }
    return {name: bool(value) for name, value in wrong.items()}


def begin(before):
    """The state before the first iteration: running means of the first policy's numbers, and no alarm."""
    return {"mean": {name: jnp.float32(before[name]) for name in WATCHED}, "tripped": jnp.array(False)}


def track(state, numbers, before, config):
    """(next state, names of the limits that trip now) after one iteration's numbers. An alarm stays tripped."""
    mean = {name: state["mean"][name] + (numbers[name] - state["mean"][name]) / config.patience for name in WATCHED}
    wrong = [name for name, value in outside(mean, before, config).items() if value]
    tripped = bool(state["tripped"])
    after = state | {
        "mean": {name: jnp.float32(value) for name, value in mean.items()},
        "tripped": jnp.array(tripped or bool(wrong)),
    }
    return after, [] if tripped else wrong


def watch_judge(judge, reward):
    """What `judged` compares with before the first iteration: the judge's number and the reward of that policy."""
    return {"judge": {"best": jnp.float32(judge), "reward": jnp.float32(reward), "fell": jnp.array(False)}}


def judged(state, judge_N, reward, config):
    """The state after an evaluation with the judge's scores [N] and the mean reward.

    `fell`: the reward is above that of the judge's best evaluation, and the judge below it by more than the limit, in
    standard errors of the difference of two means of N. That is over-optimization (Gao et al. 2022): the policy gains
    by errors of the reward.
    """
    judge, best = float(np.mean(judge_N)), state["judge"]
    error = float(np.std(judge_N, ddof=1)) * (2 / len(judge_N)) ** 0.5
    fell = reward > float(best["reward"]) and float(best["best"]) - judge > config.over_optimization * error
    if judge > float(best["best"]):
        best = {"best": jnp.float32(judge), "reward": jnp.float32(reward), "fell": best["fell"]}
    return state | {"judge": best | {"fell": jnp.array(fell or bool(best["fell"]))}}
