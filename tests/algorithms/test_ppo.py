"""Most of these have a policy and a value network that are tables: logits and value of what follows each token."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import generate, rollout
from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.algorithms import ppo
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.ops import logprobs, losses
from rlhf_jax.rollout import Apply, Rollout
from rlhf_jax.training import optim
from tests.support import TablePolicy, assert_trees_close, assert_trees_equal

PAD, EOS = 0, 1
CONFIG = ppo.Config(batch=6, epochs=2, minibatches=3, lr=1e-2, schedule="constant", temperature=0.7)
ADAM = optim.adamw(CONFIG, 100)
SGD = optax.sgd(1.0)  # its step is the gradient
STILL = optax.set_to_zero()


class TableScalar:
    """values[v] after token v."""

    @staticmethod
    def values(table, tokens_BT, attend_BT, count):
        return logprobs.before(table[tokens_BT], count)


TABLES = Apply(TablePolicy, TableScalar)


@pytest.fixture(scope="module")
def tables():
    """Six episodes of 1 to 4 tokens on 5 ids, and the state that sampled them: (state, rollout)."""
    keys = jax.random.split(jax.random.key(0), 5)
    policy, value = jax.random.normal(keys[0], (5, 5)), jax.random.normal(keys[1], (5,))
    mask_BR = jnp.arange(4) < jnp.array([4, 1, 3, 2, 4, 2])[:, None]
    prompt_BP, response_BR = jax.random.randint(keys[2], (6, 2), 2, 5), jax.random.randint(keys[3], (6, 4), 1, 5)
    rollout = Rollout(
        prompt_BP=prompt_BP,
        prompt_mask_BP=jnp.ones((6, 2), bool),
        response_BR=jnp.where(mask_BR, response_BR, PAD),
        mask_BR=mask_BR,
        eos_B=jnp.array([0, 1, 1, 1, 0, 1], bool),
        logp_BR=jnp.zeros((6, 4)),
        logp_ref_BR=jnp.where(mask_BR, -1.5, 0),
        kl_exact_BR=jnp.where(mask_BR, 0.1, 0),
        entropy_BR=jnp.where(mask_BR, 1.2, 0),
        score_B=jax.random.normal(keys[4], (6,)),
    )
    inputs = (rollout.tokens_BT, rollout.attend_BT, 4)
    rollout = rollout.replace(
        logp_BR=jnp.where(mask_BR, TablePolicy.logprobs(policy, *inputs, temperature=CONFIG.temperature), 0),
        values_BR=jnp.where(mask_BR, TableScalar.values(value, *inputs), 0),
    )
    return SimpleNamespace(policy=policy, value=value, reward=jnp.ones(3)), rollout


def begin(parts, tx=ADAM, config=CONFIG, seed=0):
    more = {"value": parts.value, "reward": parts.reward}
    return policy_algorithm.init(parts.policy, jax.random.key(seed), config=config, tx=tx, **more)


@cache
def learner(apply=TABLES, tx=ADAM, config=CONFIG):
    """The compiled step."""
    return jax.jit(partial(policy_algorithm.step, ppo, config=config, apply=apply, tx=tx), donate_argnums=0)


@cache
def updater(apply=TABLES, tx=ADAM, config=CONFIG):
    """The compiled update: its metrics are [epochs, minibatches]."""
    return jax.jit(partial(policy_algorithm.update, ppo, config=config, apply=apply, tx=tx))


def estimate(rollout, kl_coef=CONFIG.kl_coef, **changes):
    return ppo.estimate(rollout, kl_coef, config=dataclasses.replace(CONFIG, **changes))


# Two episodes: three tokens that end in EOS, and one token that does not. k1 is 1, -2, 0 and 2.
HAND = Rollout(
    prompt_BP=jnp.zeros((2, 1), int),
    prompt_mask_BP=jnp.ones((2, 1), bool),
    response_BR=jnp.array([[3, 4, EOS], [3, PAD, PAD]]),
    mask_BR=jnp.array([[1, 1, 1], [1, 0, 0]], bool),
    eos_B=jnp.array([True, False]),
    logp_BR=jnp.array([[-1.0, -3, -2], [-1, 0, 0]]),
    logp_ref_BR=jnp.array([[-2.0, -1, -2], [-3, 0, 0]]),
    kl_exact_BR=jnp.array([[0.5, 0.25, 0.25], [2, 0, 0]]),
    entropy_BR=jnp.array([[1.0, 2, 3], [2, 0, 0]]),
    values_BR=jnp.array([[1.0, 2, 3], [4, 0, 0]]),
    score_B=jnp.array([10.0, 7]),
)


def test_advantages_by_hand():
    """invariants 6 and 7: rewards are -.1 k1 each, and 10 on EOS, -1 on the last token where there is none.

    gamma = lambda = 1: the returns are their sums from each token on, the advantages returns less values.
    """
    done = estimate(HAND, 0.1, gamma=1.0, lam=1.0, whiten_advantages=False)
    np.testing.assert_allclose(done.returns_BR, [[10.1, 10.2, 10], [-1.2, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(done.advantages_BR, [[9.1, 8.2, 7], [-5.2, 0, 0]], rtol=1e-6)
    assert done.advantages_BR.dtype == jnp.float32


def test_whitened_advantages_leave_the_returns_alone():
    """invariant 9: mean 0 and variance 1 over the tokens of the batch."""
    plain, white = (estimate(HAND, 0.1, whiten_advantages=on) for on in (False, True))
    np.testing.assert_array_equal(white.returns_BR, plain.returns_BR)
    left = np.asarray(plain.advantages_BR)[HAND.mask_BR]
    np.testing.assert_allclose(white.advantages_BR[HAND.mask_BR], (left - left.mean()) / left.std(), rtol=1e-5)
    assert not white.advantages_BR[~HAND.mask_BR].any()


def test_whitened_rewards_keep_their_mean():
    """invariant 9: with lambda 0 and gamma 0, returns are the rewards."""
    plain, white = (estimate(HAND, 0.1, gamma=0, lam=0, whiten_rewards=on) for on in (False, True))
    rewards = np.asarray(plain.returns_BR)[HAND.mask_BR]
    np.testing.assert_allclose(rewards, [-0.1, 0.2, 10, -1.2], rtol=1e-5)
    expected = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    np.testing.assert_allclose(white.returns_BR[HAND.mask_BR], expected, rtol=1e-5)
    assert (CONFIG.whiten_rewards, CONFIG.whiten_advantages) == (False, True)


def test_metrics_by_hand():
    """invariant 15, and 6: KL in nats a sequence by each estimator, entropy in nats a token."""
    numbers = ppo.metrics(estimate(HAND, 0.1, gamma=1.0, lam=1.0), kl_coef=0.1, config=CONFIG)
    returns, values = np.array([10.1, 10.2, 10, -1.2]), np.array([1, 2, 3, 4])
    expected = {
        "score": 8.5,
        "score_final": 4.5,
        "score_total": 4.5 - 0.1 * (-1 + 2) / 2,
        "kl": (-1 + 2) / 2,
        "kl_k2": (0.5 + 2 + 0 + 2) / 2,
        "kl_k3": ((np.exp(-1) - 1 + 1) + (np.exp(2) - 1 - 2) + 0 + (np.exp(-2) - 1 + 2)) / 2,
        "kl_exact": (1 + 2) / 2,
        "kl_coef": 0.1,
        "entropy": (1 + 2 + 3 + 2) / 4,
        "eos_rate": 0.5,
        "length": 2,
        "value": 2.5,
        "returns": returns.mean(),
        "explained_variance": 1 - (returns - values).var() / returns.var(),
    }
    assert numbers.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(numbers[name], x, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("values, expected", [("returns", 1), ("constant", 0)])
def test_explained_variance(values, expected, tables):
    """invariant 15: 1 for a value network that knows the returns, 0 for one that says the same everywhere."""
    done = estimate(tables[1])
    done = done.replace(values_BR=done.returns_BR if values == "returns" else jnp.full((6, 4), 3.0))
    assert abs(ppo.metrics(done, kl_coef=0.1, config=CONFIG)["explained_variance"] - expected) < 1e-5


def test_loss_by_hand(tables):
    """The two losses of ops/losses.py, the value's times its coefficient."""
    parts, drawn = tables
    done = estimate(drawn)
    params = {"policy": parts.policy + 0.1, "value": parts.value + 0.1}
    params["policy"] = params["policy"].at[:, 2].add(0.7)
    loss, metrics = ppo.loss(params, done, config=CONFIG, apply=TABLES)
    inputs = (done.tokens_BT, done.attend_BT, 4)
    logp_BR = TablePolicy.logprobs(params["policy"], *inputs, temperature=0.7)
    policy, _ = losses.ppo_policy(logp_BR, done.logp_BR, done.advantages_BR, done.mask_BR, clip=0.2)
    values_BR = TableScalar.values(params["value"], *inputs)
    value, _ = losses.ppo_value(values_BR, done.values_BR, done.returns_BR, done.mask_BR, clip=0.2)
    np.testing.assert_allclose(loss, policy + 0.1 * value, rtol=1e-6)
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio", "ratio_square", "value_clip_fraction")
    assert metrics.keys() == {*names, "rows"}
    of_tokens = metrics["rows"]["policy_loss_BR"][done.mask_BR], metrics["rows"]["value_square_BR"][done.mask_BR] / 2
    np.testing.assert_allclose([x.mean() for x in of_tokens], [policy, value], rtol=1e-5)


