"""How much memory reinforcement learning takes, from its compiled programs alone: nothing is allocated or read.

It is XLA's own account of each program (memory_analysis), compiled for this machine. On a CPU one pass of XLA is left
out, which merges what shall be computed again with what was: rematerialization would save nothing there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import generate, rollout, tasks
from rlhf_jax.algorithms import POLICY
from rlhf_jax.models import heads
from rlhf_jax.rewards import function, learned
from rlhf_jax.stages.rl import Iteration

APART = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def rl(config, vocab_size, devices=1):
    """{what: bytes a device} of the reinforcement learning of a Config whose tokenizer has so many ids.

    state: the arrays of a TrainState, at all times; the best policy too, where that is the result. Value model and
    reward model are counted where there are any.
    draw, judge and update are the peaks of the steps of an iteration, the state included. judge is the comparison with
    the reference and the values, then the scores of a learned reward, whichever takes more.
    The guard (training/guard.py) keeps no copy of what an update changes; what its check takes is part of update.
    The batch is spread over the devices; what is then sent between them is not counted.
    """
    task, section = tasks.load(config), _share(config.rl, devices)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    apply = rollout.Apply(heads.LanguageModel(model), heads.ScalarModel(model))
    options = {name: getattr(section, name) for name in ("temperature", "lanes", "widths")}
    sampling = generate.Sampling(task.response_length, eos_id=0, pad_id=1, **options)
    reward = learned.Learned(apply, None, sampling) if config.learned else function.load(config.reward.kind)
    iteration = Iteration(POLICY[config.algorithm], section, apply, sampling, config.guard.action)

    def begin(key):
        policy = apply.policy.init(key)
        scalar = apply.scalar.zero_head(policy)
        return iteration.begin(policy, key, value=scalar, reward=scalar if config.learned else None)

    shape = (section.batch, task.prompt_length)
    prompts = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    state = jax.eval_shape(begin, jax.random.key(0))
    programs = iteration.programs(state, prompts, reward)
    peak = {name: _beside(*program) for name, program in programs.items()}
    if "reward" in peak:  # it runs while the completions are still there
        *_, drawn = programs["judge"][1]
        peak["judge"] = max(peak["judge"], _size(drawn) + peak.pop("reward"))
    best = _size(state.policy) if config.evaluation.result == "best" else 0
    kept = _size(state) + best
    return {"state": kept} | {name: kept + size for name, size in peak.items()}


def _share(section, devices):
    """The section of a device. Microbatches stay as many: each is spread over the devices."""
    return dataclasses.replace(section, batch=section.batch // devices, lanes=section.lanes // devices)


def _beside(function, args):
    """Bytes of a program beside its first argument, the state: other arguments, results, and what it computes with."""
    options = APART if jax.default_backend() == "cpu" else None
    memory = function.lower(*args).compile(options).memory_analysis()
    return _size(args[1:]) + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def _size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
