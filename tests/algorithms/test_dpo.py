"""DPO on pairs and on its own samples, and best-of-n distillation: losses by hand, gradients of a table of logits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import fields
from rlhf_jax.algorithms import best_of_n, dpo, online_dpo, policy
from rlhf_jax.ops import losses
from rlhf_jax.rollout import Apply
from rlhf_jax.viz import trace, verify
from tests.support import TablePolicy, assert_close, error

IDS, PAD, EOS = 5, 0, 1
TABLES = Apply(TablePolicy, None)
SGD = optax.sgd(1.0)
CONFIG = dpo.Config(batch=4, beta=0.1)


def of(h, **how):
    """The loss of one pair whose log-ratios are h apart."""
    return float(losses.dpo(jnp.array(h), 0.0, 0.0, 0.0, **({"beta": 0.1} | how)))


def test_losses_by_hand(float64):
    """L(x) = log(1 + exp(-x)): L(.6) = .437488, L(-.6) = 1.037488."""
    assert_close(of(0.0), np.log(2), atol=1e-12)
    assert_close(of(6.0), 0.437488, atol=5e-7)
    assert_close(of(6.0, kind="robust", smoothing=0.2), (0.8 * 0.437488 - 0.2 * 1.037488) / 0.6, atol=1e-6)
    assert_close(of(6.0, kind="robust", smoothing=0.2), 0.237488, atol=5e-7)
    assert_close(of(6.0, kind="ipo", beta=0.5), (6 - 1) ** 2, atol=1e-12)
    assert_close([of(h, kind="hinge") for h in (6.0, 12.0)], [0.4, 0], atol=1e-12)
    # conservative: least where sigmoid(beta h) = .8, at h = 10 log 4, where it is the entropy of .8
    least = of(10 * np.log(4), smoothing=0.2)
    assert_close(least, 0.500402, atol=5e-7)
    assert min(of(13.8629 - 0.5, smoothing=0.2), of(13.8629 + 0.5, smoothing=0.2)) > least


def test_the_reference_counts_and_gradients_of_equal_models(float64):
    sides = [jnp.array([x]) for x in (-3.0, -5.0, -3.0, -5.0)]
    loss = partial(losses.dpo, beta=0.1)
    assert_close(loss(*sides), np.log(2), atol=1e-12)
    slopes = jax.grad(lambda *x: loss(*x).sum(), argnums=(0, 1, 2, 3))(*sides)
    assert_close(np.ravel(slopes), [-0.05, 0.05, 0.05, -0.05], atol=1e-12)
    assert_close(loss(sides[0] + 6, *sides[1:]), 0.437488, atol=5e-7)


@pytest.fixture(scope="module")
def pairs():
    """(table of the policy, of the reference, four pairs with the log-probs of the reference)."""
    keys = jax.random.split(jax.random.key(0), 6)
    batch = {"prompt_BP": jnp.full((4, 1), 2), "prompt_mask_BP": jnp.ones((4, 1), bool)}
    for i, side in enumerate(("chosen", "rejected")):
        mask_BR = jnp.arange(3) < jnp.array([[3, 1, 2, 3], [1, 2, 2, 3]])[i][:, None]
        batch[f"{side}_mask_BR"] = mask_BR
        batch[f"{side}_BR"] = jnp.where(mask_BR, jax.random.randint(keys[i], (4, 3), 1, IDS), PAD)
    return *jax.random.normal(keys[2], (2, IDS, IDS)), batch


def referred(pairs, config=CONFIG):
    _, reference, batch = pairs
    found = dpo.logprobs(reference, batch, config=config, apply=TABLES)
    return batch | {"chosen_ref_B": found["chosen_B"], "rejected_ref_B": found["rejected_B"]}


def test_a_completion_is_the_sum_or_the_mean_of_its_tokens(pairs):
    table, _, batch = pairs
    logp = jax.nn.log_softmax(table, axis=-1)
    first = batch["chosen_BR"][0]
    expected = logp[2, first[0]] + logp[first[0], first[1]] + logp[first[1], first[2]]
    for total, loss, divisor in (("auto", "sigmoid", 1), ("auto", "ipo", 3), ("mean", "hinge", 3), ("sum", "ipo", 1)):
        config = dataclasses.replace(CONFIG, total=total, loss=loss)
        found = dpo.logprobs(table, batch, config=config, apply=TABLES)
        assert_close(found["chosen_B"][0], expected / divisor, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"loss": "ipo", "sft_coef": 0.5}])
def test_microbatches_change_nothing_and_the_loss_is_logged(pairs, changes):
    table, _, _ = pairs
    config = dataclasses.replace(CONFIG, **changes)
    batch = referred(pairs, config)

    def learned(microbatches):
        state = dpo.init(table, jax.random.key(1), tx=SGD)
        sliced = dataclasses.replace(config, microbatches=microbatches)
        return dpo.step(state, batch, config=sliced, apply=TABLES, tx=SGD, record=True)

    (one, numbers), (two, others) = learned(1), learned(2)
    assert_close(one.policy, two.policy, atol=1e-6)
    np.testing.assert_array_equal(one.reference, table)
    assert float(jnp.abs(one.policy - table).max()) > 1e-3
    for name in ("loss", "accuracy", "margin", "chosen_logp", "length_difference"):
        assert_close(numbers[name], others[name], atol=1e-5)
    assert numbers["length_difference"] == (2 - 1 + 0 + 0) / 4
    assert_close(numbers["chosen_gain"], numbers["chosen_logp"] - jnp.mean(batch["chosen_ref_B"]), atol=1e-5)
    assert_close(numbers["loss"], numbers["dpo_loss"] + config.sft_coef * numbers.get("sft_loss", 0))
    # The verifier recomputes it.
    arrays = {f"batch.{key}": np.asarray(x) for key, x in batch.items()}
    arrays |= {f"update.{key}": np.asarray(x) for key, x in numbers.pop("record").items()}
    logged = {f"dpo/{key}": float(x) for key, x in numbers.items()}
    file = trace.File("file", "dpo", "iter", 1, logged, arrays, {}, [], {"config": dataclasses.asdict(config)})
    manifest = {"stages": {"dpo": {"algorithm": "dpo"}}}
    assert [each.breach for each in verify.prove([file], manifest)] == [""]
    file.arrays["update.chosen_B"] = file["update.chosen_B"] + 0.1
    assert all(each.breach for each in verify.prove([file], manifest))


def test_what_has_no_effect_and_what_cannot_be():
    assert fields.unused(dataclasses.replace(CONFIG, loss="ipo"))["smoothing"] == "loss is ipo"
    assert "smoothing" not in fields.unused(CONFIG)
    bad = dataclasses.replace(CONFIG, smoothing=0.5)
    assert error(fields.check, bad) == "smoothing: expected at least 0 and less than 0.5, got 0.5"
    for changes, message in (
        ({"group": 3}, "group: expected at least 2 and at most 2, got 3"),
        ({"reduction": "token"}, "reduction: expected sequence (a pair has one loss), got 'token'"),
        ({"kl": "reward"}, "kl: expected k2, k3, exact or off (completions are compared by their score), got 'reward'"),
    ):
        assert error(fields.check, online_dpo.Config(**changes)) == message
    assert error(fields.check, best_of_n.Config(kl="reward")).startswith("kl: expected k2, k3, exact or off")
    assert error(fields.check, best_of_n.Config(reduction="sequence")).startswith("reduction: expected token (the loss")


# On its own samples; the rollout is that of test_group.py


def learn(algorithm, config, drawn, **parts):
    table, other, apply, rollout = drawn
    state = policy.init(table, jax.random.key(1), config=config, tx=SGD).replace(reference=other)
    step = partial(policy.step, algorithm, config=config, apply=apply, tx=SGD, **parts)
    return jax.jit(step)(state, rollout)


SIZES = {"batch": 8, "temperature": 0.7, "max_grad_norm": 0.0}


def test_online_dpo_by_hand(drawn):
    """The better of each pair is chosen; one that did not end has the score -1; equal ones have no loss."""
    table, other, apply, rollout = drawn
    drawn = table, other, apply, rollout.replace(score_B=jnp.array([9.0, 0.5, 1, 2, 0, -3, 4, 4]))
    config = online_dpo.Config(**SIZES, group=2, beta=0.3)  # rows 0 and 4 have no EOS
    done = online_dpo.estimate(drawn[3], 0.0, config=config)
    np.testing.assert_array_equal(done.advantages_BR[:, 0], [-1, 1, -1, 1, 1, -1, 0, 0])
    gain_B = jnp.sum(rollout.logp_BR - rollout.logp_ref_BR, axis=1)
    h = np.array([gain_B[1] - gain_B[0], gain_B[3] - gain_B[2], gain_B[4] - gain_B[5]])
    state, numbers = learn(online_dpo, config, drawn)
    assert_close(numbers["policy_loss"], np.logaddexp(0, -0.3 * h).sum() / 4, atol=1e-5)
    assert numbers["groups_equal"] == 0.25
    sliced, _ = learn(online_dpo, dataclasses.replace(config, microbatches=4), drawn)
    assert_close(sliced.policy, state.policy, atol=1e-6)
    # IPO's h is of means over tokens, as DPO's; total: sum is the option. Lengths are 4, 1, 3, 2, 4, 2.
    mean_B = gain_B / jnp.array([4, 1, 3, 2, 4, 2, 1, 3])
    for total, each_B in (("auto", mean_B), ("sum", gain_B)):
        ipo = dataclasses.replace(config, loss="ipo", total=total)
        h = np.array([each_B[1] - each_B[0], each_B[3] - each_B[2], each_B[4] - each_B[5]])
        found = learn(online_dpo, ipo, drawn)[1]["policy_loss"]
        assert_close(found, ((h - 1 / 0.6) ** 2).sum() / 4, atol=1e-5)


def test_best_of_n_keeps_the_best_that_ended(drawn):
    """Rows 1 to 3 of the first group ended, the best of them is row 2; 5 of the second. 3 + 2 tokens are kept."""
    table, other, apply, rollout = drawn
    scores = jnp.array([9.0, 0.5, 1, 0, 9, 3, 1, 2])
    drawn = table, other, apply, rollout.replace(score_B=scores)
    config = best_of_n.Config(**SIZES, group=4)
    state, numbers = learn(best_of_n, config, drawn)
    assert_close(numbers["policy_loss"], -(rollout.logp_BR[2].sum() + rollout.logp_BR[5].sum()) / 5, atol=1e-5)
    assert (numbers["kept"], numbers["score_kept"]) == (1, 2)
    assert_close(numbers["kl_bound"], np.log(4) - 3 / 4, atol=1e-6)
    sliced, _ = learn(best_of_n, dataclasses.replace(config, microbatches=2), drawn)
    assert_close(sliced.policy, state.policy, atol=1e-6)
    none = rollout.replace(eos_B=jnp.zeros(8, bool), score_B=scores)
    state, numbers = learn(best_of_n, config, (table, other, apply, none))
    np.testing.assert_array_equal(state.policy, table)
    assert numbers["kept"] == 0
    how = dict(ended=False, missing_eos="subtract", missing_eos_penalty=0.0)
    state, numbers = learn(best_of_n, dataclasses.replace(config, **how), drawn)  # row 0 did not end, and 9 is the most
    assert (numbers["kept"], numbers["score_kept"]) == (1, 9)
    state, numbers = learn(best_of_n, dataclasses.replace(config, ended=False), drawn)  # it has -1 here
    assert (numbers["kept"], numbers["score_kept"]) == (1, 2)