def test_the_first_gradient_is_the_policy_gradient(tables):
    """invariant 16: at ratio 1; and the value network's is its own loss's, times the coefficient."""
    parts, drawn = tables
    done = estimate(drawn)
    params = {"policy": parts.policy, "value": parts.value}
    slope, _ = jax.grad(ppo.loss, has_aux=True)(params, done, config=CONFIG, apply=TABLES)
    inputs = (done.tokens_BT, done.attend_BT, 4)

    def policy_gradient(table):
        return losses.policy_gradient(
            TablePolicy.logprobs(table, *inputs, temperature=0.7), done.advantages_BR, done.mask_BR
        )

    def squared_error(table):
        return 0.1 / 2 * jnp.mean((TableScalar.values(table, *inputs) - done.returns_BR)[done.mask_BR] ** 2)

    np.testing.assert_allclose(slope["policy"], jax.grad(policy_gradient)(parts.policy), atol=1e-6)
    np.testing.assert_allclose(slope["value"], jax.grad(squared_error)(parts.value), atol=1e-6)
    assert jnp.abs(slope["policy"]).max() > 1e-2


def order(aux, done):
    """Which row each minibatch of one row was, [epochs, rows]: read off its value loss, where nothing moves."""
    loss_B = 0.5 * jnp.sum(jnp.where(done.mask_BR, done.values_BR - done.returns_BR, 0) ** 2, axis=1) / done.length_B
    return jnp.argmin(jnp.abs(aux["value_loss"][..., None] - loss_B), axis=-1)


