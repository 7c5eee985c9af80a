"""AdamW, its schedules, and gradients summed over microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """An optimizer. The defaults are the TL;DR recipe's (arXiv 2403.17031)."""

    lr: float = 3e-6  # peak
    schedule: str = "linear"  # linear | cosine | constant, after the warm-up
    warmup: int = 0  # optimizer steps from 0 to lr
    end_lr: float = 0.0  # where linear and cosine end, as a fraction of lr
    weight_decay: float = 0.0
    adam_b2: float = 0.999
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0  # global norm to clip at; 0: no clip


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


def adamw(config, updates):
    """The optax transformation. Build it once: a new one causes a new compilation."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adam = optax.adamw(
        schedule(config, updates), b2=config.adam_b2, eps=config.adam_eps, weight_decay=config.weight_decay
    )
    return optax.chain(clip, adam)


def update(tx, grads, opt_state, params):
    """One optimizer step: (params, opt_state)."""
    changes, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, changes), opt_state


def accumulate(grad_fn, batch, weights, microbatches):
    """The mean of grad_fn over `microbatches` equal slices of the batch, equal to grad_fn of the whole batch.

    grad_fn(slice) returns a pytree of means over the slice. weights [B] are the rows' weights in these means (their
    numbers of tokens, say). A slice is weighted by its share of the weights, so padding does not bias the mean.
    """
    if microbatches == 1:
        return grad_fn(batch)
    # Rows are dealt out in turn, so every slice is spread evenly over the devices.
    slices = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), (batch, weights))
    shares = jnp.sum(slices[1], axis=1) / jnp.maximum(jnp.sum(weights), 1)

    def add(total, part):
        rows, share = part
        return jax.tree.map(lambda t, x: t + share * x, total, grad_fn(rows)), None

    shapes = jax.eval_shape(grad_fn, jax.tree.map(lambda x: x[0], slices[0]))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zero, (slices[0], shares))[0]


def norm(grads):
    """Global norm of a gradient pytree, before clipping."""
    return optax.tree.norm(grads)
