"""AdamW, its schedules, and gradients summed over microbatches."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.fields import choice, number
from rlhf_jax.ops import sharded
from rlhf_jax.training import sharding

SCHEDULES = ("linear", "cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Config:
    """An optimizer. The defaults are the TL;DR recipe's (arXiv 2403.17031)."""

    lr: float = number(3e-6, above=0, most=10)  # peak learning rate
    schedule: str = choice("linear", *SCHEDULES)  # of the learning rate, after the warm-up
    warmup: int = number(0, least=0)  # optimizer steps in which the learning rate rises from 0 to lr
    end_lr: float = number(0.0, least=0, most=1)  # where linear and cosine end, as a fraction of lr
    weight_decay: float = number(0.0, least=0)  # AdamW's; each step subtracts learning rate x weight_decay x weight
    adam_b2: float = number(0.999, least=0, below=1)  # decay of the mean squared gradient
    adam_eps: float = number(1e-5, above=0, most=1)  # added to the root of the mean squared gradient
    max_grad_norm: float = number(1.0, least=0)  # larger gradients are scaled down to this global norm; 0: never

    def unused(self):
        """Fields without effect, and why."""
        if self.schedule == "constant":
            yield "end_lr", "schedule is constant"


def problems(config, *, minibatches=1):
    """(field, what was expected) of the config of a stage."""
    if config.batch % (slices := minibatches * config.microbatches):
        yield "batch", f"a multiple of minibatches x microbatches = {slices}"


def schedule(config, updates):
    """Learning rate as a function of the optimizer step, reaching end_lr * lr after `updates` steps."""
    rest = max(updates - config.warmup, 1)
    after = {
        "linear": lambda: optax.linear_schedule(config.lr, config.lr * config.end_lr, rest),
        "cosine": lambda: optax.cosine_decay_schedule(config.lr, rest, config.end_lr),
        "constant": lambda: optax.constant_schedule(config.lr),
    }[config.schedule]()
    if config.warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, config.warmup), after], [config.warmup])


@functools.lru_cache(maxsize=64)
def rates(config, updates):
    """The learning rate [updates] of each optimizer step."""
    return np.broadcast_to(jax.jit(schedule(config, updates))(np.arange(updates)), updates)


@functools.lru_cache(maxsize=64)
def adamw(config, updates):
    """The optax transformation. Equal configs get the same one: a new one would cause a new compilation."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adam = optax.chain(
        scale_by_adam(b2=config.adam_b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, updates)),
    )
    return optax.chain(clip, adam)


class AdamState(NamedTuple):
    """That of `scale_by_adam`. Its own type says that it has heeded `take`."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    mu: Any
    nu: Any


