"""Prompts are left-padded to one width; a slice of short prompts can be read at a smaller width."""

import jax
import jax.numpy as jnp


def alike(prompt_mask_BP, slices):
    """Order [B] of the rows: dealt out in turn to `slices` slices, they give each slice prompts of similar length."""
    return jnp.argsort(jnp.sum(prompt_mask_BP, axis=1)).reshape(slices, -1).T.reshape(-1)


def cut(function, prompt_BP, prompt_mask_BP, widths):
    """function(prompt [B, W], mask [B, W]) without left padding that all the prompts share.

    W is the least of P / widths, 2 P / widths, ..., P (rounded up) that holds the longest prompt. The function is
    compiled for each of these widths, and its results must have the same shapes at all of them.
    """
    if widths == 1:
        return function(prompt_BP, prompt_mask_BP)
    P = prompt_BP.shape[1]
    sizes = [-(-P * part // widths) for part in range(1, widths + 1)]
    choice = jnp.searchsorted(jnp.array(sizes), jnp.max(jnp.sum(prompt_mask_BP, axis=1)))
    branches = [lambda prompt, mask, W=W: function(prompt[:, P - W :], mask[:, P - W :]) for W in sizes]
    return jax.lax.switch(choice, branches, prompt_BP, prompt_mask_BP)
