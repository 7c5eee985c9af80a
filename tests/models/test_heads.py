import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rlhf_jax.models import decoder
from rlhf_jax.models.families import neox
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.ops import kl
from rlhf_jax.ops.logprobs import before, entropy

logprobs = jax.jit(LanguageModel.logprobs, static_argnums=(0, 4), static_argnames="temperature")
compare = jax.jit(LanguageModel.compare, static_argnums=0, static_argnames="temperature")
score = jax.jit(ScalarModel.score, static_argnums=0)
values = jax.jit(ScalarModel.values, static_argnums=(0, 4))


@partial(jax.jit, static_argnums=0)
def logits(model, params, tokens_BT, mask_BT):
    return model.logits(params, model.hidden(params, tokens_BT, mask_BT))


@partial(jax.jit, static_argnums=0)
def before_response(model, params, tokens_BT, mask_BT):
    """The hidden states that predict the 5 tokens of the response."""
    return before(model.hidden(params, tokens_BT, mask_BT), 5)


exact_kl = jax.jit(kl.exact)


@pytest.fixture(scope="module")
def sequences(prompts):
    """The six prompts, each with a response of up to 5 tokens after it: (tokens_BT, mask_BT), R = 5."""
    prompt_BP, prompt_mask_BP = prompts
    response_BR = jax.random.randint(jax.random.key(0), (6, 5), 2, 29)
    mask_BR = jnp.arange(5) < jnp.array([5, 1, 3, 5, 2, 4])[:, None]
    tokens_BT = jnp.concatenate([prompt_BP, jnp.where(mask_BR, response_BR, 0)], axis=1)
    return tokens_BT, jnp.concatenate([prompt_mask_BP, mask_BR], axis=1)


def test_the_head_is_the_token_embedding(apply, policy):
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16))
    expected = np.asarray(hidden, np.float64) @ np.asarray(policy["wte"]["embedding"], np.float64).T
    np.testing.assert_allclose(apply.policy.logits(policy, hidden), expected, atol=1e-5)


@pytest.fixture(scope="module")
def untied(apply):
    return LanguageModel(dataclasses.replace(apply.policy.config, layers=1, tied=False))


def test_an_untied_head_is_a_table_of_its_own(untied):
    params = jax.jit(untied.init)(jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 3, 16))
    expected = np.asarray(hidden, np.float64) @ np.asarray(params["unembed"]["embedding"], np.float64).T
    np.testing.assert_allclose(untied.logits(params, hidden), expected, atol=1e-5)
    assert not np.allclose(params["unembed"]["embedding"], params["wte"]["embedding"])
    np.testing.assert_allclose(params["unembed"]["embedding"].std(), untied.config.init_std, rtol=0.1)


def test_a_scalar_model_leaves_the_untied_head_behind(untied):
    """A scalar model never reads it."""
    params, scalar = jax.jit(untied.init)(jax.random.key(0)), ScalarModel(untied.config)
    for tree in scalar.init(jax.random.key(1), params), scalar.zero_head(params):
        assert tree["trunk"].keys() == params.keys() - {"unembed"}
        assert tree["trunk"]["wte"] is params["wte"]


