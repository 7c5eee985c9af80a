from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generate, rollout
from rlhf_jax.ops import kl, logprobs
from rlhf_jax.rollout import Apply
from rlhf_jax.training.state import TrainState

PAD, EOS, A, B = range(4)


def sampling(max_tokens=8, **changes):
    return generate.Sampling(max_tokens=max_tokens, eos_id=EOS, pad_id=PAD, **changes)


@partial(jax.jit, static_argnums=(0, 6))
def sample(apply, policy, reference, prompt_BP, prompt_mask_BP, key, sampling):
    keys_B = jax.random.split(key, len(prompt_BP))
    drawn = rollout.draw(apply, policy, prompt_BP, prompt_mask_BP, keys_B, sampling)
    return rollout.compare(apply, policy, reference, prompt_BP, prompt_mask_BP, drawn, sampling)


score = jax.jit(rollout.score, static_argnums=(0, 3))
value = jax.jit(rollout.value, static_argnums=0)


@partial(jax.jit, static_argnums=(0, 3))
def learner(apply, policy, drawn, temperature):
    """The log-probs that the update computes."""
    R = drawn.mask_BR.shape[1]
    return apply.policy.logprobs(policy, drawn.tokens_BT, drawn.attend_BT, R, temperature=temperature)


@pytest.fixture(scope="module")
def drawn(apply, policy, reference, prompts):
    """A Rollout at temperature .7 in which some rows end and some do not."""
    drawn = sample(apply, policy, reference, *prompts, jax.random.key(0), sampling(temperature=0.7))
    assert 0 < drawn.eos_B.sum() < 6
    return drawn


