"""The policy is a table of the logits of what follows each token, so that its gradient can be done by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.algorithms import policy_gradient as pg
from rlhf_jax.algorithms import ppo
from rlhf_jax.ops import losses
from rlhf_jax.rollout import Apply, Rollout
from rlhf_jax.training import optim
from tests.support import TablePolicy

PAD, EOS = 0, 1
CONFIG = pg.Config(batch=2, kl_coef=0.5, temperature=0.7)
close = np.testing.assert_allclose

# Two episodes: three tokens that end in EOS, and one token that does not. k1 is 1, -2, 0 and 2.
HAND = Rollout(
    prompt_BP=jnp.full((2, 1), 2),
    prompt_mask_BP=jnp.ones((2, 1), bool),
    response_BR=jnp.array([[3, 4, EOS], [3, PAD, PAD]]),
    mask_BR=jnp.array([[1, 1, 1], [1, 0, 0]], bool),
    eos_B=jnp.array([True, False]),
    logp_BR=jnp.array([[-1.0, -3, -2], [-1, 0, 0]]),
    logp_ref_BR=jnp.array([[-2.0, -1, -2], [-3, 0, 0]]),
    kl_exact_BR=jnp.array([[0.5, 0.25, 0.25], [2, 0, 0]]),
    entropy_BR=jnp.array([[1.0, 2, 3], [2, 0, 0]]),
    score_B=jnp.array([10.0, 7]),
)


TABLE = Apply(TablePolicy, None)


@pytest.fixture
def sampled():
    """A table of 5 ids, and HAND as this table would have sampled it."""
    table = jax.random.normal(jax.random.key(0), (5, 5))
    logp_BR = TablePolicy.logprobs(table, HAND.tokens_BT, HAND.attend_BT, 3, temperature=CONFIG.temperature)
    return table, HAND.replace(logp_BR=jnp.where(HAND.mask_BR, logp_BR, 0))


def estimate(rollout=HAND, kl_coef=0.5, **changes):
    return pg.estimate(rollout, kl_coef, config=dataclasses.replace(CONFIG, **changes))


def test_reward_to_go_by_hand():
    # rewards: -.5, 1, 10 and 7 - 1; to go: 10.5, 11, 10 and 6
    to_go = estimate(baseline="none")
    close(to_go.returns_BR, [[10.5, 11, 10], [6, 0, 0]])
    close(to_go.advantages_BR, to_go.returns_BR)
    # gamma 1/2: 10, 1 + 5, -.5 + 3
    close(estimate(baseline="none", gamma=0.5).returns_BR, [[2.5, 6, 10], [6, 0, 0]])


def test_the_articles_credit_by_hand():
    """Each token answers for the score and its own KL: 10 - .5 k1, 7 - .5 k1."""
    close(estimate(baseline="none", reward_to_go=False).returns_BR, [[9.5, 11, 10], [6, 0, 0]])


def test_baselines_by_hand():
    """What episodes return: 10 - .5 (1 - 2 + 0) = 10.5 and 7 - .5 * 2 = 6."""
    close(estimate(baseline="mean").advantages_BR, [[2.25, 2.75, 1.75], [-2.25, 0, 0]])
    close(estimate(baseline="leave_one_out").advantages_BR, [[4.5, 5, 4], [-4.5, 0, 0]])


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8))
def test_leave_one_out_looks_at_the_others_alone(returns):
    returns_B = jnp.array(returns, jnp.float32)
    others = [np.mean(returns[:i] + returns[i + 1 :]) for i in range(len(returns))]
    close(pg.baseline(returns_B, "leave_one_out"), others, atol=1e-5)


@pytest.mark.parametrize("kind", ["mean", "leave_one_out"])
def test_equal_returns_teach_exactly_nothing(kind):
    """The mean of 32 times .1 is not .1 in float32, and a whitening makes a rounding error large."""
    returns_B = jnp.full(32, 0.1, jnp.float32)
    np.testing.assert_array_equal(pg.baseline(returns_B, kind), returns_B)
    assert (pg.baseline(returns_B.at[0].set(0.2), kind) != returns_B).any()


def test_a_batch_of_one_has_no_others():
    close(pg.baseline(jnp.array([3.0]), "leave_one_out"), [0])


def test_whitened_advantages():
    white = estimate(whiten_advantages=True).advantages_BR[HAND.mask_BR]
    close([white.mean(), white.std()], [0, 1], atol=1e-6)


def test_the_gradient_by_hand(sampled):
    """REINFORCE: the mean over tokens of A (p - onehot) / T on the logits before each token."""
    table, drawn = sampled
    drawn = pg.estimate(drawn, 0.5, config=CONFIG)
    expected = np.zeros((5, 5))
    before = np.array(drawn.tokens_BT)
    for row, column in np.argwhere(np.array(drawn.mask_BR)):
        state, token = before[row, column], int(drawn.response_BR[row, column])
        p = np.array(jax.nn.softmax(table[state] / CONFIG.temperature))
        expected[state] += float(drawn.advantages_BR[row, column]) * (p - np.eye(5)[token]) / CONFIG.temperature / 4
    gradient = jax.grad(lambda table: pg.loss({"policy": table}, drawn, config=CONFIG, apply=TABLE)[0])(table)
    close(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"epochs": 2, "importance": False}])
def test_on_a_fresh_rollout_weights_change_no_gradient_and_ppo_agrees(sampled, changes):
    """invariant 16: at ratio 1 the importance-weighted and the clipped surrogate have its gradient."""
    table, drawn = sampled
    drawn = pg.estimate(drawn, 0.5, config=CONFIG)

    def gradient(config):
        return jax.grad(lambda table: pg.loss({"policy": table}, drawn, config=config, apply=TABLE)[0])(table)

    close(gradient(dataclasses.replace(CONFIG, **changes)), gradient(CONFIG), atol=1e-5)
    clipped = jax.grad(
        lambda table: losses.ppo_policy(
            TablePolicy.logprobs(table, drawn.tokens_BT, drawn.attend_BT, 3, temperature=CONFIG.temperature),
            drawn.logp_BR, drawn.advantages_BR, drawn.mask_BR, clip=0.2,
        )[0]
    )(table)  # fmt: skip
    close(clipped, gradient(CONFIG), atol=1e-5)


def test_reused_rollouts_are_weighted_by_the_ratio(sampled):
    """On a table that has moved, the gradient is sum ratio A grad log p; without importance the ratio is left out."""
    table, drawn = sampled
    drawn = pg.estimate(drawn, 0.5, config=CONFIG)
    moved = table + 0.3 * jax.random.normal(jax.random.key(1), table.shape)
    inputs = (drawn.tokens_BT, drawn.attend_BT, 3)
    ratio_BR = jnp.exp(TablePolicy.logprobs(moved, *inputs, temperature=CONFIG.temperature) - drawn.logp_BR)

    def gradient(drawn, config):
        return jax.grad(lambda table: pg.loss({"policy": table}, drawn, config=config, apply=TABLE)[0])(moved)

    reused = dataclasses.replace(CONFIG, epochs=2)
    weighted = drawn.replace(advantages_BR=drawn.advantages_BR * ratio_BR)
    close(gradient(drawn, reused), gradient(weighted, CONFIG), atol=1e-5)
    close(gradient(drawn, dataclasses.replace(reused, importance=False)), gradient(drawn, CONFIG), atol=1e-6)
    assert float(jnp.abs(gradient(drawn, reused) - gradient(drawn, CONFIG)).max()) > 1e-2


def test_microbatches_change_nothing(sampled):
    table, drawn = sampled
    tx = optax.sgd(1.0)

    def learned(microbatches):
        config = dataclasses.replace(CONFIG, microbatches=microbatches)
        state = policy_algorithm.init(table, jax.random.key(0), config=config, tx=tx)
        return policy_algorithm.step(pg, state, drawn, config=config, apply=TABLE, tx=tx)[0].policy

    close(learned(2), learned(1), atol=1e-5)


def test_a_step_moves_the_policy_and_nothing_else(sampled):
    """invariant 14, and the size of what each epoch does is logged."""
    table, drawn = sampled
    config = dataclasses.replace(CONFIG, epochs=3, lr=0.1)
    tx = optim.adamw(config, 30)
    state = policy_algorithm.init(table, jax.random.key(0), config=config, tx=tx)
    new, numbers = jax.jit(partial(policy_algorithm.step, pg, config=config, apply=TABLE, tx=tx))(state, drawn)
    assert int(new.step) == 1 and float(jnp.abs(new.policy - table).max()) > 0.1
    np.testing.assert_array_equal(new.reference, table)
    assert optax.tree.get(new.optimizer["policy"], "count", filtering=lambda path, _: "Adam" in str(path)) == 3
    assert numbers["ess_last"] < numbers["ess"] < 1 and numbers["approx_kl_last"] > 0
    close(numbers["kl"], np.sum(np.array(drawn.kl_BR)) / 2, rtol=1e-5)


def test_the_kl_controller_is_in_the_state(sampled):
    table, drawn = sampled
    config = dataclasses.replace(CONFIG, kl_target=1e-3, kl_horizon=20)
    tx = optim.adamw(config, 30)
    state = policy_algorithm.init(table, jax.random.key(0), config=config, tx=tx)
    state, numbers = policy_algorithm.step(pg, state, drawn, config=config, apply=TABLE, tx=tx)
    sign = np.sign(float(numbers["kl"]) - 1e-3)
    close(state.kl_coef, 0.5 * (1 + sign * 0.2 * 2 / 20), rtol=1e-6)


def test_it_learns_the_rewarded_token():
    """A bandit of four arms, one paid: it is all the policy plays after 60 rollouts of 16."""
    config = pg.Config(batch=16, lr=0.1, kl_coef=0.0)
    tx = optim.adamw(config, 60)
    state = policy_algorithm.init(jnp.zeros((5, 5)), jax.random.key(0), config=config, tx=tx)

    @jax.jit
    def step(state):
        token_B = jax.random.categorical(state.step_key, state.policy[2], shape=(16,))
        blank = jnp.zeros((16, 1))
        drawn = Rollout(
            prompt_BP=jnp.full((16, 1), 2), prompt_mask_BP=blank == 0, response_BR=token_B[:, None], mask_BR=blank == 0,
            eos_B=blank[:, 0] == 1, logp_BR=jax.nn.log_softmax(state.policy[2])[token_B][:, None], logp_ref_BR=blank,
            kl_exact_BR=blank, entropy_BR=blank, score_B=(token_B == 3).astype(jnp.float32),
        )  # fmt: skip
        return policy_algorithm.step(pg, state, drawn, config=config, apply=TABLE, tx=tx)[0]

    for _ in range(60):
        state = step(state)
    assert jax.nn.softmax(state.policy[2])[3] > 0.9


def test_ppo_starts_from_the_same_rollout(sampled):
    """One Rollout serves both: PPO only adds values to it."""
    _, drawn = sampled
    drawn = drawn.replace(values_BR=jnp.zeros((2, 3)))
    config = ppo.Config(lam=1.0, gamma=1.0, whiten_advantages=False, missing_eos="subtract", missing_eos_penalty=0.0)
    close(ppo.estimate(drawn, 0.5, config=config).returns_BR, estimate(drawn, baseline="none").returns_BR, atol=1e-5)
