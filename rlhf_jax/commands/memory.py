"""How much memory PPO takes, from its compiled programs alone: nothing is allocated, and no weights or data are read.

It is XLA's own account of each program (memory_analysis), compiled for this machine. On a CPU it is told to leave apart
what shall be computed again: else it merges both, and rematerialization saves nothing.
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
    """{what: bytes a device} of the PPO stage of a Config whose tokenizer has so many ids.

    state: the arrays of a TrainState, at all times. copy: what an update changes, and keeps to be left out (guard.py).
    draw, judge and update are the peaks of the three programs of an iteration, the state included.
    The batch is spread over the devices; what is then sent between them is not counted.
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
    """The section of a device. Microbatches stay as many: each is spread over the devices."""
    return dataclasses.replace(config, batch=config.batch // devices, lanes=config.lanes // devices)


def _beside(function, state, *args):
    """Bytes of the program beside its state: other arguments, results, and what it computes with."""
    options = APART if jax.default_backend() == "cpu" else None
    told = function.lower(state, *args).compile(options).memory_analysis()
    return _size(args) + told.output_size_in_bytes - told.alias_size_in_bytes + told.temp_size_in_bytes


def _size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
