import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlhf_jax.ops import masked
from rlhf_jax.training import optim


def test_defaults_are_the_published_ones():
    """invariant 10"""
    config = optim.Config()
    assert (config.adam_b2, config.adam_eps, config.weight_decay) == (0.999, 1e-5, 0)
    assert (config.schedule, config.end_lr) == ("linear", 0)


def test_linear_decay_ends_at_zero():
    """invariant 10: a straight line from lr at the first update to 0 after the last."""
    lr = optim.schedule(optim.Config(lr=0.8), 4)
    np.testing.assert_allclose([lr(i) for i in range(6)], [0.8, 0.6, 0.4, 0.2, 0, 0], atol=1e-7)


def test_linear_decay_to_a_tenth():
    lr = optim.schedule(optim.Config(lr=1.0, end_lr=0.1), 2)
    np.testing.assert_allclose([lr(i) for i in range(4)], [1, 0.55, 0.1, 0.1], rtol=1e-6)


def test_cosine_and_constant():
    lr = optim.schedule(optim.Config(lr=0.8, schedule="cosine"), 4)
    np.testing.assert_allclose([lr(0), lr(2), lr(4)], [0.8, 0.4, 0], atol=1e-7)
    lr = optim.schedule(optim.Config(lr=0.8, schedule="cosine", end_lr=0.5), 4)
    np.testing.assert_allclose([lr(0), lr(2), lr(4)], [0.8, 0.6, 0.4], atol=1e-7)
    lr = optim.schedule(optim.Config(lr=0.8, schedule="constant"), 4)
    np.testing.assert_allclose([lr(0), lr(4)], [0.8, 0.8])


@pytest.mark.parametrize("schedule, end", [("linear", 0), ("cosine", 0), ("constant", 1)])
def test_warmup(schedule, end):
    """From 0 to lr in the first updates; the rest still ends with the last update."""
    lr = optim.schedule(optim.Config(lr=1.0, schedule=schedule, warmup=2), 6)
    np.testing.assert_allclose([lr(0), lr(1), lr(2), lr(6)], [0, 0.5, 1, end], atol=1e-7)


def moves(config, *grads, start=0.0):
    """Where a scalar goes under these gradients."""
    tx = optim.adamw(config, updates=1000)
    params, places = jnp.float32(start), []
    opt_state = tx.init(params)
    for grad in grads:
        params, opt_state = optim.update(tx, jnp.float32(grad), opt_state, params)
        places.append(float(params))
    return places


def test_adams_eps_by_hand():
    """invariant 10: the first step is lr g / (|g| + eps): half of lr where g is eps, 1e-5."""
    config = optim.Config(lr=1.0, schedule="constant", max_grad_norm=0)
    np.testing.assert_allclose(moves(config, 1e-5), [-0.5], rtol=1e-4)
    np.testing.assert_allclose(moves(config, 3e-5), [-0.75], rtol=1e-4)


def test_adam_by_hand():
    # g = 1 then -1. m = .1, then .9 * .1 - .1 = -.01, over 1 - .9^2 is -.01/.19; v = 1 both times: up by .01/.19
    config = optim.Config(lr=1.0, schedule="constant", max_grad_norm=0)
    np.testing.assert_allclose(moves(config, 1, -1), [-1, -1 + 0.01 / 0.19], rtol=1e-4)


def test_adams_second_moment_by_hand():
    # g = 1 then 0, b2 = 1/2. m = .09 over .19; v = 1/4 over 3/4: down by .09/.19 * sqrt(3)
    config = optim.Config(lr=1.0, schedule="constant", max_grad_norm=0, adam_b2=0.5)
    np.testing.assert_allclose(moves(config, 1, 0), [-1, -1 - 0.09 / 0.19 * 3**0.5], rtol=1e-4)


def test_weight_decay_is_apart_from_the_gradient():
    config = optim.Config(lr=0.1, schedule="constant", weight_decay=0.5)
    np.testing.assert_allclose(moves(config, 0, start=2.0), [2 - 0.1 * 0.5 * 2], rtol=1e-6)


def test_gradients_are_clipped_at_the_global_norm():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}  # norm 50, clipped to (.6, .8) * 1e-5
    tx = optim.adamw(optim.Config(lr=1.0, schedule="constant", max_grad_norm=1e-5), updates=10)
    moved, _ = optim.update(tx, grads, tx.init(params), params)
    np.testing.assert_allclose([moved["a"][0], moved["b"][0]], [-0.6 / 1.6, -0.8 / 1.8], rtol=1e-4)
    assert optim.norm(grads) == 50


def token_means(rows):
    """A stand-in for a gradient: means over tokens."""
    x_BT, mask_BT = rows["x_BT"], rows["mask_BT"]
    return {"mean": masked.mean(x_BT, mask_BT), "squares": masked.mean(x_BT**2, mask_BT)}


def test_accumulation_by_hand():
    """invariant 8: slices of 1 and 3 tokens with means 8 and 2 have mean (8 + 6) / 4, not 5."""
    batch = {"x_BT": jnp.array([[8.0, 99, 99], [1, 2, 3]]), "mask_BT": jnp.array([[1, 0, 0], [1, 1, 1]])}
    assert optim.accumulate(token_means, batch, batch["mask_BT"].sum(axis=1), 2)["mean"] == 3.5


@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-9, 9, width=32)), hnp.arrays(bool, (6, 3)))
def test_accumulation_is_the_whole_batch(x_BT, mask_BT):
    """invariant 8: whatever the number of tokens in each row, empty rows, slices and batches among them."""
    batch = {"x_BT": jnp.asarray(x_BT), "mask_BT": jnp.asarray(mask_BT)}
    weights_B = mask_BT.sum(axis=1)
    whole = ACCUMULATE[1](batch, weights_B)
    for microbatches in 2, 3, 6:
        parts = ACCUMULATE[microbatches](batch, weights_B)
        for name, x in whole.items():
            np.testing.assert_allclose(parts[name], x, rtol=0, atol=1e-5)


ACCUMULATE = {
    n: jax.jit(lambda batch, weights_B, n=n: optim.accumulate(token_means, batch, weights_B, n)) for n in (1, 2, 3, 6)
}


def test_every_row_is_in_one_slice():
    """Dealt out in turn: slices 0 and 1 of four rows are rows 0, 2 and 1, 3."""
    batch = jnp.arange(4.0)

    def seen(rows_B):
        return jnp.zeros(4).at[rows_B.astype(int)].set(rows_B.shape[0] * jnp.arange(1, 3))

    # each slice has half of the weight: its rows are marked 1 and 2, in order
    np.testing.assert_array_equal(optim.accumulate(seen, batch, jnp.ones(4), 2), [1, 1, 2, 2])


def test_an_update_counts_as_one_step():
    """invariant 10: microbatches are one step of the schedule."""
    tx = optim.adamw(optim.Config(), updates=10)
    opt_state = tx.init(jnp.zeros(2))
    assert optax.tree_utils.tree_get(opt_state, "count", filtering=adam) == 0
    _, opt_state = optim.update(tx, jnp.ones(2), opt_state, jnp.zeros(2))
    assert optax.tree_utils.tree_get(opt_state, "count", filtering=adam) == 1


def adam(path, _):
    return any("ScaleByAdamState" in str(getattr(part, "tuple_name", "")) for part in path)
