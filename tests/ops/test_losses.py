import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import losses

reals = hnp.arrays(np.float64, 5, elements=st.floats(-5, 5, width=32))
logps = hnp.arrays(np.float64, 5, elements=st.floats(-5, 0, width=32))
masks = hnp.arrays(bool, 5)


ppo_policy = jax.jit(losses.ppo_policy, static_argnames="clip")
policy_slope = jax.jit(jax.grad(losses.policy_gradient))
ppo_slope = jax.jit(jax.grad(losses.ppo_policy, has_aux=True), static_argnames="clip")


def ppo(ratios, advantages, mask=None, clip=0.2):
    """ppo_policy by the ratios: the old log-probs are 0."""
    mask = jnp.ones(len(ratios)) if mask is None else jnp.array(mask)
    logp = jnp.log(jnp.array(ratios))
    return ppo_policy(logp, jnp.zeros_like(logp), jnp.array(advantages), mask, clip=clip)


def test_cross_entropy_by_hand():
    # p = 1/2 and 1/8: (log 2 + 3 log 2) / 2
    logp = jnp.log(jnp.array([0.5, 1 / 8, 0.9]))
    np.testing.assert_allclose(losses.cross_entropy(logp, jnp.array([1, 1, 0])), 2 * np.log(2), rtol=1e-6)


def test_bradley_terry_by_hand():
    # chosen ahead by log 3: sigmoid is 3/4; behind by log 3: 1/4
    loss_B = losses.bradley_terry(jnp.log(jnp.array([3.0, 1, 1])), jnp.log(jnp.array([1.0, 3, 1])))
    np.testing.assert_allclose(loss_B, -np.log([0.75, 0.25, 0.5]), rtol=1e-6)


@given(reals, reals)
def test_bradley_terry_laws(chosen, rejected):
    """Losses of a pair and of the swapped pair differ by the margin; the gradient is sigmoid(-margin)."""
    with jax.enable_x64(True):
        loss, turned = losses.bradley_terry(chosen, rejected), losses.bradley_terry(rejected, chosen)
        assert (loss >= 0).all()
        np.testing.assert_allclose(turned - loss, chosen - rejected, atol=1e-12)
        slope = jax.grad(lambda x: losses.bradley_terry(x, rejected).sum())(chosen)
        np.testing.assert_allclose(slope, -1 / (1 + np.exp(chosen - rejected)), atol=1e-12)


def test_bradley_terry_of_hopeless_pairs_is_finite():
    far = jnp.array([1e4, -1e4])
    np.testing.assert_allclose(losses.bradley_terry(far, jnp.zeros(2)), [0, 1e4])
    np.testing.assert_allclose(jax.grad(lambda x: losses.bradley_terry(x, 0).sum())(far), [0, -1])


def test_policy_gradient_by_hand():
    logp, advantages, mask = jnp.array([-1.0, -2, -9]), jnp.array([3.0, -1, 9]), jnp.array([1, 1, 0])
    loss, slope = jax.value_and_grad(losses.policy_gradient)(logp, advantages, mask)
    assert loss == (3 - 2) / 2
    np.testing.assert_allclose(slope, [-1.5, 0.5, 0])  # a token that was better than expected becomes more likely


def test_ppo_by_hand():
    # clip .2: at advantage 1 a ratio is worth at most 1.2, at advantage -1 at least -.8
    ratios, advantages = [1.5, 0.5, 1.5, 0.5], [1.0, 1, -1, -1]
    loss, aux = ppo(ratios, advantages)
    np.testing.assert_allclose(loss, -(1.2 + 0.5 - 1.5 - 0.8) / 4, rtol=1e-6)
    np.testing.assert_allclose(aux["clip_fraction"], 0.5)  # the first and the last
    np.testing.assert_allclose(aux["ratio"], 1, rtol=1e-6)
    k3 = np.mean([r - 1 - np.log(r) for r in ratios])
    np.testing.assert_allclose(aux["approx_kl"], k3, rtol=1e-6)