@pytest.mark.parametrize("count, temperature", [(1, 0.7), (5, 0.7), (5, 1.0), (10, 1.0)])
def test_logprobs_are_of_the_last_tokens_given_those_before(count, temperature, apply, policy, sequences):
    """invariants 2 and 3: entry i is token T - count + i, read one position before it; the first one is not lost."""
    tokens_BT, mask_BT = sequences
    every_BTV = scipy.special.log_softmax(logits(apply.policy, policy, tokens_BT, mask_BT) / temperature, axis=-1)
    actual = logprobs(apply.policy, policy, tokens_BT, mask_BT, count, temperature=temperature)
    assert actual.shape == (6, count)
    for i, t in enumerate(range(11 - count, 11)):
        expected_B = every_BTV[np.arange(6), t - 1, np.asarray(tokens_BT)[:, t]]
        np.testing.assert_allclose(actual[:, i], expected_B, rtol=0, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def slope(model, params, tokens_BT, mask_BT):
    return jax.value_and_grad(lambda params: model.logprobs(params, tokens_BT, mask_BT, 5).sum())(params)


@pytest.mark.parametrize("chunk", [7, 29, 30])
def test_chunks_change_neither_logprobs_nor_gradients(chunk, apply, policy, sequences):
    """30 tokens, 5 of each row; below the head, one layer is as good as two."""
    config = dataclasses.replace(apply.policy.config, layers=1)
    params = {name: x for name, x in policy.items() if name != "h_1"}
    expected, actual = (slope(LanguageModel(config, chunk=c), params, *sequences) for c in (1000, chunk))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature, chunk", [(0.7, 7), (1.0, 2048)])
def test_compare(temperature, chunk, apply, policy, reference, sequences):
    """invariant 3: the reference's log-probs, the exact KL and the policy's entropy, all at the temperature."""
    tokens_BT, mask_BT = sequences
    model = LanguageModel(apply.policy.config, chunk=chunk)
    hidden = [before_response(model, params, *sequences) for params in (policy, reference)]
    ours, theirs = (before(logits(model, params, *sequences), 5) / temperature for params in (policy, reference))
    logp_ref, exact, spread = compare(
        model, policy, hidden[0], reference, hidden[1], tokens_BT[:, -5:], temperature=temperature
    )
    expected = logprobs(model, reference, tokens_BT, mask_BT, 5, temperature=temperature)
    np.testing.assert_allclose(logp_ref, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(exact, exact_kl(ours, theirs), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spread, jax.jit(entropy)(ours), rtol=1e-5, atol=1e-5)
    assert exact.min() > 0.1 and not np.allclose(exact, exact_kl(theirs, ours), rtol=0.01)


@pytest.mark.parametrize("changes", [{}, neox.NEOX | {"context": 40}, {"remat": True}], ids=["gpt2", "neox", "remat"])
def test_tokens_that_are_not_selected_are_not_needed(changes, apply, sequences):
    """The last layer computes only the selected tokens: same states, same gradients."""
    model = LanguageModel(dataclasses.replace(apply.policy.config, **changes))
    params, weights = jax.jit(model.init)(jax.random.key(3)), jax.random.normal(jax.random.key(4), (6, 5, 16))

    def some(params):
        return jnp.vdot(model.hidden(params, *sequences, 5), weights)

    def among_all(params):
        return jnp.vdot(before(model.hidden(params, *sequences), 5), weights)

    ours, all_of_them = (jax.jit(jax.value_and_grad(f))(params) for f in (some, among_all))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(all_of_them), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_prefill_and_decode_read_what_hidden_reads(apply, policy, prompts, sequences):
    """invariant 4: one token at a time, with rows that have ended among them."""
    tokens_BT, mask_BT = sequences
    whole_BTD = jax.jit(apply.policy.hidden)(policy, tokens_BT, mask_BT)
    hidden_BD, cache = jax.jit(apply.policy.prefill, static_argnums=3)(policy, *prompts, 11)
    np.testing.assert_allclose(hidden_BD, whole_BTD[:, 5], rtol=0, atol=1e-5)
    decode = jax.jit(apply.policy.decode)
    for t in range(6, 11):
        hidden_BD, cache = decode(policy, tokens_BT[:, t], mask_BT[:, t], cache)
        alive_B = mask_BT[:, t]
        np.testing.assert_allclose(hidden_BD[alive_B], whole_BTD[:, t][alive_B], rtol=0, atol=1e-5)


def test_scalar_head_starts_small(apply, policy):
    """invariant 12: N(0, 1/sqrt(D + 1)), bias 0, on the trunk given."""
    wide = ScalarModel(decoder.Config(width=10_000)).init(jax.random.key(0), "trunk")
    np.testing.assert_allclose(wide["head"]["kernel"].std() * 10_001**0.5, 1, atol=0.03)
    np.testing.assert_allclose(wide["head"]["kernel"].mean() * 10_001**0.5, 0, atol=0.05)
    assert wide["head"]["bias"] == 0 and wide["trunk"] == "trunk"
    keys = jax.random.split(jax.random.key(0), 10_000)
    heads = jax.vmap(lambda key: apply.scalar.init(key, policy)["head"]["kernel"])(keys)
    np.testing.assert_allclose(heads.std(), 1 / 17**0.5, rtol=0.01)  # 1/sqrt(16) is 3% more


def test_zero_head_returns_zero(apply, policy, sequences):
    """invariant 12: a value network may start from the SFT trunk with a zero head."""
    params = apply.scalar.zero_head(policy)
    np.testing.assert_array_equal(values(apply.scalar, params, *sequences, 5), np.zeros((6, 5)))
    assert params["trunk"] is policy


def test_score_is_read_at_the_last_real_token(apply, scalar, sequences):
    """invariant 12: at EOS, not at the padding after it, nor one before."""
    tokens_BT, mask_BT = sequences
    hidden_BTD = jax.jit(LanguageModel(apply.scalar.config).hidden)(scalar["trunk"], tokens_BT, mask_BT)
    at_BT = apply.scalar.read(scalar, hidden_BTD)
    last_B = [11 - 1 - empty for empty in (0, 4, 2, 0, 3, 1)]
    score_B = score(apply.scalar, scalar, tokens_BT, mask_BT)
    assert score_B.dtype == jnp.float32
    np.testing.assert_allclose(score_B, at_BT[jnp.arange(6), jnp.array(last_B)], rtol=0, atol=1e-5)


def test_padding_changes_no_score(apply, scalar, sequences):
    """invariant 1: neither its width on either side nor its tokens."""
    tokens_BT, mask_BT = sequences
    wide = (
        jnp.pad(jnp.where(mask_BT, tokens_BT, 17), ((0, 0), (3, 2)), constant_values=17),
        jnp.pad(mask_BT, ((0, 0), (3, 2))),
    )
    expected = score(apply.scalar, scalar, tokens_BT, mask_BT)
    np.testing.assert_allclose(score(apply.scalar, scalar, *wide), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("i", range(5))
def test_a_value_is_before_its_token(i, apply, scalar, sequences):
    """invariant 2: values_BR[:, i] has not seen response token i, and has seen the one before."""
    tokens_BT, mask_BT = sequences
    changed_BT = tokens_BT.at[:, 6 + i].set((tokens_BT[:, 6 + i] + 1) % 29)
    before_BR, after_BR = (values(apply.scalar, scalar, tokens, mask_BT, 5) for tokens in (tokens_BT, changed_BT))
    difference_BR = jnp.abs(after_BR - before_BR)
    assert difference_BR.shape == (6, 5)
    np.testing.assert_array_equal(difference_BR[:, : i + 1], np.zeros((6, i + 1)))
    if i < 4:
        assert difference_BR[0, i + 1] > 1e-3  # row 0 is all real


def test_normalized_scores_have_mean_zero_and_std_one(apply, scalar, sequences):
    """invariant 12: gain and bias are folded into the head, whose bias has been trained; the trunk is not touched."""
    scalar = {**scalar, "head": scalar["head"] | {"bias": jnp.float32(0.5)}}
    score_B = score(apply.scalar, scalar, *sequences)
    assert abs(score_B.mean()) > 0.1 and abs(score_B.std() - 1) > 0.1
    params = apply.scalar.normalize(scalar, score_B.mean(), score_B.std())
    params = apply.scalar.normalize(params, 0.0, 1.0)  # and once more changes nothing
    normalized_B = score(apply.scalar, params, *sequences)
    np.testing.assert_allclose(normalized_B, (score_B - score_B.mean()) / score_B.std(), atol=1e-5)
    np.testing.assert_allclose([normalized_B.mean(), normalized_B.std()], [0, 1], atol=1e-5)
    assert params["trunk"] is scalar["trunk"]