def test_every_epoch_of_every_step_has_an_order_of_its_own(tables):
    """invariant 11: each a permutation of the rows, from the step's key."""
    parts, drawn = tables
    done = estimate(drawn)
    update = updater(tx=STILL, config=dataclasses.replace(CONFIG, epochs=5, minibatches=6))
    state, orders = begin(parts, STILL), []
    for _ in range(2):
        state, aux = update(state, done)
        orders += [tuple(epoch) for epoch in order(aux, done).tolist()]
    assert all(sorted(epoch) == list(range(6)) for epoch in orders)
    assert len(set(orders)) == 10
    _, again = update(begin(parts, STILL), done)
    assert [tuple(epoch) for epoch in order(again, done).tolist()] == orders[:5]
    _, other = update(begin(parts, STILL, seed=9), done)
    assert [tuple(epoch) for epoch in order(other, done).tolist()] != orders[:5]


@pytest.mark.parametrize("epochs, minibatches, microbatches", [(1, 1, 1), (2, 3, 1), (4, 2, 3)])
def test_optimizer_steps_are_epochs_times_minibatches(epochs, minibatches, microbatches, tables):
    """invariant 10: for the policy and for the value; microbatches are no steps."""
    parts, drawn = tables
    config = dataclasses.replace(CONFIG, epochs=epochs, minibatches=minibatches, microbatches=microbatches)
    state, aux = updater(config=config)(begin(parts), estimate(drawn))
    assert state.optimizer.keys() == {"policy", "value"}
    for optimizer in state.optimizer.values():
        counts = [x for path, x in jax.tree.leaves_with_path(optimizer) if "count" in jax.tree_util.keystr(path)]
        assert {int(count) for count in counts} == {epochs * minibatches}
    assert state.step == 1 and aux["ratio"].shape == (epochs, minibatches)