def test_the_clip_has_two_sides():
    """low .2, high .5: at advantage 1 a ratio of 1.4 is not clipped, at advantage -1 one of .7 is, to .8."""
    ratios, advantages = jnp.log(jnp.array([1.4, 1.6, 0.7])), jnp.array([1.0, 1, -1])
    _, aux = losses.ppo_policy(ratios, jnp.zeros(3), advantages, jnp.ones(3), clip=0.2, clip_high=0.5)
    np.testing.assert_allclose(aux["tokens"]["loss"], [-1.4, -1.5, 0.8], rtol=1e-6)


def test_clipped_tokens_push_no_gradient():
    """No gradient beyond the clip on the side that the advantage pushes to; on the other side there is one."""

    def loss(logp, advantages):
        return losses.ppo_policy(logp, jnp.zeros(2), advantages, jnp.ones(2), clip=0.2)[0]

    logp, slope = jnp.log(jnp.array([1.5, 0.5])), jax.jit(jax.grad(loss))
    np.testing.assert_allclose(slope(logp, jnp.array([1.0, -1])), [0, 0])
    np.testing.assert_allclose(slope(logp, jnp.array([-1.0, 1])), [1.5 / 2, -0.5 / 2], rtol=1e-6)


@given(logps, reals, masks)
def test_ppo_at_ratio_one_is_the_policy_gradient(logp, advantages, mask):
    """invariant 16: the same gradient; no clip, no KL."""
    with jax.enable_x64(True):
        slope, aux = ppo_slope(logp, logp, advantages, mask, clip=0.2)
        np.testing.assert_allclose(slope, policy_slope(logp, advantages, mask), atol=1e-15)
        assert aux["clip_fraction"] == aux["approx_kl"] == 0
        assert aux["ratio"] == mask.any()


@given(logps, logps, reals, masks, st.floats(0.05, 0.5))
def test_ppo_is_the_mean_of_the_worse_of_two(logp, logp_old, advantages, mask, clip):
    """invariant 8: the loss and its metrics are means over tokens with mask 1; padding would shrink KL."""
    ratio = np.exp(logp - logp_old)
    plain, clipped = ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages

    def mean(x):
        return x[mask].sum() / max(mask.sum(), 1)

    with jax.enable_x64(True):
        loss, aux = losses.ppo_policy(logp, logp_old, advantages, mask, clip=clip)
        np.testing.assert_allclose(loss, -mean(np.minimum(plain, clipped)), atol=1e-12)
        np.testing.assert_allclose(aux["clip_fraction"], mean(clipped < plain), atol=1e-12)
        np.testing.assert_allclose(aux["approx_kl"], mean(ratio - 1 - np.log(ratio)), atol=1e-12)
        np.testing.assert_allclose(aux["ratio"], mean(ratio), atol=1e-12)


def test_value_loss_by_hand():
    # clip 1, old value 0. 3 against a return of 2: squared 1, clipped to 1 also 1; against 3: 0, clipped (1 - 3)^2 = 4;
    # -3 against 0: 9, clipped to -1: 1. The larger of each is halved: (1 + 4 + 9) / 6
    values, returns = jnp.array([3.0, 3, -3, 99]), jnp.array([2.0, 3, 0, 0])
    loss, aux = losses.ppo_value(values, jnp.zeros(4), returns, jnp.array([1, 1, 1, 0]), clip=1)
    np.testing.assert_allclose(loss, 14 / 6, rtol=1e-6)
    np.testing.assert_allclose(aux["clip_fraction"], 1 / 3, rtol=1e-6)


def test_a_value_within_the_range_is_not_clipped():
    """Rounding does not make it count as clipped."""
    values, old = jax.random.uniform(jax.random.key(0), (2, 1000), minval=-0.09, maxval=0.09)
    _, aux = losses.ppo_value(values, old, jnp.zeros(1000), jnp.ones(1000), clip=0.2)
    assert aux["clip_fraction"] == 0


def test_clipped_values_push_no_gradient():
    """No gradient where the clipped error is the larger; elsewhere the value moves towards the return."""

    def loss(values, returns):
        return losses.ppo_value(values, jnp.zeros(2), returns, jnp.ones(2), clip=1)[0]

    slope = jax.grad(loss)(jnp.array([3.0, 0.5]), jnp.array([3.0, 2]))
    np.testing.assert_allclose(slope, [0, (0.5 - 2) / 2])


