"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are rotated by their position.

J is the number of planes: half the number of a head's rotated entries.
"""

import jax.numpy as jnp


def frequencies(planes, base):
    """The angle per token of each plane [J], in radians: base^(-j / J), float32."""
    return base ** (-jnp.arange(planes, dtype=jnp.float32) / planes)


def scaled(frequencies_J, factor, *, context, slow, fast):
    """Frequencies [J] for sequences up to `factor` times as long as `context` tokens (Llama 3.1, arXiv 2407.21783).

        f_j -> f_j (s_j + (1 - s_j) / factor),   s_j = (context f_j / 2 pi - slow) / (fast - slow), within 0 and 1

    A plane with at most `slow` turns in `context` tokens turns `factor` times slower; one with `fast` or more stays.
    """
    share_J = jnp.clip((context * frequencies_J / (2 * jnp.pi) - slow) / (fast - slow), 0, 1)
    return frequencies_J * (share_J + (1 - share_J) / factor)


def angles(positions_T, frequencies_J):
    """Positions [...] -> angles [..., J] in radians."""
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
