"""Sum, mean, variance and whitening under a mask: the only reductions over tokens in the project.

Masks are bool or 0/1 of x's shape. Entries with mask 0 never affect a result, not even inf or NaN.
An empty mask gives 0, not NaN, so a fully padded row cannot make a batch NaN.
"""

import jax
import jax.numpy as jnp


def sum(x, mask, axis=None):
    """Sum of x where mask is 1."""
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def mean(x, mask, axis=None, *, weight_B=None):
    """Mean of x where mask is 1; 0 where the mask is empty. With weight_B, of weight_B[:, None] * x [B, R]."""
    if weight_B is not None:
        x = weight_B[:, None] * x
    count = jnp.sum(jnp.asarray(mask, x.dtype), axis=axis)
    return sum(x, mask, axis) / jnp.maximum(count, 1)


def var(x, mask, axis=None):
    """Biased variance (divides by the count) of x where mask is 1."""
    centre = mean(x, mask, axis)
    if axis is not None:
        centre = jnp.expand_dims(centre, axis)
    return mean(jnp.square(x - centre), mask, axis)


def whiten(x, mask, *, shift_mean=True):
    """x scaled to variance 1 under the mask, and to mean 0 unless shift_mean is False; 0 outside the mask.

    Divides by sqrt(var + 1e-8) with the biased variance, as OpenAI's 2019 code does
    (arXiv 2403.17031, detail "whitening"). shift_mean=False adds the mean back. Equal entries are 0 apart from it, and
    not a rounding error, which the division would make 10,000 times as large.
    """
    centre = mean(x, mask)
    equal = jnp.max(jnp.where(mask, x, -jnp.inf)) == jnp.min(jnp.where(mask, x, jnp.inf))
    white = jnp.where(equal, 0, x - centre) * jax.lax.rsqrt(var(x, mask) + 1e-8)
    if not shift_mean:
        white = white + centre
    return jnp.where(mask, white, 0)


REDUCTIONS = ("token", "sequence", "constant")


def row_weights(mask_BR, reduction, *, length):
    """Weights [B] with which `mean(x_BR, mask_BR, weight_B=weight_B)` is another mean of the tokens of a batch.

        token      sum x / sum mask                     every token counts the same: a weight of 1
        sequence   mean over rows of each row's mean    every row counts the same
        constant   sum x / (B length)                   a row's weight does not depend on the lengths of the others

    They are computed from the whole batch and applied to its parts: a mean over microbatches, each weighted by its
    tokens, is then that of the batch. `length` > 0 is a number of tokens; only "constant" reads it.
    """
    tokens_B = jnp.sum(jnp.asarray(mask_BR, jnp.float32), axis=1)
    share = jnp.sum(tokens_B) / len(tokens_B)
    if reduction == "sequence":
        return share / jnp.maximum(tokens_B, 1)
    return jnp.ones_like(tokens_B) if reduction == "token" else jnp.full_like(tokens_B, share / length)
