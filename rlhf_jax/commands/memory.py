"""Predicts the memory of reinforcement learning from its compiled programs: nothing is allocated or read.

The numbers are XLA's memory_analysis of each program, compiled for this machine. On a CPU, APART stops XLA from merging
a recomputed value with the first one: otherwise rematerialization would save nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlhf_jax import generate, rollout, tasks
from rlhf_jax.algorithms import POLICY
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora
from rlhf_jax.rewards import function, learned
from rlhf_jax.stages.rl import Iteration
from rlhf_jax.training import sharding

APART = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def rl(config, vocab_size, devices=1):
    """{part: bytes per device} of a Config's last stage; vocab_size is the tokenizer's number of ids.

    state: the arrays of the TrainState, always allocated; the best policy too, if that is the result, and the base of
    adapters (lora), once. A value model and a reward model count if the config has them. draw, judge, update: the peaks
    of an iteration's steps, state included; judge is the larger of two: reference and values, or the scores of a
    learned reward. The guard keeps no copy of what an update changes. The batch is spread over the devices;
    communication between them is not counted.
    """
    state, base, programs = compiled(config, vocab_size, _share(config.rl, devices))
    peak = {name: _beside(*program) for name, program in programs.items()}
    if "reward" in peak:  # it runs while the completions are still there
        *_, drawn = programs["judge"][1]
        peak["judge"] = max(peak["judge"], _size(drawn) + peak.pop("reward"))
    best = _size(state.policy) if config.evaluation.result == "best" else 0
    kept = _size(state) + best + _size(base)
    return {"state": kept} | {name: kept + size for name, size in peak.items()}


def compiled(config, vocab_size, section, mesh=None):
    """(the state, the base of adapters or None, {name: (function, its arguments)}) of an iteration, all as shapes.

    section: that of the algorithm. mesh: the shapes say where the arrays lie on it, and functions are compiled for it.
    """
    if not config.sampled:
        raise InputError(
            f"algorithm: expected {' or '.join(POLICY)}, whose iterations are measured, got {config.algorithm}"
        )
    task = tasks.load(config)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    whole = None
    if config.lora.rank:
        whole = placed(jax.eval_shape(heads.LanguageModel(model).init, jax.random.key(0)), mesh)
    base = lora.Base(config.lora, lambda: whole) if config.lora.rank else None
    apply = rollout.Apply(heads.LanguageModel(model, base=base), heads.ScalarModel(model, base))
    jit = base.jit if base else jax.jit
    jit = functools.partial(sharding.jit, mesh=mesh, jit=jit) if mesh else jit
    options = {name: getattr(section, name) for name in ("temperature", "lanes", "widths", "group")}
    sampling = generate.Sampling(task.response_length, eos_id=0, pad_id=1, **options)
    reward = learned.Learned(apply, None, sampling, jit) if config.learned else function.load(config.reward.kind)
    iteration = Iteration(POLICY[config.algorithm], section, apply, sampling, config.guard.action, jit)

    def begin(key):
        policy = apply.policy.init(key)
        scalar = apply.scalar.zero_head(policy)
        return iteration.begin(policy, key, value=scalar, reward=scalar if config.learned else None)

    shape = (section.batch, task.prompt_length)
    prompts = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))
    state = placed(jax.eval_shape(begin, jax.random.key(0)), mesh)
    programs = iteration.programs(state, prompts, reward)
    for name, (program, (first, *rows)) in programs.items():
        programs[name] = program, (placed(first, mesh), *placed(rows, mesh, rows=True))
    return state, whole, programs


def placed(shapes, mesh, rows=False):
    """The shapes, laid over the mesh as parameters or as rows; as they are without a mesh."""
    if mesh is None:
        return shapes
    if not rows:
        return sharding.like(shapes, mesh)
    where = sharding.rows(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


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
