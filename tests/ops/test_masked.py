import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import masked

X = jnp.array([1.0, 2, 3, 4, 5])
MASK = jnp.array([1, 1, 0, 0, 1])

sums, means, variances = map(jax.jit, (masked.sum, masked.mean, masked.var))
whiten = jax.jit(masked.whiten, static_argnames="shift_mean")

rows = hnp.arrays(np.float64, (3, 4), elements=st.floats(-100, 100))
masks = hnp.arrays(bool, (3, 4))


def test_by_hand():
    # the mask leaves 1, 2 and 5: mean 8/3, squared distances 25/9, 4/9 and 49/9
    assert masked.sum(X, MASK) == 8
    np.testing.assert_allclose(masked.mean(X, MASK), 8 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked.var(X, MASK), 78 / 27, rtol=1e-6)


def test_along_an_axis_by_hand():
    x_BT = jnp.array([[1.0, 3, 99], [4, 99, 99]])
    mask_BT = jnp.array([[1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(masked.sum(x_BT, mask_BT, axis=1), [4, 4])
    np.testing.assert_allclose(masked.mean(x_BT, mask_BT, axis=1), [2, 4])
    np.testing.assert_allclose(masked.var(x_BT, mask_BT, axis=1), [1, 0])
    np.testing.assert_allclose(masked.mean(x_BT, mask_BT, axis=0), [2.5, 3, 0])


def test_mean_is_over_tokens_and_not_over_rows():
    """invariant 8: global over the batch. The rows' means are 0 and 6; three tokens have mean 2."""
    assert masked.mean(jnp.array([[0.0, 0], [6, 99]]), jnp.array([[1, 1], [1, 0]])) == 2


@pytest.mark.parametrize("dtype", [bool, int, float])
def test_a_mask_may_be_of_any_type(dtype):
    mask = MASK.astype(dtype)
    np.testing.assert_allclose(masked.mean(X, mask), 8 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked.var(X, mask), 78 / 27, rtol=1e-6)
    assert masked.whiten(X, mask)[2] == 0


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, 1e30])
def test_what_the_mask_hides_never_matters(hole):
    """invariant 8"""
    x = jnp.where(MASK, X, hole)
    for function in masked.sum, masked.mean, masked.var, masked.whiten:
        np.testing.assert_array_equal(function(x, MASK), function(X * MASK, MASK))
    np.testing.assert_array_equal(jax.grad(masked.mean)(x, MASK), MASK / 3)


def test_an_empty_mask_gives_zero():
    empty = jnp.zeros(5)
    assert masked.sum(X, empty) == masked.mean(X, empty) == masked.var(X, empty) == 0
    np.testing.assert_array_equal(masked.whiten(X, empty), np.zeros(5))
    np.testing.assert_array_equal(jax.grad(masked.mean)(X, empty), np.zeros(5))


def test_whiten_divides_by_the_biased_variance():
    """invariant 9: [1, 3] has biased variance 1, unbiased 2; the mean is kept only on request."""
    x, mask = jnp.array([1.0, 3, 99]), jnp.array([1, 1, 0])
    np.testing.assert_allclose(masked.whiten(x, mask), [-1, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(masked.whiten(x, mask, shift_mean=False), [1, 3, 0], rtol=1e-6)


def test_whiten_adds_1e8th_to_the_variance():
    """invariant 9: [0, 2e-4] has variance 1e-8, so it is divided by sqrt(2e-8): 1 / sqrt(2) is left."""
    np.testing.assert_allclose(masked.whiten(jnp.array([0, 2e-4]), jnp.ones(2)), [-(0.5**0.5), 0.5**0.5], rtol=1e-5)
    np.testing.assert_array_equal(masked.whiten(jnp.full(3, 7.0), jnp.ones(3)), np.zeros(3))


@given(rows, masks)
def test_whitened_numbers_have_mean_zero_and_variance_one(x, mask):
    """invariant 9"""
    with jax.enable_x64(True):
        white, kept = (np.asarray(whiten(x, mask, shift_mean=shift)) for shift in (True, False))
        if not mask.any():
            return
        true = x[mask]
        assert white.dtype == np.float64
        np.testing.assert_allclose(white[mask].mean(), 0, atol=1e-6)
        np.testing.assert_allclose(white[mask].var(), true.var() / (true.var() + 1e-8), atol=1e-6)
        np.testing.assert_allclose(kept[mask].mean(), true.mean(), atol=1e-6)
        assert not white[~mask].any() and not kept[~mask].any()


@given(rows, masks)
def test_statistics_are_those_of_numbers_with_mask_one(x, mask):
    with jax.enable_x64(True):
        left = x[mask] if mask.any() else np.zeros(1)
        np.testing.assert_allclose(sums(x, mask), left.sum(), atol=1e-9)
        np.testing.assert_allclose(means(x, mask), left.mean(), atol=1e-9)
        np.testing.assert_allclose(variances(x, mask), left.var(), atol=1e-9)


def test_goldens(goldens, float64):
    for case in goldens["masked_stats"]:
        x, mask = jnp.array(case["x"]), jnp.array(case["mask"])
        n = mask.sum()
        np.testing.assert_allclose(masked.mean(x, mask), case["mean"], atol=1e-12)
        np.testing.assert_allclose(masked.var(x, mask) * n / (n - 1), case["var_unbiased"], atol=1e-12)
        if "mean_axis1" in case:
            np.testing.assert_allclose(masked.mean(x, mask, axis=1), case["mean_axis1"], atol=1e-12)
        if "whitened_at_mask" in case:  # theirs divides by the unbiased variance
            theirs = ((masked.var(x, mask) + 1e-8) / (case["var_unbiased"] + 1e-8)) ** 0.5
            white, kept = masked.whiten(x, mask) * theirs, masked.whiten(x, mask, shift_mean=False)
            centre = case["mean"]
            np.testing.assert_allclose(white[mask == 1], case["whitened_at_mask"], atol=1e-12)
            np.testing.assert_allclose(
                (kept[mask == 1] - centre) * theirs + centre, case["whitened_no_shift"], atol=1e-12
            )


# Other means of the tokens of a batch


ROWS = jnp.array([[1.0, 2, 3], [10, 99, 99]])
LENGTHS = jnp.array([[1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("token", 16 / 4), ("sequence", (2 + 10) / 2), ("constant", 16 / (2 * 5))],
)
def test_reductions_by_hand(reduction, expected):
    """Of two rows of 3 tokens and 1 token. constant: a row has 5 tokens, however many columns there are."""
    for wider in (0, 4):
        x_BR, mask_BR = (jnp.pad(x, ((0, 0), (0, wider)), constant_values=c) for x, c in ((ROWS, 7.0), (LENGTHS, 0)))
        weight_B = masked.row_weights(mask_BR, reduction, length=5)
        np.testing.assert_allclose(masked.mean(x_BR, mask_BR, weight_B=weight_B), expected, rtol=1e-6)


def test_a_weight_of_one_changes_no_bit():
    x_BR = jax.random.normal(jax.random.key(0), (2, 3))
    weight_B = masked.row_weights(LENGTHS, "token", length=3)
    assert masked.mean(x_BR, LENGTHS, weight_B=weight_B) == masked.mean(x_BR, LENGTHS)


@pytest.mark.parametrize("value", [0.1, 0.7, -3e7])
def test_equal_entries_are_whitened_to_exactly_nothing(value):
    """In float32 their mean may be a rounding error away, which a division by 1e-4 would make an advantage."""
    mask = jnp.arange(333) % 3 > 0
    x = jnp.where(mask, jnp.float32(value), jnp.nan)
    np.testing.assert_array_equal(masked.whiten(x, mask), jnp.zeros(333))
    assert jnp.isnan(masked.whiten(x.at[1].set(jnp.nan), mask)[1])  # what is not finite is not hidden
