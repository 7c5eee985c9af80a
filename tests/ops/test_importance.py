import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.ops import importance

close = np.testing.assert_allclose


def test_effective_sample_size_by_hand():
    # weights 1, 2, 3: 6^2 / (3 * 14) = 6/7; the padding's weight of e^9 does not count
    log_weight = jnp.append(jnp.log(jnp.array([1.0, 2, 3])), 9.0)
    close(importance.effective_sample_size(log_weight, jnp.array([1, 1, 1, 0], bool)), 6 / 7, rtol=1e-6)


def test_equal_weights_leave_all_samples_and_one_large_weight_leaves_one():
    close(importance.effective_sample_size(jnp.full(8, 3.0)), 1, rtol=1e-6)
    close(importance.effective_sample_size(jnp.array([200.0, 0, 0, 0])), 1 / 4, rtol=1e-6)  # e^200 overflows float32


effective_sample_size = jax.jit(importance.effective_sample_size)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), st.floats(-50, 50, width=32))
def test_a_common_factor_changes_nothing_and_the_size_is_a_share(log_weights, factor):
    mask = np.arange(20) < len(log_weights)
    log_weight = np.full(20, np.nan, np.float32)  # one shape: it compiles once
    log_weight[mask] = log_weights
    size = float(effective_sample_size(log_weight, mask))
    assert 1 / len(log_weights) - 1e-5 <= size <= 1 + 1e-5
    close(effective_sample_size(log_weight + np.float32(factor), mask), size, rtol=1e-3)


def test_statistics_by_hand():
    # Log ratios: log 2 and log 3 in one response, log 4 in another; the masked 7 does not count.
    logp_BR = jnp.array([[np.log(2), np.log(3)], [np.log(4), 7]], jnp.float32)
    mask_BR = jnp.array([[1, 1], [1, 0]], bool)
    numbers = importance.statistics(logp_BR, jnp.zeros((2, 2)), mask_BR)
    close(numbers["ratio_max"], 4, rtol=1e-6)
    close(numbers["ess_token"], 9**2 / (3 * (4 + 9 + 16)), rtol=1e-6)
    close(numbers["ess"], 10**2 / (2 * (36 + 16)), rtol=1e-6)


def test_the_largest_weight_is_of_a_real_token():
    """All real tokens have become less likely: the largest weight is 1/2, and padding, whose ratio is 1, has none."""
    logp_BR = jnp.array([[np.log(1 / 2), np.log(1 / 3)], [np.log(1 / 4), 0]], jnp.float32)
    mask_BR = jnp.array([[1, 1], [1, 0]], bool)
    close(importance.statistics(logp_BR, jnp.zeros((2, 2)), mask_BR)["ratio_max"], 1 / 2, rtol=1e-6)


def test_a_rollout_of_the_policy_itself_is_worth_all_its_samples():
    logp_BR = jnp.array([[-1.0, -2], [-3, -4]])
    numbers = importance.statistics(logp_BR, logp_BR, jnp.ones((2, 2), bool))
    assert all(float(value) == 1 for value in numbers.values())
