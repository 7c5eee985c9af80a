from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.ops.attention import attend, fused


def oracle(q, k, v, mask):
    """The formula itself."""
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1), v)


@partial(jax.jit, static_argnames="causal")
def attended(q, k, v, mask, grad, causal):
    """attend, and what it makes of a gradient: (out, (dq, dk, dv))."""
    out, back = jax.vjp(lambda *x: attend(*x, mask, causal=causal), q, k, v)
    return out, back(grad)


@jax.jit
def formula(q, k, v, mask, grad):
    """The same of the formula as it stands."""
    out, back = jax.vjp(lambda *x: oracle(*x, mask), q, k, v)
    return out, back(grad)


def inputs(B, H, T, S, K, seed, left=0):
    """q, k, v, a gradient and a mask in float64: a query sees keys up to its own, `left` columns are padding."""
    rng = np.random.default_rng(seed)
    q, grad = (rng.normal(size=(B, H, T, K)) for _ in range(2))
    k, v = (rng.normal(size=(B, H, S, K)) for _ in range(2))
    mask = np.tril(np.ones((T, S), bool), S - T) & (np.arange(S) >= left) & np.ones((B, T, S), bool)
    return q, k, v, grad, mask


def test_by_hand():
    # K = 1. Query ln 2: scores 0, ln 2 -> weights 1/3, 2/3. Query ln 3: 0, ln 3, 0 -> 1/5, 3/5, 1/5
    q, k = jnp.log(jnp.array([2.0, 3])), jnp.array([0.0, 1, 0])
    mask = jnp.array([[[1, 1, 0], [1, 1, 1]]], bool)
    out = attend(q.reshape(1, 1, 2, 1), k.reshape(1, 1, 3, 1), jnp.array([3.0, 6, 12]).reshape(1, 1, 3, 1), mask)
    np.testing.assert_allclose(out.ravel(), [5, 6.6], rtol=1e-6)


def test_the_scale_is_of_the_head_size():
    # K = 4: scores 4 ln 2 / 2 = ln 4 and 0 -> weights 4/5, 1/5
    q, k = jnp.full((1, 1, 1, 4), jnp.log(2.0)), jnp.array([[1.0] * 4, [0.0] * 4])[None, None]
    out = attend(q, k, jnp.array([[5.0], [10]])[None, None], jnp.ones((1, 1, 2), bool))
    np.testing.assert_allclose(out.ravel(), [6], rtol=1e-6)


@pytest.mark.parametrize(("T", "causal"), [(3, False), (97, True)])
def test_a_group_of_queries_reads_one_head_of_keys_and_values(T, causal):
    """As if each were repeated for the queries of its group, whose gradients add up."""
    q, k, v, grad, mask = inputs(2, 6, T, T, 4, seed=1, left=1)
    k, v, real = k[:, :2], v[:, :2], mask.any(-1)[:, None, :, None]  # the result of a padding query is arbitrary
    out, (dq, dk, dv) = attended(q, k, v, mask, grad * real, causal)
    repeated = (np.repeat(x, 3, axis=1) for x in (k, v))
    expected, (expected_dq, *each) = formula(q, *repeated, mask, grad * real)
    expected_dk, expected_dv = (x.reshape(2, 2, 3, T, 4).sum(axis=2) for x in each)
    pairs = ((out * real, expected * real), (dq, expected_dq), (dk, expected_dk), (dv, expected_dv))
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 65, 97, 130])
@given(st.integers(0, 3), st.integers(0, 99))
@settings(max_examples=5)
def test_it_is_the_formula_and_so_are_its_gradients(T, left, seed):
    """In float64, and in float32 against it; sizes about those where blocks of queries begin."""
    with jax.enable_x64(True):
        q, k, v, grad, mask = inputs(2, 3, T, T, 5, seed, left=min(left, T - 1))
        real = mask.any(-1)[:, None, :, None]
        expected, their_gradients = formula(q, k, v, mask, grad * real)
        for dtype, atol in (np.float32, 2e-5), (np.float64, 1e-12):
            ours = [x.astype(dtype) for x in (q, k, v, grad * real)]
            for causal in False, True:
                out, gradients = attended(*ours[:3], mask, ours[3], causal=causal)
                assert out.dtype == dtype
                np.testing.assert_allclose(out * real, expected * real, rtol=0, atol=atol)
                for our, their in zip(gradients, their_gradients, strict=True):
                    np.testing.assert_allclose(our, their, rtol=0, atol=atol * 20)


def test_queries_may_be_fewer_than_keys():
    """As with a cache, or where only the last tokens are selected."""
    with jax.enable_x64(True):
        q, k, v, _, mask = inputs(2, 2, 3, 40, 4, seed=0, left=7)
        np.testing.assert_allclose(attend(q, k, v, mask), oracle(q, k, v, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing_is_finite_and_has_no_gradient(causal):
    q, k, v, grad, mask = inputs(1, 1, 40, 40, 4, seed=1, left=5)
    grad[:, :, :5] = 0  # nobody reads what such a query gets
    q, k, v, grad = (jnp.float32(x) for x in (q, k, v, grad))
    out, gradients = attended(q, k, v, mask, grad, causal=causal)
    assert np.isfinite(out).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not np.any(gradient[:, :, :5])


def test_the_weights_are_not_kept_for_the_backward_pass():
    """Memory grows as T, not T x T, between the two passes."""
    q, k, v, _, mask = inputs(1, 1, 300, 300, 4, seed=0)
    _, back = jax.vjp(lambda *x: attend(*x, mask, causal=True), *(jnp.float32(x) for x in (q, k, v)))
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.dtype != bool]
    assert kept and all(leaf.size <= 300 * 4 for leaf in kept)


def test_half_precision_keeps_its_softmax_in_float32():
    # Scores 0 and 9: bfloat16 sums 1 + 256 times e^-9 to 1; in float32 the weights of 256 equal keys count
    k = jnp.concatenate([jnp.full((1, 1, 1, 1), 9.0), jnp.zeros((1, 1, 256, 1))], axis=2).astype(jnp.bfloat16)
    v = jnp.concatenate([jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 256, 1))], axis=2).astype(jnp.bfloat16)
    out = attend(jnp.ones((1, 1, 1, 1), jnp.bfloat16), k, v, jnp.ones((1, 1, 257), bool))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32).item(), 256 / (256 + np.exp(9)), rtol=0.01)


@pytest.mark.parametrize(("T", "S"), [(6, 6), (7, 7), (1, 7), (3, 8)])
def test_cudnn_computes_the_same(T, S, monkeypatch):
    """cuDNN is not available here: JAX's own attention replaces it, under cuDNN's conditions."""
    other = jax.nn.dot_product_attention

    def replacement(q_BTHK, k_BSHK, v_BSHK, *, mask, implementation):
        assert implementation == "cudnn"
        assert q_BTHK.shape[1] % 2 == k_BSHK.shape[1] % 2 == 0  # cuDNN has no gradients for odd lengths under a mask
        return other(q_BTHK, k_BSHK, v_BSHK, mask=mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", replacement)
    q, k, v, grad, mask = inputs(2, 3, T, S, 5, seed=0, left=2)
    real = mask.any(-1)[:, None, :, None]
    grad *= real
    arrays = [jnp.float32(x) for x in (q, k, v, grad)]

    @jax.jit
    def kernel(q, k, v, grad):
        out, back = jax.vjp(lambda *x: fused(*x, mask), q, k, v)
        return out, back(grad)

    out, gradients = kernel(*arrays)
    expected, their_gradients = formula(*arrays[:3], mask, arrays[3])
    np.testing.assert_allclose(out * real, expected * real, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
