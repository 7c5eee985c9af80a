"""Predicts the memory of PPO from its compiled programs: nothing is allocated, and no weights or data are read.

The numbers are XLA's memory_analysis of each program, compiled for this machine. On a CPU, APART stops XLA from merging
a recomputed value with the first one: otherwise rematerialization would save nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import generate, rollout
from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.models import heads
from rlhf_jax.training import guard, optim

APART = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def ppo(config, vocab_size, devices=1):
    """{part: bytes per device} of a Config's PPO stage; vocab_size is the tokenizer's number of ids.

    state: the arrays of the TrainState, always allocated. copy: the arrays that an update changes; the old ones are
    kept, in case the update is not finite (guard.py). draw, judge, update: the peaks of an iteration's three programs,
    state included. The batch is spread over the devices; memory for communication between them is not counted.
    """
    config = dataclasses.replace(config, ppo=_share(config.ppo, devices))
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    apply = rollout.Apply(heads.LanguageModel(model), heads.ScalarModel(model))
    tx, ids = optim.adamw(config.ppo, config.ppo.steps), {"eos_id": 0, "pad_id": 1}
    options = {name: getattr(config.ppo, name) for name in ("temperature", "lanes", "widths")}
    sampling = generate.Sampling(config.data.response_length, **ids, **options)

    def begin(key):
        policy = apply.policy.init(key)
        value = apply.scalar.zero_head(policy)
        return ppo_algorithm.init(policy, value, value, key, config=config.ppo, tx=tx)

    def draw(state, *prompts):
        return rollout.draw(apply, state.policy, *prompts, rollout.keys(state, config.ppo.batch), sampling)

    def judge(state, prompt_BP, mask_BP, drawn):
        return rollout.judge(apply, state, prompt_BP, mask_BP, drawn, sampling)

    update = functools.partial(ppo_algorithm.step, config=config.ppo, apply=apply, tx=tx)
    update = guard.guarded(update, config.guard)
    shape = (config.ppo.batch, config.data.prompt_length)
    prompts = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    state = jax.eval_shape(begin, jax.random.key(0))
    drawn = jax.eval_shape(draw, state, *prompts)
    judged = jax.eval_shape(judge, state, *prompts, drawn)
    return {
        "state": _size(state),
        "copy": _size((state.policy, state.value, state.optimizer)),
        "draw": _size(state) + _beside(jax.jit(draw), state, *prompts),
        "judge": _size(state) + _beside(jax.jit(judge), state, *prompts, drawn),
        "update": _size(state) + _beside(jax.jit(update, donate_argnums=0), state, judged),
    }


def _share(config, devices):
    """One device's share of the config section. microbatches stays: each microbatch is spread over the devices."""
    return dataclasses.replace(config, batch=config.batch // devices, lanes=config.lanes // devices)


def _beside(function, state, *args):
    """Bytes of a program in addition to the state: its other arguments, results and temporary arrays."""
    options = APART if jax.default_backend() == "cpu" else None
    memory = function.lower(state, *args).compile(options).memory_analysis()
    return _size(args) + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def _size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
