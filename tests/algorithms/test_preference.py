import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import preference
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rollout import Apply
from rlhf_jax.training import optim
from tests.support import assert_trees_close, assert_trees_equal

CONFIG = preference.Config(lr=1e-2, schedule="constant")
ADAM = optim.adamw(CONFIG, 100)
SGD = optax.sgd(1.0)  # its step is the gradient
EOS = 1


@pytest.fixture(scope="module")
def batch(prompts):
    """The six prompts, each with two responses of 1 to 4 tokens and EOS."""

    def responses(key, lengths):
        length_B1 = jnp.array(lengths)[:, None]
        mask_BR = jnp.arange(5) <= length_B1
        response_BR = jax.random.randint(key, (6, 5), 2, 29)
        return jnp.where(jnp.arange(5) == length_B1, EOS, jnp.where(mask_BR, response_BR, 0)), mask_BR

    chosen_BR, chosen_mask_BR = responses(jax.random.key(1), [4, 1, 3, 2, 2, 4])
    rejected_BR, rejected_mask_BR = responses(jax.random.key(2), [1, 4, 3, 1, 4, 2])
    return {
        "prompt_BP": prompts[0],
        "prompt_mask_BP": prompts[1],
        "chosen_BR": chosen_BR,
        "chosen_mask_BR": chosen_mask_BR,
        "rejected_BR": rejected_BR,
        "rejected_mask_BR": rejected_mask_BR,
        "index_B": jnp.arange(6),
    }


@cache
def trainer(apply, tx=SGD, config=CONFIG):
    return jax.jit(partial(preference.step, config=config, apply=apply, tx=tx), donate_argnums=0)


def begin(reward, tx=SGD):
    return preference.init(jax.tree.map(jnp.copy, reward), jax.random.key(0), tx=tx)


def digits(params, tokens_BT, mask_BT):
    """A reward to do by hand: params times the number that the real tokens spell."""
    number_B = jnp.zeros(len(tokens_BT))
    for token_B, mask_B in zip(tokens_BT.T, mask_BT.T, strict=True):
        number_B = jnp.where(mask_B, 10 * number_B + token_B, number_B)
    return params * number_B


BY_HAND = Apply(None, SimpleNamespace(score=digits))
HAND = {
    "prompt_BP": jnp.array([[0, 1], [2, 3], [0, 4]]),
    "prompt_mask_BP": jnp.array([[0, 1], [1, 1], [0, 1]]),
    "chosen_BR": jnp.array([[5, 0], [1, 2], [5, 0]]),
    "chosen_mask_BR": jnp.array([[1, 0], [1, 1], [1, 0]]),
    "rejected_BR": jnp.array([[6, 0], [7, 0], [5, 0]]),
    "rejected_mask_BR": jnp.array([[1, 0], [1, 0], [1, 0]]),
}


def test_scores_by_hand():
    """The prompt, then the response, each under its mask."""
    chosen_B, rejected_B = preference.scores(1.0, HAND, apply=BY_HAND)
    np.testing.assert_array_equal(chosen_B, [15, 2312, 45])
    np.testing.assert_array_equal(rejected_B, [16, 237, 45])


def test_loss_by_hand():
    """Margins log(3) * (-1, 2075, 0): sigmoid 1/4, 1 and 1/2; one wrong, one right, one a draw, that counts half."""
    loss, metrics = preference.loss(jnp.log(3.0), HAND, apply=BY_HAND)
    np.testing.assert_allclose(loss, (np.log(4) + 0 + np.log(2)) / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], 0.5)
    np.testing.assert_allclose(metrics["margin"], np.log(3) * 2074 / 3, rtol=1e-5)
    assert metrics["loss"] == loss


