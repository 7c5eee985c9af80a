import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import logprobs, sampling

rows = hnp.arrays(np.float32, 7, elements=st.floats(-8, 8, width=32))


def kept(logits_V):
    return set(np.flatnonzero(np.isfinite(logits_V)).tolist())


def test_top_k_by_hand():
    logits_V = jnp.array([1.0, 3, 2, 0])
    np.testing.assert_array_equal(sampling.top_k(logits_V, 2), [-np.inf, 3, 2, -np.inf])
    for everything in 0, 4, 9:
        np.testing.assert_array_equal(sampling.top_k(logits_V, everything), logits_V)


def test_top_k_keeps_ties():
    assert kept(sampling.top_k(jnp.array([2.0, 1, 2, 2]), 2)) == {0, 2, 3}


# The probabilities are 1/8, 1/2, 1/8, 1/4
@pytest.mark.parametrize("p, expected", [(1e-6, {1}), (0.5, {1}), (0.51, {1, 3}), (0.75, {1, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_by_hand(p, expected):
    assert kept(sampling.top_p(jnp.log(jnp.array([1.0, 4, 1, 2])), p)) == expected


@given(rows, st.sampled_from([0.1, 0.5, 0.9, 0.99]))
def test_top_p_keeps_the_fewest_that_reach_p(logits_V, p):
    probs = np.exp(logits_V.astype(np.float64))
    probs /= probs.sum()
    keep = sorted(kept(sampling.top_p(jnp.asarray(logits_V), p)), key=lambda v: probs[v])
    assert probs[keep].sum() >= p - 1e-6
    assert probs[keep[1:]].sum() < p + 1e-6
    assert probs[keep].min() >= np.delete(probs, keep).max(initial=0)


keep = jax.jit(sampling.keep)


@given(rows, st.sampled_from([0, 1, 3, 7, 9]), st.sampled_from([1e-6, 0.5, 0.9, 1.0]))
def test_one_program_keeps_what_top_k_and_top_p_keep(logits_V, k, p):
    expected_V = sampling.top_p(sampling.top_k(jnp.asarray(logits_V), k), p)
    np.testing.assert_array_equal(keep(logits_V, k, p), expected_V)


def test_temperature_zero_takes_the_most_likely():
    logits_V = jnp.log(jnp.array([1.0, 5, 2]))
    token, logp = sampling.draw(jax.random.key(0), logits_V, temperature=0)
    assert token == 1 and token.dtype == jnp.int32
    np.testing.assert_allclose(logp, np.log(5 / 8), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_have_the_frequencies_of_the_softmax(temperature):
    """invariant 3: of logits / temperature, over all tokens."""
    weights = np.array([1.0, 4, 9, 2])
    expected = weights ** (1 / temperature) / np.sum(weights ** (1 / temperature))
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda key: sampling.draw(key, jnp.log(weights), temperature=temperature)))
    tokens, logp = draw(keys)
    # the standard error of a frequency is at most .5 / sqrt(20,000) = .0035
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, expected, atol=0.014)
    np.testing.assert_allclose(logp, np.log(expected)[tokens], rtol=1e-5)


@given(rows, st.integers(0, 100), st.sampled_from([0.3, 0.7, 1.0, 2.0]))
def test_the_log_prob_of_a_sample_is_the_learners(logits_V, seed, temperature):
    """invariants 3 and 4: bit for bit, from the same logits."""
    token, logp = sampling.draw(jax.random.key(seed), jnp.asarray(logits_V), temperature=temperature)
    assert 0 <= token < 7 and token.dtype == jnp.int32
    assert logp == logprobs.gather(jnp.asarray(logits_V), token, temperature=temperature)


def test_top_k_and_top_p_renormalise():
    """Training may not use them, because the log-prob is not the one that the learner computes."""
    logits_V = jnp.log(jnp.array([1.0, 3, 4]))
    keys = jax.random.split(jax.random.key(0), 100)
    for options in {"k": 2}, {"p": 0.6}:
        tokens, logp = jax.vmap(lambda key, options=options: sampling.draw(key, logits_V, **options))(keys)
        assert set(tokens.tolist()) == {1, 2}
        np.testing.assert_allclose(logp, np.log(np.array([1, 3 / 7, 4 / 7]))[tokens], rtol=1e-6)


def test_temperature_comes_before_top_p_and_top_k_before_both():
    # weights 1, 2, 4 at temperature 1/2: 1, 4, 16. The largest has 16/21 of all and 16/20 of the two largest
    logits_V = jnp.log(jnp.array([1.0, 2, 4]))
    keys = jax.random.split(jax.random.key(0), 200)

    def drawn(**options):
        return set(jax.vmap(lambda key: sampling.draw(key, logits_V, **options)[0])(keys).tolist())

    assert drawn(p=0.6) == {1, 2}
    assert drawn(temperature=0.5, p=0.7) == {2}
    assert drawn(temperature=0.5, p=0.78) == {1, 2}
    assert drawn(temperature=0.5, p=0.78, k=2) == {2}


def test_another_key_samples_another_token():
    """invariant 11"""
    keys = jax.random.split(jax.random.key(0), 50)
    tokens = [int(sampling.draw(key, jnp.zeros(1000))[0]) for key in keys[:5]]
    assert len(set(tokens)) == 5
    assert tokens[0] == sampling.draw(keys[0], jnp.zeros(1000))[0]
