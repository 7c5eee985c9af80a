import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generate
from rlhf_jax.models import heads
from rlhf_jax.ops import logprobs
from tests.support import assert_trees_equal

PAD, EOS, A, B = range(4)
SURE = 50.0

run = jax.jit(generate.generate, static_argnums=(0, 5))


def follow(*pairs, vocabulary=4):
    """Bigram logits under which each token is followed by its partner, for sure."""
    table = jnp.zeros((vocabulary, vocabulary))
    for token, following in pairs:
        table = table.at[token, following].set(SURE)
    return table


def options(max_tokens, **changes):
    """A Sampling, at .7 unless another temperature is given: a temperature is part of a program."""
    return generate.Sampling(**{"max_tokens": max_tokens, "eos_id": EOS, "pad_id": PAD, "temperature": 0.7} | changes)


def keys(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


def complete(apply, policy, prompts, seed=0, max_tokens=8, **changes):
    return run(apply.policy, policy, *prompts, keys(len(prompts[0]), seed), options(max_tokens, **changes))


def test_by_hand(bigram):
    """invariant 13: A is followed by B and B by EOS; EOS is in the mask, the padding after it is not."""
    prompt_BP = jnp.array([[PAD, A], [A, B]])
    state = run(bigram, follow((A, B), (B, EOS)), prompt_BP, prompt_BP != PAD, keys(2), options(4))
    np.testing.assert_array_equal(state.response_BR, [[B, EOS, PAD, PAD], [EOS, PAD, PAD, PAD]])
    np.testing.assert_array_equal(state.mask_BR, [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(state.done_B, [1, 1])
    np.testing.assert_allclose(state.logp_BR, np.zeros((2, 4)), atol=1e-6)
    assert state.step == 2  # the loop ends when every row has
    assert state.response_BR.dtype == jnp.int32 and state.mask_BR.dtype == bool


def test_a_row_that_does_not_end(bigram):
    """invariants 7 and 13: cut at max_tokens, every token counts, and it is known not to have ended."""
    prompt_BP = jnp.array([[A]])
    state = run(bigram, follow((A, B), (B, A)), prompt_BP, prompt_BP != PAD, keys(1), options(3))
    np.testing.assert_array_equal(state.response_BR, [[B, A, B]])
    np.testing.assert_array_equal(state.mask_BR, [[1, 1, 1]])
    assert not state.done_B[0]


def test_eos_in_the_last_place_is_an_end(bigram):
    """invariant 13"""
    prompt_BP = jnp.array([[A]])
    state = run(bigram, follow((A, B), (B, EOS)), prompt_BP, prompt_BP != PAD, keys(1), options(2))
    np.testing.assert_array_equal(state.response_BR, [[B, EOS]])
    assert state.done_B[0] and state.mask_BR.all()


@pytest.mark.parametrize("lanes", [0, 1])
def test_several_ids_can_end_a_completion(lanes, bigram):
    """As Llama 3's and Qwen's: either ends it, is in the mask, and nothing comes after it."""
    C, END = 4, 5
    prompt_BP = jnp.array([[A], [C]])
    table = follow((A, B), (B, EOS), (C, END), (END, A), vocabulary=6)
    how = options(4, more_eos=(END,), lanes=lanes)
    state = run(bigram, table, prompt_BP, prompt_BP != PAD, keys(2), how)
    np.testing.assert_array_equal(state.response_BR, [[B, EOS, PAD, PAD], [END, PAD, PAD, PAD]])
    np.testing.assert_array_equal(state.mask_BR, [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(state.done_B, [1, 1])


def test_pad_drawn_by_the_policy_is_a_token_like_any_other(bigram):
    """invariant 13: only EOS ends a row, and a mask is never read off the ids."""
    prompt_BP = jnp.array([[A]])
    state = run(bigram, follow((A, PAD), (PAD, B), (B, EOS)), prompt_BP, prompt_BP != -1, keys(1), options(4))
    np.testing.assert_array_equal(state.response_BR, [[PAD, B, EOS, PAD]])
    np.testing.assert_array_equal(state.mask_BR, [[1, 1, 1, 0]])


def test_log_probs_by_hand(bigram):
    """invariant 3: weights 1 to 3, squared at temperature 1/2, is 1/10 to 9/10."""
    table = jnp.full((4, 4), -jnp.inf).at[:, A].set(0).at[:, B].set(jnp.log(3))
    prompt_BP = jnp.full((300, 1), A)
    state = run(bigram, table, prompt_BP, prompt_BP != PAD, keys(300), options(2, temperature=0.5))
    is_B_BR = state.response_BR == B
    np.testing.assert_allclose(state.logp_BR, np.log(np.where(is_B_BR, 0.9, 0.1)), rtol=1e-5)
    np.testing.assert_allclose(is_B_BR.mean(), 0.9, atol=0.05)


def test_the_logits_of_each_token_are_kept(apply, policy, prompts):
    """invariant 4: hidden_BRD[:, i] is the state that token i was drawn from."""
    state = complete(apply, policy, prompts)
    logits_BRV = apply.policy.logits(policy, state.hidden_BRD)
    expected_BR = logprobs.gather(logits_BRV, state.response_BR, temperature=0.7)
    np.testing.assert_allclose(state.logp_BR, jnp.where(state.mask_BR, expected_BR, 0), atol=1e-6)
    assert 0 < state.mask_BR.sum() < state.mask_BR.size  # some rows have ended, some tokens are padding


def test_after_the_end_there_is_nothing(apply, policy, prompts):
    """invariant 13"""
    state = complete(apply, policy, prompts, seed=1)
    mask_BR = np.asarray(state.mask_BR)
    assert (np.diff(mask_BR.astype(int), axis=1) <= 0).all()  # a prefix
    assert (np.asarray(state.response_BR)[~mask_BR] == PAD).all()
    assert (np.asarray(state.logp_BR)[~mask_BR] == 0).all()
    last_B = state.response_BR[jnp.arange(6), mask_BR.sum(axis=1) - 1]
    np.testing.assert_array_equal(last_B == EOS, state.done_B)
    assert ((np.asarray(state.response_BR) == EOS).sum(axis=1) == state.done_B).all()
    assert 0 < state.done_B.sum() < 6


def test_left_padding_changes_no_draw(apply, policy, prompts):
    """invariant 1"""
    wide = [jnp.pad(x, ((0, 0), (5, 0))) for x in prompts]
    narrow, padded = complete(apply, policy, prompts), complete(apply, policy, wide)
    np.testing.assert_array_equal(padded.response_BR, narrow.response_BR)
    np.testing.assert_allclose(padded.logp_BR, narrow.logp_BR, rtol=0, atol=1e-5)


def test_rows_draw_for_themselves(apply, policy, prompts):
    """invariant 11: with its key, a prompt is completed alike in whatever batch it is in."""
    config = options(8)
    together = run(apply.policy, policy, *prompts, keys(6), config)
    order = jnp.array([4, 2])
    apart = run(apply.policy, policy, *(x[order] for x in prompts), keys(6)[order], config)
    np.testing.assert_array_equal(apart.response_BR, together.response_BR[order])
    np.testing.assert_allclose(apart.logp_BR, together.logp_BR[order], rtol=0, atol=1e-5)


def test_another_key_another_completion(apply, policy, prompts):
    """invariant 11: the noise differs by key, by row and by place; the same key gives the same, bit for bit."""
    first, again, other = (complete(apply, policy, prompts, seed=seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first.replace(keys_B=()), again.replace(keys_B=()))
    assert (first.response_BR != other.response_BR).any()
    same_prompts = [jnp.tile(x[2:3], (50, 1)) for x in prompts]
    response_BR = complete(apply, policy, same_prompts).response_BR
    assert len({tuple(row) for row in response_BR.tolist()}) > 45


def test_places_draw_for_themselves(bigram):
    """invariant 11: one noise for all places would give one token over and over."""
    prompt_BP = jnp.full((4, 1), A)
    table = jnp.zeros((60, 60)).at[:, EOS].set(-jnp.inf)
    response_BR = run(bigram, table, prompt_BP, prompt_BP != PAD, keys(4), options(20)).response_BR
    assert min(len(set(row)) for row in response_BR.tolist()) > 10


def test_temperature_zero_is_greedy(apply, policy, prompts):
    state = complete(apply, policy, prompts, temperature=0)
    logits_BRV = apply.policy.logits(policy, state.hidden_BRD)
    expected_BR = jnp.where(state.mask_BR, jnp.argmax(logits_BRV, axis=-1), PAD)
    np.testing.assert_array_equal(state.response_BR, expected_BR)
    for narrowed in dict(top_k=1), dict(top_p=1e-6):
        same = complete(apply, policy, prompts, seed=5, **narrowed)
        np.testing.assert_array_equal(same.response_BR, expected_BR)


def streamed(model, tables, prompt, rows_B=None, **changes):
    """The Tokens of one row for each of the tables, in which all rows have the same noise."""
    source_B = np.arange(len(tables))
    rows_B = np.ones(len(tables), bool) if rows_B is None else rows_B
    keys_B, how = jax.random.split(jax.random.key(0), 1)[np.zeros(len(tables), int)], changes.pop("how", generate.How())
    sizes = {"max_tokens": 4, "eos_ids": (EOS,), "slots": 8} | changes
    prompt_1P = jnp.array([prompt])
    return list(
        generate.stream(model, tables, source_B, prompt_1P, prompt_1P != PAD, keys_B, how, rows_B=rows_B, **sizes)
    )


def test_models_side_by_side_by_hand(bigram):
    """The first writes B EOS, the second A A A A; each reads what the other writes, at odds of e^50 and of 1 to 4."""
    tables = follow((A, B), (B, EOS)), follow((A, A))
    tokens = streamed(bigram, tables, [PAD, A])
    np.testing.assert_array_equal([token.token_B for token in tokens[:2]], [[B, A], [EOS, A]])
    np.testing.assert_array_equal([token.mask_B for token in tokens], [[1, 1], [1, 1], [0, 1], [0, 1]])
    np.testing.assert_allclose(tokens[0].logp_MB, [[0, -SURE], [-SURE, 0]], atol=1e-5)
    np.testing.assert_allclose(tokens[0].kl_B, [SURE, SURE], rtol=1e-5)
    np.testing.assert_array_equal(tokens[0].best_MBC[:, :, 0], [[B, B], [A, A]])
    np.testing.assert_allclose(tokens[1].logp_MB[1, 0], np.log(1 / 4), rtol=1e-5)  # the second knows nothing of B
    assert len(streamed(bigram, tables[:1], [PAD, A])) == 2  # it ends with the last row
    assert len(streamed(bigram, tables[:1], [PAD, A], eos_ids=(EOS, B))) == 1


def test_the_same_noise_and_the_same_model_give_the_same_tokens(bigram):
    table = jax.random.normal(jax.random.key(1), (4, 4))
    for token in streamed(bigram, (table, table), [A]):
        assert token.token_B[0] == token.token_B[1] and (token.kl_B == 0).all()


def test_first_tokens_can_be_forced_and_rows_left_out(bigram):
    tables = follow((A, B), (B, EOS)), follow((A, A))
    tokens = streamed(bigram, tables, [A], np.array([False, True]), forced=(B, A))
    assert [token.token_B.tolist() for token in tokens[:3]] == [[B], [A], [A]]
    np.testing.assert_allclose(tokens[0].logp_MB, [[0], [-SURE]], atol=1e-5)


def test_a_free_lane_takes_the_next_prompt(bigram):
    """By hand, with two lanes for completions of 4, 2, 2 and 2 tokens: the first tokens come with the prompts, and
    while the first lane reads its other three the second does the rest."""
    C, D = 4, 5
    table = follow((A, B), (B, C), (C, D), (D, EOS), vocabulary=6)
    prompt_BP = jnp.array([[A], [C], [C], [C]])
    state = run(bigram, table, prompt_BP, prompt_BP != PAD, keys(4), options(5, lanes=2))
    np.testing.assert_array_equal(state.response_BR, [[B, C, D, EOS, PAD]] + [[D, EOS, PAD, PAD, PAD]] * 3)
    np.testing.assert_array_equal(state.mask_BR.sum(axis=1), [4, 2, 2, 2])
    assert state.step == 3 and state.done_B.all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_lanes_change_no_completion(lanes, seed, apply, policy, prompts):
    """invariant 11: a prompt has its tokens, log-probs and states whatever lane it is in, and whenever."""
    many = [jnp.tile(x, (4, 1)) for x in prompts]
    whole, laned = (complete(apply, policy, many, seed, lanes=n) for n in (0, lanes))
    assert 0 < whole.done_B.sum() < 24 and len(set(whole.mask_BR.sum(axis=1).tolist())) > 4  # ends of all kinds
    for name in ("response_BR", "mask_BR", "done_B"):
        np.testing.assert_array_equal(getattr(laned, name), getattr(whole, name))
    np.testing.assert_allclose(laned.logp_BR, whole.logp_BR, rtol=0, atol=1e-5)
    real_BR1 = whole.mask_BR[..., None]
    np.testing.assert_allclose(laned.hidden_BRD * real_BR1, whole.hidden_BRD * real_BR1, rtol=0, atol=1e-5)
    assert laned.step >= whole.mask_BR.sum(axis=1).max() - 1


def test_prompts_may_be_read_without_padding(apply, policy, prompts):
    """invariant 1: into lanes, the short ones first."""
    many = [jnp.tile(jnp.pad(x, ((0, 0), (3, 0))), (4, 1)) for x in prompts]
    whole, narrow = (complete(apply, policy, many, lanes=n, widths=n or 1) for n in (0, 4))
    np.testing.assert_array_equal(narrow.response_BR, whole.response_BR)
    np.testing.assert_allclose(narrow.logp_BR, whole.logp_BR, rtol=0, atol=1e-5)


def test_one_token_needs_no_lane(apply, policy, prompts):
    whole, laned = (complete(apply, policy, prompts, max_tokens=1, lanes=n) for n in (0, 2))
    np.testing.assert_array_equal(laned.response_BR, whole.response_BR)
    assert laned.step == 0


def test_lanes_must_divide_the_prompts(apply, policy, prompts):
    with pytest.raises(ValueError, match="lanes: expected a divisor of 6 prompts, got 4"):
        complete(apply, policy, prompts, lanes=4)


def test_settings_are_compared_by_value():
    """They are static arguments: equal ones must not compile again."""
    assert hash(options(8)) == hash(options(8)) and options(8) == options(8)
    assert dataclasses.replace(options(8), temperature=0.8) != options(8)


def test_weights_are_cast_once_not_at_every_token(apply, policy, prompts):
    """The loop gets its matrices in the type of the activations, and the results are those of casting in each step."""
    model = dataclasses.replace(apply.policy, config=dataclasses.replace(apply.policy.config, dtype="bfloat16"))

    class Late(heads.LanguageModel):
        def cast(self, params):
            return params

    late = Late(model.config, model.chunk)
    sampled, other = (
        run(each, policy, *prompts, keys(6), options(4)).replace(cache=None, keys_B=None) for each in (model, late)
    )
    assert_trees_equal(sampled, other)

    def matrices(model):
        program = jax.make_jaxpr(lambda params: generate.generate(model, params, *prompts, keys(6), options(4)))(policy)
        (loop,) = (eqn for eqn in program.eqns if eqn.primitive.name == "while")
        widths = {model.config.width, 4 * model.config.width, model.config.vocab_size}
        return {var.aval.dtype for var in loop.invars if var.aval.ndim == 2 and var.aval.shape[0] in widths}

    assert matrices(model) == {jnp.dtype("bfloat16")} != matrices(late)


# Groups


@pytest.mark.parametrize(("lanes", "widths"), [(0, 1), (6, 2)])
def test_a_group_shares_the_reading_of_its_prompt_and_nothing_else(lanes, widths, apply, policy, prompts):
    """Two rows a prompt: the same completions as when each row reads it."""
    twice = [jnp.repeat(x, 2, axis=0) for x in prompts]
    alone = run(apply.policy, policy, *twice, keys(12), options(8))
    shared = run(apply.policy, policy, *twice, keys(12), options(8, group=2, lanes=lanes, widths=widths))
    for field in "response_BR", "mask_BR", "done_B":
        np.testing.assert_array_equal(getattr(shared, field), getattr(alone, field))
    np.testing.assert_allclose(shared.logp_BR, alone.logp_BR, rtol=0, atol=1e-5)
    assert len({tuple(row) for row in np.asarray(shared.response_BR).tolist()}) == 12  # each row has its own noise
