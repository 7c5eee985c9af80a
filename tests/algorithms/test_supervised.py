import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import supervised
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.rollout import Apply
from rlhf_jax.training import optim
from tests.support import assert_trees_close, assert_trees_equal

PAD, EOS, A, B = range(4)
CONFIG = supervised.Config(lr=1e-2, schedule="constant")
ADAM = optim.adamw(CONFIG, 100)
SGD = optax.sgd(1.0)  # its step is the gradient


@pytest.fixture(scope="module")
def batch(prompts):
    """The six prompts, with responses of 1 to 5 tokens that end in EOS: rows of 4 to 11 tokens."""
    response_BR = jax.random.randint(jax.random.key(0), (6, 5), 2, 29)
    length_B = jnp.array([4, 1, 3, 5, 2, 4])[:, None]
    response_BR = jnp.where(jnp.arange(5) == length_B - 1, EOS, response_BR)
    mask_BR = jnp.arange(5) < length_B
    return {
        "prompt_BP": prompts[0],
        "prompt_mask_BP": prompts[1],
        "response_BR": jnp.where(mask_BR, response_BR, PAD),
        "response_mask_BR": mask_BR,
        "index_B": jnp.arange(6),
    }


def wider(batch, left, right, fill):
    """The batch with more padding on both sides."""
    pad = {"prompt": ((0, 0), (left, 0)), "response": ((0, 0), (0, right))}
    return {
        name: x if x.ndim == 1 else jnp.pad(x, pad[name.split("_")[0]], constant_values=0 if "mask" in name else fill)
        for name, x in batch.items()
    }


@cache
def trainer(apply, tx=SGD, config=CONFIG):
    return jax.jit(partial(supervised.step, config=config, apply=apply, tx=tx), donate_argnums=0)


def begin(policy, tx=SGD, seed=0):
    return supervised.init(jax.tree.map(jnp.copy, policy), jax.random.key(seed), tx=tx)


HAND = {
    "prompt_BP": jnp.array([[PAD, A, B], [PAD, PAD, A]]),
    "prompt_mask_BP": jnp.array([[0, 1, 1], [0, 0, 1]]),
    "response_BR": jnp.array([[A, EOS, PAD], [EOS, PAD, PAD]]),
    "response_mask_BR": jnp.array([[1, 1, 0], [1, 0, 0]]),
    "index_B": jnp.array([0, 1]),
}


