import ast
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import rlhf_jax
from rlhf_jax.ops import logprobs

gather, entropy = (jax.jit(function, static_argnames="temperature") for function in (logprobs.gather, logprobs.entropy))
logits = hnp.arrays(np.float32, (3, 5), elements=st.floats(-60, 60, width=32))
temperatures = st.sampled_from([0.01, 0.7, 1.0, 3.0])


def oracle(logits_TV, temperature):
    """log softmax in float64."""
    scaled = np.asarray(logits_TV, np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def test_before_by_hand():
    """invariant 2: with two prompt tokens and two response tokens, positions 1 and 2 predict the response."""
    np.testing.assert_array_equal(logprobs.before(jnp.array([[10, 11, 12, 13]]), 2), [[11, 12]])


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("axes", [(), (3,)])
def test_before_is_one_position_before_the_last_tokens(count, axes):
    """invariant 2"""
    x_BT = np.arange(2 * 5 * 3).reshape(2, 5, 3)[(...,) if axes else (..., 0)]
    expected = np.stack([x_BT[:, 5 - count + i - 1] for i in range(count)], axis=1)
    np.testing.assert_array_equal(logprobs.before(jnp.asarray(x_BT), count), expected)


def ends_at_minus_one(node):
    """x[:, :-1] and the like; not x.shape[:-1]."""
    if not isinstance(node, ast.Subscript) or ast.unparse(node.value).endswith("shape"):
        return False
    return any(isinstance(x, ast.Slice) and x.upper and ast.unparse(x.upper) == "-1" for x in ast.walk(node.slice))


def test_nothing_else_shifts_by_one():
    """invariant 2: a slice of an array that ends at -1 is a shift by one, and `before` has the only one."""
    package = Path(rlhf_jax.__file__).parent
    shifts = [
        f"{path.relative_to(package).as_posix()}: {ast.unparse(node)}"
        for folder in (".", "ops", "models", "algorithms")
        for path in sorted((package / folder).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if ends_at_minus_one(node)
    ]
    assert shifts == ["ops/logprobs.py: x_BT[:, -count - 1:-1]"]


def test_gather_by_hand():
    # weights 1, 2, 5: probabilities 1/8, 2/8, 5/8
    logits_TV = jnp.log(jnp.array([[1.0, 2, 5], [5, 2, 1]]))
    np.testing.assert_allclose(logprobs.gather(logits_TV, jnp.array([2, 1])), np.log([5 / 8, 2 / 8]), rtol=1e-6)


def test_temperature_divides_the_logits():
    """invariant 3: at temperature 1/2 the weights 1 and 2 are squared, 1/5 and 4/5."""
    logits_TV = jnp.log(jnp.array([[1.0, 2], [1, 2]]))
    logp_T = logprobs.gather(logits_TV, jnp.array([0, 1]), temperature=0.5)
    np.testing.assert_allclose(logp_T, np.log([0.2, 0.8]), rtol=1e-6)
    nats = -(0.2 * np.log(0.2) + 0.8 * np.log(0.8))
    np.testing.assert_allclose(logprobs.entropy(logits_TV, temperature=0.5), [nats, nats], rtol=1e-6)


@given(logits, hnp.arrays(np.int32, 3, elements=st.integers(0, 4)), temperatures)
def test_gather_is_log_softmax(logits_TV, targets_T, temperature):
    expected = oracle(logits_TV, temperature)[np.arange(3), targets_T]
    logp_T = gather(logits_TV, targets_T, temperature=temperature)
    np.testing.assert_allclose(logp_T, expected, rtol=1e-6, atol=2e-7 * 60 / temperature)
    with jax.enable_x64(True):
        logp_T = gather(logits_TV.astype(np.float64), targets_T, temperature=temperature)
        np.testing.assert_allclose(logp_T, expected, rtol=1e-12, atol=1e-11)


@given(logits, temperatures)
def test_entropy_is_never_negative(logits_TV, temperature):
    """invariant 15"""
    logp_TV = oracle(logits_TV, temperature)
    entropy_T = np.asarray(entropy(logits_TV, temperature=temperature))
    assert (entropy_T >= 0).all()
    np.testing.assert_allclose(entropy_T, -(np.exp(logp_TV) * logp_TV).sum(-1), atol=1e-6 * 60 / temperature)


def test_entropy_by_hand():
    """invariant 15: log V where all are equally likely, 0 where one is certain."""
    logits_TV = jnp.array([[3.0, 3, 3, 3], [900, 0, 0, 0]])
    np.testing.assert_allclose(logprobs.entropy(logits_TV), [np.log(4), 0], rtol=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    logits_TV = jnp.array([[1.0, 2, 3]], jnp.bfloat16)
    for x in logprobs.gather(logits_TV, jnp.array([1])), logprobs.entropy(logits_TV), logprobs.scale(logits_TV, 0.7):
        assert x.dtype == jnp.float32
    np.testing.assert_allclose(logprobs.gather(logits_TV, jnp.array([1])), oracle([[1, 2, 3]], 1)[:, 1], rtol=1e-6)


def test_leading_axes():
    logits_BTV = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets_BT = jnp.array([[0, 1, 2], [4, 3, 2]])
    one_by_one = jax.vmap(logprobs.gather)(logits_BTV, targets_BT)
    np.testing.assert_array_equal(logprobs.gather(logits_BTV, targets_BT), one_by_one)


def project(embedding_VD, hidden, targets):
    logits = jnp.einsum("...d,vd->...v", hidden, embedding_VD)
    return {"logp": logprobs.gather(logits, targets), "entropy": logprobs.entropy(logits)}


@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 7, 100])  # of 6 tokens: several chunks up to 5, then one
def test_chunks_change_nothing(chunk):
    """Values and gradients are those of all tokens at once, whether or not the chunks fill up."""
    embedding_VD = jax.random.normal(jax.random.key(0), (11, 3))
    hidden_BTD = jax.random.normal(jax.random.key(1), (2, 3, 3))
    targets_BT = jnp.array([[0, 10, 2], [4, 3, 2]])

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(chunk, embedding_VD, hidden_BTD):
        def loss(embedding_VD, hidden_BTD):
            out = logprobs.chunked(partial(project, embedding_VD), hidden_BTD, targets_BT, chunk=chunk)
            weights_BT = jnp.arange(6.0).reshape(2, 3)
            return jnp.sum(out["logp"] * weights_BT) + jnp.sum(out["entropy"] ** 2), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(embedding_VD, hidden_BTD)

    expected = jax.tree.leaves(value_and_gradient(6, embedding_VD, hidden_BTD))
    actual = jax.tree.leaves(value_and_gradient(chunk, embedding_VD, hidden_BTD))
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_chunks_keep_no_array_of_all_tokens_by_the_vocabulary():
    """Neither forward nor backward: the largest array with the vocabulary in it has `chunk` tokens."""
    V, D, chunk = 97, 3, 4
    hidden_BTD, targets_BT = jnp.zeros((5, 4, D)), jnp.zeros((5, 4), int)

    def loss(embedding_VD, hidden_BTD):
        return jnp.sum(logprobs.chunked(partial(project, embedding_VD), hidden_BTD, targets_BT, chunk=chunk)["logp"])

    program = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.zeros((V, D)), hidden_BTD)
    for text in program.as_text(), program.compile().as_text():
        shapes = [[int(n) for n in re.split("[x,]", dims)] for dims in re.findall(r"[<\[](\d+(?:[x,]\d+)*)", text)]
        tokens = [np.prod(shape) // V for shape in shapes if V in shape]
        assert max(tokens) == chunk