@given(reals, reals, masks)
def test_value_loss_without_a_clip_is_half_the_squared_error(values, returns, mask):
    with jax.enable_x64(True):
        loss, _ = losses.ppo_value(values, values, returns, mask, clip=0.2)
        squared = np.square(values - returns)[mask].sum() / max(mask.sum(), 1)
        np.testing.assert_allclose(loss, squared / 2, atol=1e-12)


MASK, ADVANTAGES, OLD = jnp.array([1, 1, 0]), jnp.array([1.0, -1, 0]), jnp.array([-0.9, -2.4, 0])
ON_LOGP = [
    lambda logp: losses.cross_entropy(logp, MASK),
    lambda logp: losses.policy_gradient(logp, ADVANTAGES, MASK),
    lambda logp: losses.ppo_policy(logp, OLD, ADVANTAGES, MASK, clip=0.2)[0],
    lambda logp: losses.ppo_policy(logp, OLD, ADVANTAGES, MASK, clip=0.2)[1]["approx_kl"],
]
ON_VALUES = [lambda values: losses.ppo_value(values, OLD, ADVANTAGES, MASK, clip=0.2)[0]]


@pytest.mark.parametrize("loss", ON_LOGP)
@pytest.mark.parametrize("hole", [-np.inf, np.nan, -1e30])
def test_what_the_mask_hides_never_matters(loss, hole):
    """invariant 8: a loss and its gradient do not depend on tokens with mask 0."""
    plain, holed = jnp.array([-1.0, -2, 0]), jnp.array([-1.0, -2, hole])
    both = jax.jit(jax.value_and_grad(loss))
    (actual, slope), (expected, expected_slope) = both(holed), both(plain)
    assert actual == expected
    np.testing.assert_array_equal(slope, expected_slope)


@pytest.mark.parametrize("loss", ON_VALUES)
@pytest.mark.parametrize("hole", [1e4, -1e18])
def test_what_the_mask_hides_never_matters_to_values(loss, hole):
    """invariant 8: as above; a value is a finite number everywhere."""
    plain, holed = jnp.array([-1.0, -2, 0]), jnp.array([-1.0, -2, hole])
    both = jax.jit(jax.value_and_grad(loss))
    (actual, slope), (expected, expected_slope) = both(holed), both(plain)
    assert actual == expected
    np.testing.assert_array_equal(slope, expected_slope)


@pytest.mark.parametrize(
    "ratios, advantages, expected",
    [
        ([1, 1, np.exp(-2)], [0.3, 0.2, 0.1], -(0.3 + 0.2 + 0.1 * np.exp(-2)) / 3),
        ([1, 1, np.exp(-2)], [-0.3, -0.2, -0.1], (0.3 + 0.2 + 0.1 * 0.8) / 3),
        ([0.5, 1, 1.5], [1, -1, 2], -(0.5 - 1 + 2 * 1.2) / 3),
        ([np.e], [1], -1.2),
        ([1 / np.e], [1], -1 / np.e),
        ([np.exp(0.1)], [1], -np.exp(0.1)),
    ],
)
def test_ppo_numbers_of_other_libraries(ratios, advantages, expected, float64):
    np.testing.assert_allclose(ppo(ratios, advantages)[0], expected, atol=1e-12)


def test_ppo_goldens(goldens, float64):
    first, second, corrected = goldens["ppo_clip"]
    for case in first, second:
        loss, _ = ppo(case["ratios"], case["advantages"], clip=case["eps"])
        np.testing.assert_allclose(loss, case["loss"], atol=1e-12)
    loss, _ = ppo(first["ratios"], [-a for a in first["advantages"]], clip=first["eps"])
    np.testing.assert_allclose(loss, first["loss_neg_adv"], atol=1e-12)
    for case in corrected["cases"]:
        np.testing.assert_allclose(ppo([case["ratio"]], [case["advantage"]])[0], case["loss"], atol=1e-12)


def test_pairwise_goldens(goldens, float64):
    case = goldens["pairwise_logistic"]
    margin = jnp.array(case["margin"])
    np.testing.assert_allclose(losses.bradley_terry(margin, 0), case["loss"], rtol=1e-12)
