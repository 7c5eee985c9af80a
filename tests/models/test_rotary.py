import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.models.rotary import angles, frequencies, rotate, scaled


def rows(count, size, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, size))


def test_angles_by_hand():
    # base 100, two planes: 100^0 = 1 and 100^(-1/2) = .1 radians per position
    np.testing.assert_allclose(
        angles(jnp.array([0, 1, 3]), frequencies(2, 100.0)), [[0, 0], [1, 0.1], [3, 0.3]], rtol=1e-6
    )


def test_scaled_frequencies_by_hand():
    # 100 tokens: 8, 4, 2.5, 1 and .5 turns. From 4 on they stay; up to 1 they are 8 times slower; 2.5 is half between.
    turns = np.array([8, 4, 2.5, 1, 0.5])
    slower = scaled(2 * jnp.pi * turns / 100, 8.0, context=100, slow=1.0, fast=4.0) * 100 / (2 * np.pi)
    np.testing.assert_allclose(slower, [8, 4, 2.5 * (1 + 1 / 8) / 2, 1 / 8, 0.5 / 8], rtol=1e-6)


def test_quarter_turns_by_hand():
    # One plane is entries 0 and 2, the other 1 and 3; entry 4 stays. A quarter turn takes (x, y) to (-y, x).
    x_K = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    quarter = np.pi / 2
    np.testing.assert_allclose(rotate(x_K, jnp.array([quarter, 0.0])), [-3, 2, 1, 4, 5], atol=1e-6)
    np.testing.assert_allclose(rotate(x_K, jnp.array([0.0, quarter])), [1, -4, 3, 2, 5], atol=1e-6)


def test_no_angle_changes_nothing():
    x_TK = rows(4, 6)
    np.testing.assert_array_equal(rotate(x_TK, jnp.zeros((4, 2))), x_TK)


@jax.jit
def product(query, key):
    """Of a fixed query and a fixed key at these places."""
    q_K, k_K = rows(2, 6)
    return rotate(q_K, angles(query, frequencies(2, 100.0))) @ rotate(k_K, angles(key, frequencies(2, 100.0)))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_products_depend_on_the_distance_alone(query, key, shift):
    np.testing.assert_allclose(product(query + shift, key + shift), product(query, key), atol=1e-3)


@given(st.integers(0, 2000))
def test_lengths_stay(place):
    x_K = rows(1, 7)[0]
    turned_K = rotate(x_K, angles(jnp.array(place), frequencies(3, 10_000.0)))
    np.testing.assert_allclose(turned_K @ turned_K, x_K @ x_K, rtol=1e-5)
    assert turned_K[6] == x_K[6]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_stays(dtype):
    assert rotate(rows(2, 6).astype(dtype), jnp.ones((2, 2))).dtype == dtype