def test_scores_are_those_of_each_side_alone(apply, scalar, batch):
    """invariant 12: read at each response's own EOS, though both sides go through the model together."""
    both = jax.jit(partial(preference.scores, apply=apply))(scalar, batch)
    score = jax.jit(apply.scalar.score)
    for side, score_B in zip(("chosen", "rejected"), both, strict=True):
        tokens_BT = jnp.concatenate([batch["prompt_BP"], batch[f"{side}_BR"]], axis=1)
        mask_BT = jnp.concatenate([batch["prompt_mask_BP"], batch[f"{side}_mask_BR"]], axis=1)
        for row in range(6):
            real_T = np.flatnonzero(mask_BT[row])
            assert tokens_BT[row, real_T[-1]] == EOS
        np.testing.assert_allclose(score_B, score(scalar, tokens_BT, mask_BT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fill", [0, 17])
def test_padding_changes_no_metric(fill, apply, scalar, batch):
    """invariant 1: on either side, whatever stands in it; nor the parameters that come of it."""

    def pad(name, x):
        if x.ndim == 1:
            return x
        columns = (5, 0) if "prompt" in name else (0, 3)
        return jnp.pad(x, ((0, 0), columns), constant_values=0 if "mask" in name else fill)

    train = trainer(apply)
    narrow, narrow_metrics = train(begin(scalar), batch)
    wide, wide_metrics = train(begin(scalar), {name: pad(name, x) for name, x in batch.items()})
    assert narrow_metrics.keys() == {"loss", "accuracy", "margin", "grad_norm", "skipped"}
    assert_trees_close(wide_metrics, narrow_metrics, 2e-5)
    assert_trees_close(wide.reward, narrow.reward, 1e-5)


@pytest.mark.parametrize("microbatches", [2, 6])
def test_accumulation_is_the_full_batch(microbatches, apply, scalar, batch):
    """invariant 8: pairs count alike, however long."""
    whole, whole_metrics = trainer(apply)(begin(scalar), batch)
    config = dataclasses.replace(CONFIG, microbatches=microbatches)
    parts, metrics = trainer(apply, config=config)(begin(scalar), batch)
    assert_trees_close(parts.reward, whole.reward, 1e-5)
    assert_trees_close(metrics, whole_metrics, 1e-5)


def test_dropout_is_off(apply, scalar, batch):
    """invariant 10: whatever rate the model was pretrained with."""
    noisy = Apply(None, ScalarModel(dataclasses.replace(apply.scalar.config, dropout=0.5)))
    expected, actual = (jax.jit(partial(preference.scores, apply=model))(scalar, batch) for model in (apply, noisy))
    assert_trees_equal(actual, expected)


def test_it_learns_which_was_chosen(apply, scalar, batch):
    train, state = trainer(apply, ADAM), begin(scalar, ADAM)
    state, before = train(state, batch)
    for _ in range(30):
        state, metrics = train(state, batch)
    assert metrics["accuracy"] == 1 and before["accuracy"] < 1
    assert metrics["loss"] < 0.2 * before["loss"]
    assert metrics["margin"] > 1


def test_the_same_seed_is_the_same_run_and_a_step_is_one_update(apply, scalar, batch):
    """invariants 10 and 11: bit for bit; nothing but the reward is there."""
    one, two = (trainer(apply, ADAM)(begin(scalar, ADAM), batch)[0] for _ in range(2))
    assert_trees_equal(one.reward, two.reward)
    assert one.step == 1 and one.policy is one.reference is one.value is None
    counts = {int(x) for path, x in jax.tree.leaves_with_path(one.optimizer) if "count" in jax.tree_util.keystr(path)}
    assert counts == {1}


def test_it_compiles_once_and_may_be_donated(apply, scalar, batch):
    train = jax.jit(partial(preference.step, config=CONFIG, apply=apply, tx=ADAM), donate_argnums=0)
    state = begin(scalar, ADAM)
    for _ in range(3):
        donated = state
        state, _ = train(state, batch)
        assert donated.reward["head"]["kernel"].is_deleted()
    assert train._cache_size() == 1