def test_by_hand(bigram):
    """Both models are sure that B follows A; after B the policy is sure of EOS, the reference thinks it 1 in 4."""
    policy = jnp.zeros((4, 4)).at[A, B].set(50).at[B, EOS].set(50)
    reference = jnp.zeros((4, 4)).at[A, B].set(50)
    prompt_BP = jnp.array([[PAD, A], [A, B]])
    drawn = sample(Apply(bigram, None), policy, reference, prompt_BP, prompt_BP != PAD, jax.random.key(0), sampling(3))
    np.testing.assert_array_equal(drawn.tokens_BT, [[PAD, A, B, EOS, PAD], [A, B, EOS, PAD, PAD]])
    np.testing.assert_array_equal(drawn.attend_BT, [[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(drawn.mask_BR, [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(drawn.length_B, [2, 1])
    np.testing.assert_array_equal(drawn.eos_B, [1, 1])
    np.testing.assert_allclose(drawn.logp_BR, np.zeros((2, 3)), atol=1e-6)
    surprise = np.array([[0, np.log(4), 0], [np.log(4), 0, 0]])
    np.testing.assert_allclose(drawn.logp_ref_BR, -surprise, atol=1e-6)
    np.testing.assert_allclose(drawn.kl_BR, surprise, atol=1e-6)
    np.testing.assert_allclose(drawn.kl_exact_BR, surprise, atol=1e-6)
    np.testing.assert_allclose(drawn.entropy_BR, np.zeros((2, 3)), atol=1e-6)


@pytest.mark.parametrize("temperature, columns", [(0.7, 9), (2.0, 0)])  # below 1 and above
def test_sampler_and_learner_agree(temperature, columns, apply, policy, reference, prompts):
    """invariants 3 and 4: at any temperature, any padding."""
    wide = [jnp.pad(x, ((0, 0), (columns, 0))) for x in prompts]
    drawn = sample(apply, policy, reference, *wide, jax.random.key(0), sampling(temperature=temperature))
    logp_BR = learner(apply, policy, drawn, temperature)
    np.testing.assert_allclose(drawn.logp_BR[drawn.mask_BR], logp_BR[drawn.mask_BR], rtol=0, atol=1e-4)
    assert drawn.mask_BR[:, 0].all()  # the first generated token is not lost


def test_the_reference_is_scored_at_the_temperature(apply, policy, reference, drawn):
    """invariant 3: not at 1, and on the same tokens."""
    mask_BR = drawn.mask_BR
    expected_BR = learner(apply, reference, drawn, 0.7)
    np.testing.assert_allclose(drawn.logp_ref_BR[mask_BR], expected_BR[mask_BR], rtol=0, atol=1e-4)
    assert jnp.abs(expected_BR - learner(apply, reference, drawn, 1.0))[mask_BR].max() > 0.1


def test_exact_kl_and_entropy_are_at_the_temperature(apply, policy, reference, drawn):
    """invariants 3 and 15"""
    tokens_BT, attend_BT, mask_BR = drawn.tokens_BT, drawn.attend_BT, drawn.mask_BR

    @jax.jit
    def logits(params):
        return apply.policy.logits(params, logprobs.before(apply.policy.hidden(params, tokens_BT, attend_BT), 8)) / 0.7

    ours_BRV, theirs_BRV = logits(policy), logits(reference)
    kl_BR, entropy_BR = kl.exact(ours_BRV, theirs_BRV), logprobs.entropy(ours_BRV)
    np.testing.assert_allclose(drawn.kl_exact_BR[mask_BR], kl_BR[mask_BR], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(drawn.entropy_BR[mask_BR], entropy_BR[mask_BR], rtol=1e-3, atol=1e-5)
    assert (drawn.kl_exact_BR >= 0).all() and (drawn.entropy_BR >= 0).all()


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_policy_that_is_its_reference_has_no_kl(temperature, apply, policy, prompts):
    """invariant 5: by each estimator, with a decoding cache on one side and none on the other."""
    drawn = sample(apply, policy, policy, *prompts, jax.random.key(0), sampling(temperature=temperature))
    logp_BR, logp_ref_BR = drawn.logp_BR, drawn.logp_ref_BR
    assert abs(jnp.sum(kl.k1(logp_BR, logp_ref_BR)) / drawn.mask_BR.sum()) <= 1e-6
    for kl_BR in kl.k2(logp_BR, logp_ref_BR), kl.k3(logp_BR, logp_ref_BR), drawn.kl_exact_BR:
        assert kl_BR.max() <= 1e-6


def test_k1_and_k3_estimate_the_exact_kl(bigram):
    """invariant 15: over many draws of one token their means are the full-vocabulary KL."""
    policy, reference = jax.random.normal(jax.random.key(0), (2, 5, 5))
    prompt_BP = jnp.full((20_000, 1), A)
    apply, once = Apply(bigram, None), sampling(1, temperature=0.7)
    drawn = sample(apply, policy, reference, prompt_BP, prompt_BP != PAD, jax.random.key(1), once)
    exact = drawn.kl_exact_BR[0, 0]
    for estimate in kl.k1, kl.k3:
        kl_BR = estimate(drawn.logp_BR, drawn.logp_ref_BR)
        np.testing.assert_allclose(kl_BR.mean(), exact, atol=4 * kl_BR.std() / 20_000**0.5)


def test_what_is_no_response_token_is_zero(apply, scalar, drawn):
    """invariant 8"""
    valued = value(apply, scalar, drawn)
    assert not drawn.mask_BR.all()
    for x_BR in drawn.logp_BR, drawn.logp_ref_BR, drawn.kl_exact_BR, drawn.entropy_BR, valued.values_BR, drawn.kl_BR:
        assert x_BR.shape == (6, 8) and not x_BR[~drawn.mask_BR].any()
    assert valued.values_BR[drawn.mask_BR].all()


@pytest.mark.parametrize(("lanes", "widths"), [(6, 1), (1, 1), (0, 2), (3, 3), (2, 6)])
def test_a_rollout_may_be_made_in_turn(lanes, widths, apply, policy, reference, scalar, prompts, drawn):
    """Its rows are those of the parts it is made of, in their order, however many are at work at a time, and however
    wide the prompts are that are read."""
    state = TrainState.create(jax.random.key(0), policy=policy, reference=reference, value=scalar, reward=scalar)
    keys_B = jax.random.split(jax.random.key(0), 6)
    how = sampling(temperature=0.7, lanes=lanes, widths=widths)
    written = jax.jit(rollout.draw, static_argnums=(0, 5))(apply, policy, *prompts, keys_B, how)
    judged = jax.jit(rollout.judge, static_argnums=(0, 5))(apply, state, *prompts, written, how)
    judged = judged.replace(score_B=score(apply, scalar, judged, how))
    expected = value(apply, scalar, drawn).replace(score_B=score(apply, scalar, drawn, sampling()))
    for (path, x), y in zip(jax.tree.leaves_with_path(judged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5, err_msg=str(path))


def test_scores_and_values_read_the_whole_sequence(apply, scalar, drawn):
    """invariants 6 and 12: the score at the last response token, in float32; the value before each."""
    tokens_BT, attend_BT = drawn.tokens_BT, drawn.attend_BT
    score_B = score(apply, scalar, drawn, sampling())
    assert score_B.dtype == jnp.float32 and (score_B != jnp.round(score_B)).all()
    read = jax.jit(apply.scalar.score)
    np.testing.assert_allclose(score_B, read(scalar, tokens_BT, attend_BT), rtol=0, atol=1e-5)
    # the value before token i is the score of the text up to token i - 1
    values_BR = value(apply, scalar, drawn).values_BR
    for i in range(3):
        so_far_B = read(scalar, tokens_BT[:, : 6 + i], attend_BT[:, : 6 + i])
        here_B = drawn.mask_BR[:, i]
        np.testing.assert_allclose(values_BR[here_B, i], so_far_B[here_B], rtol=0, atol=1e-5)


def test_left_padding_changes_nothing(apply, policy, reference, scalar, prompts, drawn):
    """invariant 1"""
    wide = [jnp.pad(x, ((0, 0), (9, 0))) for x in prompts]
    padded = sample(apply, policy, reference, *wide, jax.random.key(0), sampling(temperature=0.7))
    padded, narrow = (
        value(apply, scalar, x).replace(score_B=score(apply, scalar, x, sampling())) for x in (padded, drawn)
    )
    for name in "response_BR", "mask_BR", "eos_B":
        np.testing.assert_array_equal(getattr(padded, name), getattr(narrow, name))
    for name in "logp_BR", "logp_ref_BR", "kl_exact_BR", "entropy_BR", "values_BR", "score_B":
        np.testing.assert_allclose(getattr(padded, name), getattr(narrow, name), rtol=0, atol=2e-5, err_msg=name)


def test_the_noise_is_the_keys(apply, policy, reference, prompts, drawn):
    """invariant 11: the same key gives the same rollout bit for bit, another key another; so do rows of one prompt."""
    again = sample(apply, policy, reference, *prompts, jax.random.key(0), sampling(temperature=0.7))
    jax.tree.map(np.testing.assert_array_equal, again, drawn)
    other = sample(apply, policy, reference, *prompts, jax.random.key(1), sampling(temperature=0.7))
    assert (other.response_BR != drawn.response_BR).any()
    same_prompts = [jnp.tile(x[2:3], (6, 1)) for x in prompts]
    alike = sample(apply, policy, reference, *same_prompts, jax.random.key(0), sampling(temperature=0.7))
    assert len({tuple(row) for row in alike.response_BR.tolist()}) == 6