def test_which_tokens_count_by_hand():
    """invariants 2 and 13: all but the first real token, EOS included; or the response alone, EOS included."""
    tokens_BT, real_BT, all_BT = supervised.tokens(HAND, "all")
    np.testing.assert_array_equal(tokens_BT, [[PAD, A, B, A, EOS, PAD], [PAD, PAD, A, EOS, PAD, PAD]])
    np.testing.assert_array_equal(real_BT, [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    # entry t is about token t + 1: B, A, EOS of the first row, EOS of the second
    np.testing.assert_array_equal(all_BT, [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])
    *_, response_BT = supervised.tokens(HAND, "response")
    np.testing.assert_array_equal(response_BT, [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]])


@pytest.mark.parametrize("loss_on, expected", [("all", (2 + 3 + 1 + 1) / 4), ("response", (3 + 1 + 1) / 3)])
def test_loss_by_hand(loss_on, expected, bigram):
    """invariants 8 and 13: p(B|A) = 1/4, p(A|B) = 1/8, p(EOS|A) = 1/2: 2, 3 and 1 bits. Tokens count alike."""
    any_p = [1 / 4] * 4
    table = jnp.log(jnp.array([any_p, any_p, [1 / 8, 1 / 2, 1 / 8, 1 / 4], [1 / 2, 1 / 4, 1 / 8, 1 / 8]]))
    config = dataclasses.replace(CONFIG, loss_on=loss_on)
    loss, metrics = supervised.loss(table, HAND, config=config, apply=Apply(bigram, None))
    np.testing.assert_allclose(loss, expected * np.log(2), rtol=1e-6)
    assert metrics["loss"] == loss


def test_every_counted_token_is_learned(apply, policy, batch):
    """invariant 13: the loss of a batch depends on each counted token, EOS among them, and on no padding."""
    tokens_BT, _, mask_BT = supervised.tokens(batch, "all")
    logp_BT, counted_BT = jax.jit(partial(supervised.token_logprobs, config=CONFIG, apply=apply))(policy, batch)
    np.testing.assert_array_equal(counted_BT, mask_BT)
    assert (tokens_BT[:, 1:][mask_BT] == EOS).sum() == 6
    assert PAD not in tokens_BT[:, 1:][mask_BT]
    loss, _ = jax.jit(partial(supervised.loss, config=CONFIG, apply=apply))(policy, batch)
    np.testing.assert_allclose(loss, -logp_BT[mask_BT].mean(), rtol=1e-5)
    assert mask_BT.sum() == batch["prompt_mask_BP"].sum() + batch["response_mask_BR"].sum() - 6


@pytest.mark.parametrize("fill", [PAD, 17])
def test_padding_changes_no_metric(fill, apply, policy, batch):
    """invariant 1: on either side, whatever stands in it; nor the parameters that come of it."""
    train = trainer(apply)
    narrow, narrow_metrics = train(begin(policy), batch)
    wide, wide_metrics = train(begin(policy), wider(batch, 5, 3, fill))
    assert narrow_metrics.keys() == {"loss", "grad_norm", "skipped"}
    assert_trees_close(wide_metrics, narrow_metrics, 1e-5)
    assert_trees_close(wide.policy, narrow.policy, 1e-5)


@pytest.mark.parametrize("microbatches", [2, 6])
def test_accumulation_is_the_full_batch(microbatches, apply, policy, batch):
    """invariant 8: rows have 4 to 11 tokens; the gradient is that of the whole."""
    whole, whole_metrics = trainer(apply)(begin(policy), batch)
    config = dataclasses.replace(CONFIG, microbatches=microbatches)
    parts, metrics = trainer(apply, config=config)(begin(policy), batch)
    assert_trees_close(parts.policy, whole.policy, 1e-5)
    assert_trees_close(metrics, whole_metrics, 1e-5)


def test_a_step_moves_the_policy_alone(apply, policy, batch):
    """invariant 10: one step is one update of the optimizer; nothing else is there."""
    state, _ = trainer(apply, ADAM)(begin(policy, ADAM), batch)
    assert state.step == 1 and state.step.dtype == jnp.int32
    assert state.reference is state.value is state.reward is None
    counts = {int(x) for path, x in jax.tree.leaves_with_path(state.optimizer) if "count" in jax.tree_util.keystr(path)}
    assert counts == {1}


def test_the_loss_falls(apply, policy, batch):
    train, state = trainer(apply, ADAM), begin(policy, ADAM)
    history = []
    for _ in range(30):
        state, metrics = train(state, batch)
        history.append(float(metrics["loss"]))
    assert history[-1] < 0.6 * history[0]


@pytest.fixture(scope="module")
def noisy(apply):
    return Apply(LanguageModel(dataclasses.replace(apply.policy.config, dropout=0.2)), None)


def test_the_same_seed_is_the_same_run(noisy, policy, batch):
    """invariant 11: bit for bit, dropout and all."""
    runs = []
    for seed in 0, 0, 1:
        state = begin(policy, seed=seed)
        for _ in range(2):
            state, _ = trainer(noisy)(state, batch)
        runs.append(state.policy)
    assert_trees_equal(runs[0], runs[1])
    assert (runs[0]["wte"]["embedding"] != runs[2]["wte"]["embedding"]).any()


def test_every_step_and_slice_has_noise_of_its_own(noisy, policy, batch):
    """invariant 11: a key that is never passed on would drop the same units each time."""
    losses = [trainer(noisy)(begin(policy).replace(step=jnp.int32(step)), batch)[1]["loss"].item() for step in range(3)]
    assert len(set(losses)) == 3
    # Two slices of equal rows: were the noise of both the same, the loss of both would be that of either.
    twice = {name: jnp.repeat(x[:3], 2, axis=0) for name, x in batch.items()} | {"index_B": jnp.arange(6)}
    in_two = trainer(noisy, config=dataclasses.replace(CONFIG, microbatches=2))
    _, together = in_two(begin(policy), twice)
    _, first = trainer(noisy)(begin(policy), jax.tree.map(lambda x: x[::2], twice))
    assert abs(together["loss"] - first["loss"]) > 1e-4


def test_it_compiles_once_and_may_be_donated(apply, policy, batch):
    train = jax.jit(partial(supervised.step, config=CONFIG, apply=apply, tx=ADAM), donate_argnums=0)
    state = begin(policy, ADAM)
    for _ in range(3):
        donated = state
        state, _ = train(state, batch)
        assert donated.policy["wte"]["embedding"].is_deleted()
    assert train._cache_size() == 1


def test_no_array_of_all_tokens_by_the_vocabulary(apply, policy, batch, most_tokens):
    """60 tokens are projected 8 at a time: no array has the vocabulary for more, forward or back."""
    program = trainer(apply).lower(begin(policy), batch)
    assert most_tokens(program.as_text()) == most_tokens(program.compile().as_text()) == 8
    whole = Apply(LanguageModel(apply.policy.config), None)
    assert most_tokens(trainer(whole).lower(begin(policy), batch).as_text()) == 60  # so it would be seen
