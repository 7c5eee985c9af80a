"""Rotary positions (Su et al. 2021, arXiv 2104.09864) as in GPT-NeoX: queries and keys are rotated by their position.

J is the number of planes: half the number of a head's rotated entries.
"""

import jax.numpy as jnp


def angles(positions_T, planes, base):
    """Positions [...] -> angles [..., J] in radians: position * base^(-j / J), float32."""
    frequencies_J = base ** (-jnp.arange(planes, dtype=jnp.float32) / planes)
    return positions_T[..., None] * frequencies_J


def rotate(x_TK, angles_TJ):
    """Rotates the first 2J entries of each row, as points of J planes; the other K - 2J stay, and so does the dtype.

        (x_j, x_{J+j}) -> (x_j cos a_j - x_{J+j} sin a_j, x_{J+j} cos a_j + x_j sin a_j)

    The product of a rotated query and a rotated key depends only on the difference of their positions.
    """
    planes = angles_TJ.shape[-1]
    x_TJ, y_TJ, rest = jnp.split(x_TK, [planes, 2 * planes], axis=-1)
    cos_TJ, sin_TJ = jnp.cos(angles_TJ), jnp.sin(angles_TJ)
    rotated = (x_TJ * cos_TJ - y_TJ * sin_TJ, y_TJ * cos_TJ + x_TJ * sin_TJ)
    return jnp.concatenate([part.astype(x_TK.dtype) for part in (*rotated, rest)], axis=-1)
