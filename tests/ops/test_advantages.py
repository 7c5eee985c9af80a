import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import advantages
from tests.support import assert_close, f32

R = 6
reals = hnp.arrays(np.float64, R, elements=st.floats(-10, 10))
prefixes = st.integers(0, R).map(lambda length: np.arange(R) < length)
patterns = hnp.arrays(bool, R)
# jitted: a bare scan compiles at every call
shape_rewards, discounted_returns, gae = map(
    jax.jit, (advantages.shape_rewards, advantages.discounted_returns, advantages.gae)
)
group = jax.jit(advantages.group, static_argnames=("baseline", "scale"))
rates = st.sampled_from([0.0, 0.3, 0.95, 1.0])


def test_shaped_rewards_by_hand():
    """invariant 6: -1/2 of each token's KL, and the score on the last token: not one past it, not at the end of R."""
    rewards_R = shape_rewards(10.0, f32(1, -2, 4, 99, 99), f32(1, 1, 1, 0, 0), kl_coef=0.5)
    assert_close(rewards_R, [-0.5, 1, 8, 0, 0])


def test_score_on_the_first_and_on_the_last_position():
    """invariant 6"""
    assert_close(shape_rewards(10.0, f32(1, 99, 99), f32(1, 0, 0), kl_coef=1), [9, 0, 0])
    assert_close(shape_rewards(10.0, f32(1, 1, 1), f32(1, 1, 1), kl_coef=1), [-1, -1, 9])
    assert_close(shape_rewards(10.0, f32(9, 9, 9), f32(0, 0, 0), kl_coef=1), [0, 0, 0])


@pytest.mark.parametrize("mask_type", [bool, int, float])
def test_rewards_are_real_numbers(mask_type):
    """invariant 6: a score of 2.5 stays 2.5, whatever type the mask and ids around it have."""
    rewards_R = shape_rewards(f32(2.5)[0], f32(0, 0), jnp.ones(2, mask_type), kl_coef=0.1)
    assert rewards_R.dtype == jnp.float32
    assert_close(rewards_R, [0, 2.5])


@given(st.floats(-10, 10), reals, prefixes, st.floats(0, 1))
def test_rewards_sum_to_the_score_less_the_kl(score, kl_R, mask_R, kl_coef):
    """invariant 6"""
    with jax.enable_x64(True):
        rewards_R = np.asarray(shape_rewards(score, kl_R, mask_R, kl_coef=kl_coef))
        assert_close(rewards_R.sum(), (score if mask_R.any() else 0) - kl_coef * kl_R[mask_R].sum())
        assert not rewards_R[~mask_R].any()


def test_discounted_returns_by_hand():
    # G_2 = 4, G_1 = 2 + 4/2, G_0 = 1 + 4/2; the 9s are after the end
    assert_close(discounted_returns(f32(1, 2, 4, 9, 9), f32(1, 1, 1, 0, 0), gamma=0.5), [3, 4, 4, 0, 0])
    assert_close(discounted_returns(f32(1, 2, 4, 9, 9), f32(1, 1, 1, 0, 0), gamma=1), [7, 6, 4, 0, 0])


@given(reals, patterns, rates)
def test_discounted_returns_are_sums(rewards_R, mask_R, gamma):
    left = rewards_R[mask_R]
    expected = np.zeros(R)
    expected[mask_R] = [sum(gamma**i * r for i, r in enumerate(left[t:])) for t in range(len(left))]
    with jax.enable_x64(True):
        assert_close(discounted_returns(rewards_R, mask_R, gamma=gamma), expected, atol=1e-9)


def test_gae_by_hand():
    # gamma .5, lam .5: delta = [1 + .5*2 - 1, 0 + .5*0 - 2] = [1, -2]; A_1 = -2, A_0 = 1 + .25 * -2 = .5
    advantages_R, returns_R = gae(f32(1, 0, 9), f32(1, 2, 9), f32(1, 1, 0), gamma=0.5, lam=0.5)
    assert_close(advantages_R, [0.5, -2, 0])
    assert_close(returns_R, [1.5, 0, 0])


def test_gae_skips_a_gap_by_hand():
    # the same two tokens with one between them that the policy did not write
    mask_R = f32(1, 0, 1, 0)
    advantages_R, returns_R = gae(f32(1, 7, 0, 9), f32(1, 999, 2, 9), mask_R, gamma=0.5, lam=0.5)
    assert_close(advantages_R, [0.5, 0, -2, 0])
    assert_close(returns_R, [1.5, 0, 0, 0])


@given(reals, reals, patterns, rates, rates)
def test_gae_is_the_sum_of_discounted_td_errors(rewards_R, values_R, mask_R, gamma, lam):
    """Eq. 16 written as the paper does, A_t = sum over l of (gamma lam)^l delta_{t+l}, over tokens with mask 1."""
    r, v = rewards_R[mask_R], values_R[mask_R]
    delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0) - v[t] for t in range(len(r))]
    expected = np.zeros(R)
    expected[mask_R] = [sum((gamma * lam) ** i * d for i, d in enumerate(delta[t:])) for t in range(len(r))]
    with jax.enable_x64(True):
        advantages_R, returns_R = gae(rewards_R, values_R, mask_R, gamma=gamma, lam=lam)
        assert advantages_R.dtype == returns_R.dtype == np.float64
        assert_close(advantages_R, expected, atol=1e-9)
        assert_close(returns_R, np.where(mask_R, expected + values_R, 0), atol=1e-9)


