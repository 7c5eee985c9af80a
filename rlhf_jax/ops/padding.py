"""Prompts are padded on the left to one width; slices of like prompts need not be read as wide as the longest is."""

import jax
import jax.numpy as jnp


def alike(prompt_mask_BP, slices):
    """An order [B] of rows that, dealt out in turn to so many slices, gives each slice prompts of like lengths."""
    return jnp.argsort(jnp.sum(prompt_mask_BP, axis=1)).reshape(slices, -1).T.reshape(-1)


def cut(function, prompt_BP, prompt_mask_BP, widths):
    """function(prompt [B, W], mask [B, W]) with padding cut off on the left that all the prompts have.

    W is the least of P / widths, 2 P / widths, ..., P (rounded up) that holds the longest: for each of them the
    function is compiled, with results of the same shapes.
    """
    if widths == 1:
        return function(prompt_BP, prompt_mask_BP)
    P = prompt_BP.shape[1]
    sizes = [-(-P * part // widths) for part in range(1, widths + 1)]
    choice = jnp.searchsorted(jnp.array(sizes), jnp.max(jnp.sum(prompt_mask_BP, axis=1)))
    branches = [lambda prompt, mask, W=W: function(prompt[:, P - W :], mask[:, P - W :]) for W in sizes]
    return jax.lax.switch(choice, branches, prompt_BP, prompt_mask_BP)
