"""Rotary positions (Su et al. 2021, arXiv 2104.09864) as GPT-NeoX has them: queries and keys are turned by their place.

J is the number of planes turned: half of the entries of a head that are turned at all.
"""

import jax.numpy as jnp


def angles(positions_T, planes, base):
    """Positions [...] -> angles [..., J] in radians: position * base^(-j / J), float32."""
    frequencies_J = base ** (-jnp.arange(planes, dtype=jnp.float32) / planes)
    return positions_T[..., None] * frequencies_J


def rotate(x_TK, angles_TJ):
    """Turns the first 2J entries of each row, as points of J planes; the other K - 2J stay. The type stays too.

        (x_j, x_{J+j}) -> (x_j cos a_j - x_{J+j} sin a_j, x_{J+j} cos a_j + x_j sin a_j)

    Of a query and a key that were turned, the product depends on the difference of their positions alone.
    """
    planes = angles_TJ.shape[-1]
    x_TJ, y_TJ, rest = jnp.split(x_TK, [planes, 2 * planes], axis=-1)
    cos_TJ, sin_TJ = jnp.cos(angles_TJ), jnp.sin(angles_TJ)
    turned = (x_TJ * cos_TJ - y_TJ * sin_TJ, y_TJ * cos_TJ + x_TJ * sin_TJ)
    return jnp.concatenate([part.astype(x_TK.dtype) for part in (*turned, rest)], axis=-1)