@given(reals, reals, prefixes, rates)
def test_gae_with_lambda_one_is_return_minus_value(rewards_R, values_R, mask_R, gamma):
    """invariant 16"""
    with jax.enable_x64(True):
        advantages_R, returns_R = gae(rewards_R, values_R, mask_R, gamma=gamma, lam=1)
        later_R = discounted_returns(rewards_R, mask_R, gamma=gamma)
        assert_close(advantages_R, np.where(mask_R, later_R - values_R, 0), atol=1e-9)
        assert_close(returns_R, later_R, atol=1e-9)


@given(reals, reals, prefixes, rates)
def test_gae_with_lambda_zero_is_the_td_error(rewards_R, values_R, mask_R, gamma):
    """invariant 16: r_t + gamma V_{t+1} - V_t, with V = 0 after the end."""
    with jax.enable_x64(True):
        advantages_R, _ = gae(rewards_R, values_R, mask_R, gamma=gamma, lam=0)
        next_R = np.append(np.where(mask_R, values_R, 0)[1:], 0)
        assert_close(advantages_R, np.where(mask_R, rewards_R + gamma * next_R - values_R, 0), atol=1e-9)


@pytest.mark.parametrize("hole", [np.nan, np.inf, 1e30])
def test_what_the_mask_hides_never_matters(hole):
    """invariant 8"""
    mask_R = jnp.array([1, 0, 1, 0])
    plain, holed = f32(1, 0, 2, 0), jnp.where(mask_R, f32(1, 0, 2, 0), hole)
    for function in (
        lambda x: gae(x, x, mask_R, gamma=0.5, lam=0.5),
        lambda x: discounted_returns(x, mask_R, gamma=0.5),
        lambda x: shape_rewards(1.0, x, mask_R, kl_coef=0.5),
    ):
        for x, y in zip(jax.tree.leaves(function(plain)), jax.tree.leaves(function(holed)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_gae_ends_without_a_value_and_bootstraps_by_the_last_reward(float64):
    """rlax bootstraps from a value after the last step. Our sequences end, so the last reward includes gamma V."""
    rewards_R, values_R = jnp.array([0.0, 0, 1, 0, -0.5 + 0.99 * -1]), jnp.array([1.0, 4, -3, -2, -1])
    advantages_R, _ = gae(rewards_R, values_R, jnp.ones(5), gamma=0.99, lam=0.7)
    assert_close(advantages_R, [-0.6769794974104899, -5.24816666293, 2.48460799, 0.67043, -0.49], atol=1e-12)


def test_gae_goldens_of_truncated_sequences(goldens, float64):
    """From rlax. A discount of 0 ends a sequence, and the next step begins another."""
    case = goldens["gae_truncated"]
    for lam, expected in case["float64"].items():
        for row in range(2):
            rewards, discounts = np.array(case["rewards"][row], float), case["discounts"][row]
            *values, bootstrap = case["values"][row]
            rewards[-1] += discounts[-1] * bootstrap
            ends = [i + 1 for i, discount in enumerate(discounts) if discount == 0] + [len(rewards)]
            for start, end in zip([0, *ends], ends, strict=False):
                advantages_R, _ = gae(
                    jnp.array(rewards[start:end]),
                    jnp.array(values[start:end], float),
                    jnp.ones(end - start),
                    gamma=discounts[start],
                    lam=float(lam),
                )
                assert_close(advantages_R, expected[row][start:end], atol=1e-12)


def test_gae_goldens_of_whole_sequences(goldens, float64):
    for case in goldens["gae_terminal"]:
        rewards, values = np.array(case["rewards"], float), np.array(case["values"], float)
        mask, rates = np.ones(len(rewards)), {"gamma": case["gamma"], "lam": case["lam"]}
        advantages_R, returns_R = gae(rewards, values, mask, **rates)
        if "advantages" in case:
            assert_close(advantages_R, case["advantages"], atol=1e-12)
        if "returns" in case:
            assert_close(returns_R, case["returns"], atol=1e-12)
        assert {"advantages", "returns"} & case.keys()
        if "note" in case:  # the same numbers at valid tokens, 0 at the masked one
            gap = [np.insert(x, 2, hole) for x, hole in ((rewards, 999), (values, 999), (mask, 0))]
            advantages_R, _ = gae(*gap, **rates)
            assert_close(advantages_R, np.insert(case["advantages"], 2, 0), atol=1e-12)


def test_shaped_reward_goldens(goldens, float64):
    case = goldens["kl_rewards"]
    kl_BR = jnp.array(case["logprobs"]) - jnp.array(case["ref_logprobs"])
    for score, kl_R, expected in zip(case["scores"], kl_BR, case["rewards"], strict=True):
        assert_close(shape_rewards(score, kl_R, jnp.ones(3), kl_coef=case["kl_coeff"]), expected, atol=1e-12)


# Groups: the completions of one prompt


def of_group(scores, baseline="mean", scale="none"):
    return np.asarray(advantages.group(jnp.array([scores]), baseline=baseline, scale=scale)[0])


RIGHT = [1.0, 1, 1, 0, 0, 0, 0, 0]  # three of eight


def test_group_baselines_by_hand(float64):
    # others of 3: 1, of 1: 3; mean 2
    assert_close(of_group([3.0, 1], "leave_one_out"), [2, -2], atol=0)
    assert_close(of_group([3.0, 1], "mean"), [1, -1], atol=0)
    assert_close(of_group([3.0, 1], "none"), [3, 1], atol=0)
    # a right one against 2 of 7, a wrong one against 3 of 7
    assert_close(of_group(RIGHT, "leave_one_out"), [5 / 7] * 3 + [-3 / 7] * 5, atol=1e-15)
    two = advantages.group(jnp.array([[3.0, 1], [0, 0]]), baseline="batch_mean", scale="none")
    assert_close(two, [[2, 0], [-1, -1]], atol=0)


def test_group_scales_by_hand(float64):
    """The unbiased standard deviation, ddof 1."""
    # mean 3/8, variance 8/7 * 15/64 = 15/56
    std = (15 / 56) ** 0.5
    assert_close(of_group(RIGHT, scale="group_std"), [5 / 8 / std] * 3 + [-3 / 8 / std] * 5, atol=1e-15)
    assert_close(of_group(RIGHT, scale="group_std"), [1.2076] * 3 + [-0.7246] * 5, atol=5e-5)
    assert_close(of_group([0, *[0.95] * 7], scale="group_std"), [-2.4749] + [0.3536] * 7, atol=5e-5)
    # scores 3, 1, 0, 0 of two prompts: mean 1, squares 4, 0, 1, 1: variance 2
    two = advantages.group(jnp.array([[3.0, 1], [0, 0]]), baseline="mean", scale="batch_std")
    assert_close(two, np.array([[1, -1], [0, 0]]) / 2**0.5, atol=1e-15)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", advantages.SCALES)
@pytest.mark.parametrize("score", [0.1, 1e7 + 0.3, -3e-8])
def test_equal_scores_teach_exactly_nothing(baseline, scale, score):
    """In float32 the mean of eight .1 is not .1, and their standard deviation is above 0."""
    scores_QO = jnp.full((2, 8), score, jnp.float32)
    assert not advantages.group(scores_QO, baseline=baseline, scale=scale).any()
    other_QO = scores_QO.at[1, 0].add(jnp.abs(scores_QO[0, 0]))  # a group beside it that differs
    assert not advantages.group(other_QO, baseline=baseline, scale=scale)[0].any()


def test_scores_that_hardly_differ_are_not_divided_by_a_rounding_error():
    for small in (1e-30, 1e-6, 1.0, 1e30):
        assert_close(of_group(np.float32([small, 0]), scale="group_std"), [0.5**0.5, -(0.5**0.5)], atol=1e-6)


@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(-5, 5, width=32)), st.sampled_from(advantages.SCALES))
def test_a_group_sums_to_zero_and_a_constant_changes_nothing(scores_QO, scale):
    with jax.enable_x64(True):
        for baseline in ("mean", "leave_one_out"):
            found = group(scores_QO, baseline=baseline, scale=scale)
            assert_close(found.sum(axis=1), 0, atol=1e-9)
            if np.ptp(scores_QO, axis=1).min() > 1e-3:
                assert_close(group(scores_QO + 64, baseline=baseline, scale=scale), found, atol=1e-9)


