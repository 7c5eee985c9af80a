"""Collapse, seen and stopped: a reward can be had by writing one thing over and over, and these numbers tell.

Limits are against the policy that reinforcement learning began with, at the same number of samples. Arrays are [K],
one entry a seed.
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
    patience: int = number(10, least=1)  # iterations that the running means average over
    freeze: bool = True  # a seed whose alarm trips stops learning; False: the alarm is only counted


def outside(numbers, before, config):
    """{name: [K] bool}, which of WATCHED are out of bounds; before is {name: number}."""
    wrong = {
        "distinct2": numbers["distinct2"] < config.distinct2 * before["distinct2"],
        "repeat_rate": numbers["repeat_rate"] > before["repeat_rate"] + config.repeat_rate,
        "entropy": numbers["entropy"] < config.entropy * before["entropy"],
        "length": numbers["length"] < config.length * before["length"],
    }
    if config.kl_exact:
        wrong["kl_exact"] = numbers["kl_exact"] > config.kl_exact
    return {name: np.atleast_1d(value) for name, value in wrong.items()}


def begin(before, seeds):
    """The state before the first iteration: running means at what they are before, and no alarm."""
    return {
        "mean": {name: jnp.full(seeds, before[name], jnp.float32) for name in WATCHED},
        "rung": jnp.zeros(seeds, bool),
    }


def listen(state, numbers, before, config):
    """(the next state, {name: [K]} of new alarms) after one iteration's numbers. An alarm that has rung stays on."""
    mean = {name: state["mean"][name] + (numbers[name] - state["mean"][name]) / config.patience for name in WATCHED}
    rung_K = np.asarray(state["rung"])
    wrong = outside({name: np.asarray(value) for name, value in mean.items()}, before, config)
    new = {name: wrong_K & ~rung_K for name, wrong_K in wrong.items()}
    rung_K = rung_K | np.any(list(wrong.values()), axis=0)
    return {"mean": {name: jnp.asarray(value) for name, value in mean.items()}, "rung": jnp.asarray(rung_K)}, new