@pytest.mark.parametrize("microbatches", [2, 6])
def test_accumulation_is_the_full_batch(microbatches, tables):
    """invariant 8: episodes have 1 to 4 tokens; parameters and every metric are those of the whole minibatch."""
    parts, drawn = tables
    whole = dataclasses.replace(CONFIG, epochs=2, minibatches=1)
    one, one_metrics = learner(tx=SGD, config=whole)(begin(parts, SGD), drawn)
    config = dataclasses.replace(whole, microbatches=microbatches)
    more, metrics = learner(tx=SGD, config=config)(begin(parts, SGD), drawn)
    assert_trees_close((more.policy, more.value), (one.policy, one.value), 1e-5)
    assert_trees_close(metrics, one_metrics, 1e-5)


def test_old_log_probs_values_and_advantages_are_frozen(tables):
    """invariants 5 and 11: over the epochs of one rollout the ratio leaves 1 and the clip binds, for they stay."""
    parts, drawn = tables
    config = dataclasses.replace(CONFIG, epochs=6, minibatches=1)
    fast = optim.adamw(dataclasses.replace(config, lr=0.05), 100)
    _, aux = updater(tx=fast, config=config)(begin(parts), estimate(drawn))
    ratio, approx_kl, clip_fraction = (aux[f"{name}"][:, 0] for name in ("ratio", "approx_kl", "clip_fraction"))
    assert abs(ratio[0] - 1) <= 1e-5 and approx_kl[0] <= 1e-6 and clip_fraction[0] == 0
    assert (np.diff(approx_kl[:4]) > 0).all()
    assert clip_fraction[-1] > 0 and aux["value_clip_fraction"][-1, 0] > 0


def test_clipped_policies_go_no_further(tables):
    """invariant 11: against frozen log-probs a token's ratio ends near the clip, however many epochs there are."""
    parts, drawn = tables
    far = []
    for clip in 0.2, 1e9:
        config = dataclasses.replace(CONFIG, epochs=60, minibatches=1, clip=clip, value_coef=0.0)
        _, aux = updater(config=config)(begin(parts), estimate(drawn))
        far.append(float(aux["approx_kl"][-1, 0]))
    assert far[0] < 0.2 * far[1]


def test_reference_and_reward_stay(tables):
    """invariant 14: bit for bit; the policy and the value do not."""
    parts, drawn = tables
    learned = begin(parts)
    for _ in range(3):
        learned, _ = learner()(learned, drawn)
    np.testing.assert_array_equal(learned.reference, parts.policy)
    np.testing.assert_array_equal(learned.reward, parts.reward)
    assert (learned.policy != parts.policy).any() and (learned.value != parts.value).any()
    assert learned.key == jax.random.key(0)
    assert learned.step == 3


def test_a_step_is_reproducible(tables):
    """invariant 11: bit for bit."""
    parts, drawn = tables
    one, two = (learner()(begin(parts), drawn) for _ in range(2))
    assert_trees_equal(one[0].replace(key=()), two[0].replace(key=()))
    assert_trees_equal(one[1], two[1])


