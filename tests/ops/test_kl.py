from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import kl

HALF, QUARTER = np.log(0.5), np.log(0.25)
exact_kl, k1, k2, k3 = map(jax.jit, (kl.exact, kl.k1, kl.k2, kl.k3))
rows = hnp.arrays(np.float32, (2, 6), elements=st.floats(-30, 30, width=32))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_estimators_by_hand():
    # p = 1/2, q = 1/4: log(p/q) = log 2, q/p = 1/2
    p, q = jnp.float32(HALF), jnp.float32(QUARTER)
    np.testing.assert_allclose(kl.k1(p, q), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(kl.k2(p, q), np.log(2) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(kl.k3(p, q), 0.5 - 1 + np.log(2), rtol=1e-6)
    # the other way round: log(p/q) = -log 2, q/p = 2
    np.testing.assert_allclose(kl.k1(q, p), -np.log(2), rtol=1e-6)
    np.testing.assert_allclose(kl.k3(q, p), 2 - 1 - np.log(2), rtol=1e-6)


def test_k3_does_not_round_small_differences_away():
    """invariant 5: to second order k3 is difference^2 / 2; exp(x) - 1 in float32 would give 0 or 6e-8."""
    np.testing.assert_allclose(kl.k3(jnp.float32(2e-4), jnp.float32(0)), 2e-8, rtol=1e-3)


def test_exact_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): (log 2 + log(2/3)) / 2. Backwards: log(1/2)/4 + 3 log(3/2)/4
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(kl.exact(p, q), np.log(4 / 3) / 2, rtol=1e-6)
    np.testing.assert_allclose(kl.exact(q, p), (np.log(0.5) + 3 * np.log(1.5)) / 4, rtol=1e-6)


def test_exact_is_at_the_temperature():
    """invariant 3: at temperature 1/2 weights are squared, (1, 2) against (1, 1) is (.2, .8) against (.5, .5)."""
    p, q = jnp.log(jnp.array([1.0, 2])), jnp.zeros(2)
    expected = 0.2 * np.log(0.4) + 0.8 * np.log(1.6)
    np.testing.assert_allclose(kl.exact(p, q, temperature=0.5), expected, rtol=1e-6)


@given(rows)
def test_exact_and_estimators(logits):
    """invariant 15: the exact KL is not negative, and is the mean of k1 and of k3 over tokens sampled from p."""
    p, q = log_softmax(logits)
    expected = np.sum(np.exp(p) * (p - q))
    exact = exact_kl(*logits)
    assert exact >= 0
    np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(exact_kl(*logits.astype(np.float64)), expected, rtol=1e-9, atol=1e-12)
        for estimate in k1, k3:
            np.testing.assert_allclose(np.sum(np.exp(p) * estimate(p, q)), expected, rtol=1e-9, atol=1e-9)
        assert (np.asarray(k2(p, q)) >= 0).all() and (np.asarray(k3(p, q)) >= 0).all()


@given(rows, st.floats(0.1, 3))
def test_equal_models_have_no_kl(logits, temperature):
    """invariant 5: not rounding errors either."""
    np.testing.assert_array_equal(exact_kl(logits, logits, temperature=temperature), [0, 0])
    np.testing.assert_array_equal(k1(logits, logits), np.zeros((2, 6)))
    np.testing.assert_array_equal(k3(logits, logits), np.zeros((2, 6)))


@given(rows, hnp.arrays(np.float32, (2, 6), elements=st.floats(-1, 1, width=32)))
def test_nearly_equal_models_have_nearly_no_kl(logits, change):
    """invariants 5 and 15: KL is of second order in the change, and not negative."""
    kl_T = np.asarray(exact_kl(np.float32(logits + np.float32(1e-5) * change), logits))
    assert (kl_T >= 0).all() and (kl_T <= 1e-9).all()


def test_one_number_per_token():
    assert kl.exact(jnp.zeros((2, 3, 5)), jnp.ones((2, 3, 5))).shape == (2, 3)


def test_the_kl_controller_by_hand():
    """arXiv 1909.08593: at target 6 and horizon 1000, a batch of 100 at 6.6 nats is 10% over, so up by .1 * .1."""
    adapt = partial(kl.adapt, jnp.float32(0.2), target=6.0, horizon=1000, episodes=100)
    np.testing.assert_allclose(adapt(6.6), 0.2 * (1 + 0.1 * 0.1), rtol=1e-5)
    np.testing.assert_allclose(adapt(6.0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(adapt(60.0), 0.2 * (1 + 0.2 * 0.1), rtol=1e-6)  # at most 20% over
    np.testing.assert_allclose(adapt(-5.0), 0.2 * (1 - 0.2 * 0.1), rtol=1e-6)
    assert kl.adapt(0.2, 60.0, target=0.0, horizon=1000, episodes=100) == 0.2  # without a target it is fixed


@given(st.floats(0.125, 1, width=32), st.floats(0, 12, width=32), st.integers(1, 64), st.integers(1, 64))
def test_no_step_of_the_kl_controller_makes_the_coefficient_negative(kl_coef, sequence_kl, horizon, episodes):
    """invariant 15, for any horizon; with horizon > .2 episodes the maximum of the formula changes no bit."""
    coefficient = jnp.float32(kl_coef)
    moved = kl.adapt(coefficient, jnp.float32(sequence_kl), target=6.0, horizon=horizon, episodes=episodes)
    assert moved >= 0
    error = jnp.clip(jnp.float32(sequence_kl) / 6.0 - 1, -0.2, 0.2)
    if horizon > 0.21 * episodes:
        assert moved == coefficient * (1 + error * episodes / horizon)


def test_a_horizon_that_is_too_short_ends_at_zero():
    """error -.2 and 100 episodes at horizon 10: 1 - 2 = -1."""
    assert kl.adapt(jnp.float32(0.5), jnp.float32(0.0), target=6.0, horizon=10, episodes=100) == 0


def test_gradients_of_the_estimators_by_enumeration(float64):
    """Over all tokens that a policy may sample: k1 as a loss teaches nothing, k2 is KL(p || q), k3 is KL(q || p)."""
    logits, logits_ref = jnp.array([0.3, -0.2, 0.5]), jnp.array([0, 0.4, -0.3])
    logq, p = jax.nn.log_softmax(logits_ref), jax.nn.softmax(logits)

    def loss(estimate, logits):
        return p @ estimate(jax.nn.log_softmax(logits), logq)  # sampled from p, which stays as it is

    def backward(logits):
        return kl.exact(logits_ref, logits)

    slopes = {name: jax.grad(partial(loss, getattr(kl, name)))(logits) for name in ("k1", "k2", "k3")}
    np.testing.assert_allclose(slopes["k1"], 0, atol=1e-15)
    np.testing.assert_allclose(slopes["k2"], jax.grad(lambda x: kl.exact(x, logits_ref))(logits), atol=1e-12)
    np.testing.assert_allclose(slopes["k3"], jax.grad(backward)(logits), atol=1e-12)
    np.testing.assert_allclose(kl.exact(logits, logits_ref), 0.156677, atol=5e-7)
    np.testing.assert_allclose(slopes["k2"], [-0.0081, -0.1979, 0.2061], atol=6e-5)
    np.testing.assert_allclose(slopes["k3"], [0.0443, -0.2470, 0.2027], atol=6e-5)