def scale_by_adam(*, b1=0.9, b2, eps):
    """optax.scale_by_adam, whose state stays as it is where `take` is False.

    Whether the moments move is chosen before the parameters read them. Were it chosen afterwards, XLA would compute the
    parameters from the old moments, and set a copy of both aside until it has.
    """

    def init(params):
        return AdamState(jnp.zeros((), jnp.int32), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(grads, state, params=None, *, take=True):
        count = optax.safe_increment(state.count)
        mu = select(take, optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
        nu = select(take, optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2), state.nu)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        changes = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return changes, AdamState(select(take, count, state.count), mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def select(take, new, old):
    """The new tree where `take` is True, else the old one; an AdamState has chosen already."""

    def chosen(x):
        return take is True or isinstance(x, AdamState)

    return jax.tree.map(lambda x, y: x if chosen(x) else jnp.where(take, x, y), new, old, is_leaf=chosen)


@flax.struct.dataclass
class Update:
    """What one update carries from optimizer step to optimizer step: trees by name ("policy", "value", ...)."""

    params: Any
    optimizer: Any
    finite: jax.Array  # () bool, all numbers of this update so far, and of the updates before it
    taken: jax.Array  # () int32, optimizer steps counted so far


def begin(state, names, given, *, guard):
    """The Update of these trees of a TrainState, before its first optimizer step. `given` is what it learns from."""
    params = {name: getattr(state, name) for name in names}
    finite = jnp.array(True) if guard == "off" else all_finite(given)
    if guard == "stop":  # the first update that is not finite is the last, however many were dispatched after it
        finite &= state.skipped == 0
    return Update(params, state.optimizer, finite, jnp.zeros((), jnp.int32))


def step(update, state, grads, numbers, *, tx, guard):
    """One optimizer step with gradients by name: (Update, {"<name>_grad_norm": norm before clipping}).

    Unless guard is "off", nothing changes from the first step on whose numbers or gradient norms are not finite. Only
    scalars are looked at: the choice is part of the kernels that write the parameters, and no second copy of them is
    kept. Steps that `state.applied` counts already are not taken again.
    """
    norms = {f"{name}_grad_norm": norm(grads[name]) for name in grads}
    if guard == "off":
        finite = take = True
    else:
        finite = update.finite & all_finite((numbers, norms))
        take = finite & (update.taken >= state.applied)
    tx = optax.with_extra_args_support(tx)
    params, optimizer = {}, {}
    for name, params_old in update.params.items():
        changes, optimizer_new = tx.update(grads[name], update.optimizer[name], params_old, take=take)
        params[name] = sharding.keep(select(take, optax.apply_updates(params_old, changes), params_old))
        optimizer[name] = sharding.keep(select(take, optimizer_new, update.optimizer[name]))
    taken = update.taken + (finite | (update.taken < state.applied))
    return Update(params, optimizer, jnp.asarray(finite), taken), norms


def end(state, update, *, guard):
    """(TrainState after the update, {"skipped": updates left out so far}).

    guard "stop": after a number that is not finite the state stays where it is, `applied` counts the optimizer steps
    that were taken before it, and nothing moves any more. "skip": the run goes on with the next step.
    """
    new = state.replace(step=state.step + 1, optimizer=update.optimizer, **update.params)
    if guard == "off":
        return new, {"skipped": state.skipped}
    skipped = state.skipped + ~update.finite
    if guard == "stop":
        first = ~update.finite & (state.skipped == 0)
        new = new.replace(
            step=state.step + update.finite, applied=jnp.where(first, update.taken, state.applied * ~update.finite)
        )
    return new.replace(skipped=skipped), {"skipped": skipped}


def once(state, name, grads, batch, weights, *, microbatches, tx, guard, record):
    """The one optimizer step that a batch gives to the parameters `name` of a TrainState: (state, metrics).

    grads(slice) is what `apart` returns; weights [B] are those of `accumulate`. With `record`, the metrics have the
    arrays by row under "record".
    """
    (gradient, aux), rows = accumulate(grads, batch, weights, microbatches, has_rows=True)
    update = begin(state, (name,), batch, guard=guard)
    update, norms = step(update, state, {name: gradient}, aux, tx=tx, guard=guard)
    state, skipped = end(state, update, guard=guard)
    metrics = {**aux, "grad_norm": norms[f"{name}_grad_norm"], **skipped}
    return state, metrics | ({"record": rows} if record else {})


def all_finite(tree):
    """() bool: no number of the tree is NaN or infinite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])) if leaves else jnp.array(True)


def apart(grads, aux, record):
    """((gradients, scalars), arrays by row) of a loss whose aux has the arrays under "rows"; {} unless recorded."""
    scalars = {name: value for name, value in aux.items() if name != "rows"}
    return (sharding.keep(grads), scalars), aux["rows"] if record else {}


def accumulate(grad_fn, batch, weights, microbatches, *, has_rows=False, group=1):
    """The mean of grad_fn over `microbatches` equal slices of the batch, equal to grad_fn of the whole batch.

    grad_fn(slice) returns a pytree of means over the slice. weights [B] are the rows' weights in these means (their
    numbers of tokens, say). A slice is weighted by its share of the weights, so padding does not bias the mean.

    has_rows: grad_fn returns (means, arrays by row), and so does this, with the rows in the order of the batch.
    group: rows next to each other that stay in one slice.
    """
    if not has_rows:
        return accumulate(lambda part: (grad_fn(part), {}), batch, weights, microbatches, has_rows=True, group=group)[0]
    if microbatches == 1:
        return grad_fn(batch)

    def deal(x):
        """Groups of rows are dealt out in turn, so every slice is spread evenly over the devices."""
        x = x.reshape(-1, microbatches, group, *x.shape[1:]).swapaxes(0, 1).reshape(microbatches, -1, *x.shape[1:])
        return sharded.constrain(x, None, sharded.ROWS)

    def collect(x):
        """The rows of all slices in the order of the batch."""
        return x.reshape(microbatches, -1, group, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])

    slices = jax.tree.map(deal, (batch, weights))
    shares = jnp.sum(slices[1], axis=1) / jnp.maximum(jnp.sum(weights), 1)

    def add(total, part):
        rows, share = part
        means, arrays = grad_fn(rows)
        return jax.tree.map(lambda t, x: t + share * x, total, means), arrays

    shapes = jax.eval_shape(grad_fn, jax.tree.map(lambda x: x[0], slices[0]))[0]
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    means, arrays = jax.lax.scan(add, zero, (slices[0], shares))
    return means, jax.tree.map(collect, arrays)


def norm(grads):
    """Global norm of a gradient pytree, before clipping."""
    return optax.tree.norm(grads)