def test_what_is_rewarded_becomes_more_likely(tables):
    """The sign of everything at once: after token 2 only token 3 scores."""
    parts, drawn = tables
    drawn = drawn.replace(
        prompt_BP=jnp.full((6, 2), 2),
        response_BR=jnp.array([[3], [4], [3], [2], [3], [EOS]]),
        **{name: getattr(drawn, name)[:, :1] for name in ("kl_exact_BR", "entropy_BR")},
        mask_BR=jnp.ones((6, 1), bool),
        eos_B=jnp.ones(6, bool),
        score_B=jnp.array([1.0, 0, 1, 0, 1, 0]),
    )
    logp_BR = TablePolicy.logprobs(parts.policy, drawn.tokens_BT, drawn.attend_BT, 1, temperature=0.7)
    drawn = drawn.replace(logp_BR=logp_BR, logp_ref_BR=logp_BR, values_BR=jnp.full((6, 1), parts.value[2]))
    state, _ = learner()(begin(parts), drawn)
    before, after = (jax.nn.softmax(policy[2] / 0.7) for policy in (parts.policy, state.policy))
    assert after[3] > before[3] and (after[jnp.array([1, 2, 4])] < before[jnp.array([1, 2, 4])]).all()
    # What goes before is worth 1/2 on average, and the network comes nearer to it.
    assert abs(state.value[2] - 0.5) < abs(parts.value[2] - 0.5)


def test_the_kl_controller_is_in_the_state(tables):
    """What a step adapts is what the next one takes, and what a checkpoint holds."""
    parts, drawn = tables
    config = dataclasses.replace(CONFIG, kl_target=1e-3, kl_horizon=60)
    state = begin(parts, config=config)
    assert state.kl_coef == jnp.float32(0.05) and state.kl_coef.dtype == jnp.float32
    drawn = drawn.replace(logp_ref_BR=drawn.logp_BR - 0.5 * drawn.mask_BR)
    state, metrics = learner(config=config)(state, drawn)
    np.testing.assert_allclose(metrics["kl_coef"], 0.05)
    adapted = 0.05 * (1 + 0.2 * 6 / 60)
    np.testing.assert_allclose(state.kl_coef, adapted, rtol=1e-6)
    _, metrics = learner(config=config)(state, drawn)
    np.testing.assert_allclose(metrics["kl_coef"], adapted, rtol=1e-6)
    np.testing.assert_allclose(metrics["score_total"], metrics["score_final"] - adapted * metrics["kl"], rtol=1e-5)
    expected = ppo.metrics(estimate(drawn, adapted), kl_coef=adapted, config=CONFIG)
    np.testing.assert_allclose(metrics["returns"], expected["returns"], rtol=1e-5)


# From here on the policy is a GPT-2.


SAMPLING = generate.Sampling(max_tokens=8, eos_id=EOS, pad_id=PAD, temperature=CONFIG.temperature)


@cache
def collector(apply):
    """state, prompts -> a scored Rollout with values, compiled."""

    @jax.jit
    def collect(state, prompt_BP, prompt_mask_BP):
        prompts = (prompt_BP, prompt_mask_BP)
        drawn = rollout.draw(apply, state.policy, *prompts, rollout.keys(state, len(prompt_BP)), SAMPLING)
        judged = rollout.judge(apply, state, *prompts, drawn, SAMPLING)
        return judged.replace(score_B=rollout.score(apply, state.reward, judged, SAMPLING))

    return collect


@pytest.fixture(scope="module")
def models(apply, policy, scalar):
    reward = scalar | {"head": jax.tree.map(lambda x: 2 * x + 0.5, scalar["head"])}
    return SimpleNamespace(policy=policy, value=scalar, reward=reward)


@pytest.fixture(scope="module")
def drawn(apply, models, prompts):
    """A Rollout in which some rows end and some do not."""
    drawn = collector(apply)(begin(models), *prompts)
    assert 0 < drawn.eos_B.sum() < 6
    return drawn