THETA, PAID = np.array([0.3, -0.2, 0.5]), np.array([1, 0, 0.4])  # a bandit of three arms
P = np.exp(THETA) / np.exp(THETA).sum()


def expected_gradient(k, baseline, scale):
    """Mean over all groups of k arms of the mean over the group of A grad log p, by enumeration."""
    groups_QO = np.array(list(itertools.product(range(3), repeat=k)))
    slopes = np.eye(3)[groups_QO] - P  # grad log p of each arm
    mean = advantages.group(jnp.array(PAID[groups_QO]), baseline=baseline, scale=scale)[..., None] * slopes
    return np.sum(P[groups_QO].prod(axis=1)[:, None] * mean.mean(axis=1), axis=0)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_gradient_of_a_bandit_by_enumeration(k, float64):
    """Leave-one-out: the policy gradient p (r - mean r), for any k. The group's mean: (k - 1) / k of it. Its standard
    deviation turns it."""
    true = P * (PAID - P @ PAID)
    assert_close(true, [0.16748, -0.11290, -0.05458], atol=5e-6)
    assert_close(expected_gradient(k, "leave_one_out", "none"), true, atol=1e-12)
    assert_close(expected_gradient(k, "mean", "none"), true * (k - 1) / k, atol=1e-12)
    if k == 2:
        turned = expected_gradient(k, "mean", "group_std") / true
        assert_close(turned, np.array([0.965, 1.055, 0.778]), atol=5e-4)