def test_the_first_step_starts_at_no_kl_and_ratio_one(apply, models, drawn):
    """invariants 4 and 5: the sampler's log-probs are the learner's; the clip binds only later."""
    numbers = ppo.metrics(estimate(drawn), kl_coef=CONFIG.kl_coef, config=CONFIG)
    for name in "kl", "kl_k2", "kl_k3", "kl_exact":
        assert abs(numbers[name]) / numbers["length"] <= 1e-6
    _, aux = updater(apply)(begin(models), estimate(drawn))
    first = {name: x[0, 0] for name, x in aux.items() if name != "skipped"}
    assert abs(first["ratio"] - 1) <= 1e-5
    assert first["clip_fraction"] == 0 and 0 <= first["approx_kl"] <= 1e-6
    assert aux["clip_fraction"][-1].max() > 0 and aux["approx_kl"][-1].min() > 1e-4


def test_the_first_update_of_the_published_kind_can_be_traced(apply, models, drawn):
    """One minibatch, four epochs: the first is 0 up to rounding, the others rise, and the last is the mean of all."""
    config = dataclasses.replace(CONFIG, epochs=4, minibatches=1, trace_epochs=True)
    learn = jax.jit(partial(policy_algorithm.step, ppo, config=config, apply=apply, tx=ADAM))
    _, numbers = learn(begin(models), drawn.replace(advantages_BR=None, returns_BR=None))
    for name, first in ("approx_kl", 1e-6), ("clip_fraction", 0.0):
        traced = [float(numbers[f"{name}_epoch_{epoch}"]) for epoch in (1, 2, 3, 4)]
        assert 0 <= traced[0] <= first and traced == sorted(set(traced))
        assert traced[-1] == pytest.approx(float(numbers[name]), rel=1e-6)


@pytest.mark.parametrize("fill", [PAD, 17])
def test_padding_changes_no_metric(fill, apply, models, drawn):
    """invariant 1: columns more to the left of the prompt and to the right of the response, whatever is in them."""

    def pad(path, x):
        name = path[-1].name
        if x.ndim == 1:
            return x
        columns = (5, 0) if "prompt" in name else (0, 3)
        return jnp.pad(x, ((0, 0), columns), constant_values=0 if "mask" in name else fill)

    @jax.jit
    def read(x):
        score_B = rollout.score(apply, models.reward, x, SAMPLING)
        return rollout.value(apply, models.value, x).replace(score_B=score_B)

    wide = read(jax.tree.map_with_path(pad, drawn.replace(score_B=None)))
    narrow_state, narrow_metrics = learner(apply)(begin(models), drawn)
    wide_state, wide_metrics = learner(apply)(begin(models), wide)
    assert_trees_close(wide_metrics, narrow_metrics, atol=2e-5, rtol=2e-5)
    assert_trees_close((wide_state.policy, wide_state.value), (narrow_state.policy, narrow_state.value), 1e-4)


def test_an_update_without_padding_is_the_same(apply, models, drawn):
    """invariant 1: slices of like prompts, read at their own width."""
    drawn = drawn.replace(
        values_BR=rollout.value(apply, models.value, drawn).values_BR,
        prompt_BP=jnp.pad(drawn.prompt_BP, ((0, 0), (3, 0)), constant_values=17),
        prompt_mask_BP=jnp.pad(drawn.prompt_mask_BP, ((0, 0), (3, 0))),
    )
    narrow = dataclasses.replace(CONFIG, microbatches=2, widths=3, minibatches=1)
    wide = dataclasses.replace(CONFIG, minibatches=1)
    ours, expected = (learner(apply, config=config)(begin(models, config=config), drawn) for config in (narrow, wide))
    assert_trees_close(ours[1], expected[1], atol=2e-5, rtol=2e-5)
    assert_trees_close((ours[0].policy, ours[0].value), (expected[0].policy, expected[0].value), 1e-4)


def test_dropout_is_off(apply, models, drawn):
    """invariant 10: whatever rate the models were pretrained with."""
    config = dataclasses.replace(apply.policy.config, dropout=0.5)
    params, done = {"policy": models.policy, "value": models.value}, estimate(drawn)
    expected, actual = (
        jax.jit(partial(ppo.loss, config=CONFIG, apply=model))(params, done)
        for model in (apply, Apply(LanguageModel(config, chunk=apply.policy.chunk), ScalarModel(config)))
    )
    assert_trees_equal(actual, expected)


def test_the_same_seed_is_the_same_run(apply, models, prompts):
    """invariants 11 and 14: iterations of sampling and learning, bit for bit; each samples anew."""
    runs = []
    for seed in 0, 0, 1:
        state, responses = begin(models, seed=seed), []
        for _ in range(3):
            sampled = collector(apply)(state, *prompts)
            responses.append(sampled.response_BR)
            state, _ = learner(apply)(state, sampled)
        runs.append((state.policy, state.value, responses))
        assert_trees_equal(state.reference, models.policy)
        assert_trees_equal(state.reward, models.reward)
    assert_trees_equal(runs[0], runs[1])
    first, *later = runs[0][2]
    assert all((first != response).any() for response in later)
    assert (first != runs[2][2][0]).any()


def test_half_precision_is_of_the_activations_alone(apply, models, prompts):
    """Log-probs of sampler and learner are near each other, and all that is kept is float32."""
    config = dataclasses.replace(apply.policy.config, dtype="bfloat16", remat=True)
    half = Apply(LanguageModel(config), ScalarModel(config))
    drawn = collector(half)(begin(models), *prompts)
    logp_BR = jax.jit(half.policy.logprobs, static_argnums=3, static_argnames="temperature")(
        models.policy, drawn.tokens_BT, drawn.attend_BT, 8, temperature=CONFIG.temperature
    )
    np.testing.assert_allclose(jnp.where(drawn.mask_BR, logp_BR, 0), drawn.logp_BR, rtol=0, atol=0.02)
    exact_BR = apply.policy.logprobs(models.policy, drawn.tokens_BT, drawn.attend_BT, 8, temperature=CONFIG.temperature)
    assert 1e-3 < jnp.abs(jnp.where(drawn.mask_BR, exact_BR - logp_BR, 0)).max() < 0.2
    assert {x.dtype.name for x in (drawn.logp_BR, logp_BR, drawn.values_BR, drawn.score_B)} == {"float32"}
    state, numbers = learner(half)(begin(models), drawn)
    assert all(np.isfinite(value) for value in numbers.values())
    kept = jax.tree.leaves((state.policy, state.value, state.optimizer))
    assert {x.dtype.name for x in kept} == {"float32", "int32"} and all(np.isfinite(x).all() for x in kept)
    assert numbers["policy_grad_norm"] > 0 and numbers["value_grad_norm"] > 0


def test_it_compiles_once_and_may_be_donated(apply, models, prompts):
    """Sampling, too; and init copies, so that the trees it was given outlive the donated state."""
    shared = SimpleNamespace(policy=models.policy, value=models.value, reward=models.value)
    learn = jax.jit(partial(policy_algorithm.step, ppo, config=CONFIG, apply=apply, tx=ADAM), donate_argnums=0)
    collect = collector.__wrapped__(apply)
    state = begin(shared)
    for _ in range(3):
        donated = state
        state, _ = learn(state, collect(state, *prompts))
        assert donated.policy["wte"]["embedding"].is_deleted() and donated.reward["head"]["bias"].is_deleted()
    assert learn._cache_size() == collect._cache_size() == 1
    assert not any(x.is_deleted() for x in jax.tree.leaves((models.policy, models.value)))


def test_no_array_of_all_tokens_by_the_vocabulary(apply, models, drawn, prompts, most_tokens):
    """48 tokens are projected 8 at a time: no array has the vocabulary for more, in rollout or update."""
    for program in learner(apply).lower(begin(models), drawn), collector(apply).lower(begin(models), *prompts):
        assert most_tokens(program.as_text()) == most_tokens(program.compile().as_text()) == 8
    whole = Apply(LanguageModel(apply.policy.config), apply.scalar)
    program = learner(whole, config=dataclasses.replace(CONFIG, minibatches=1)).lower(begin(models), drawn)
    assert most_tokens(program.as_text()) == 48  # so it would be seen
