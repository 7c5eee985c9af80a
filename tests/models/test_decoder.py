import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import fields, generate
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, families
from rlhf_jax.models.families import neox
from rlhf_jax.models.families.llama import LLAMA
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.ops import attention

PAD = 0


# A layer with all that GPT-2 lacks: two heads read one of keys and values, and a token sees three before it.
LLAMA: dict = LLAMA | dict(layers=1, kv_heads=1, head_size=6, feed_forward_size=20, qk_norm=True, window=4, context=40)
LLAMA |= dict(rotary_factor=8.0, rotary_context=20)


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama"])
def model(request, apply):
    """The tiny GPT-2 of all tests, one layer of a GPT-NeoX that rotates 4 of the 7 entries of a head, and LLAMA."""
    if request.param == "gpt2":
        return apply.policy
    if request.param == "llama":
        return LanguageModel(dataclasses.replace(apply.policy.config, **LLAMA))
    changes = neox.NEOX | {"context": 40, "rotary_share": 0.6, "layers": 1}
    return LanguageModel(dataclasses.replace(apply.policy.config, **changes))


@pytest.fixture(scope="module")
def params(model, apply, policy):
    """Parameters far from small initial ones, with which all tokens are about equally likely."""
    if model is apply.policy:
        return policy
    draw, shapes = np.random.default_rng(int(model.config.qk_norm)), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: draw.normal(0, 0.5, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def sequences():
    """Rows of 1, 4 and 7 real tokens, left-padded: (tokens_BT, mask_BT)."""
    tokens_BT = jax.random.randint(jax.random.key(0), (3, 7), 1, 29)
    mask_BT = jnp.arange(7) >= jnp.array([[6], [3], [0]])
    return jnp.where(mask_BT, tokens_BT, PAD), mask_BT


@pytest.fixture(scope="module")
def logits(model, params):
    """(tokens_BT, mask_BT) -> logits_BTV."""
    read = jax.jit(lambda params, tokens, mask: model.logits(params, model.hidden(params, tokens, mask)))
    return partial(read, params)


def left(x_BT, columns, fill):
    return jnp.pad(x_BT, ((0, 0), (columns, 0)), constant_values=fill)


def test_the_models_of_these_tests_tell_tokens_apart(logits, sequences):
    """Otherwise padding and order could not change a result."""
    tokens_BT, mask_BT = sequences
    logits_BTV = logits(tokens_BT, mask_BT)
    assert logits_BTV.std(axis=-1).min() > 0.5
    swapped_BT = tokens_BT.at[:, [-3, -2]].set(tokens_BT[:, [-2, -3]])
    assert jnp.abs(logits(swapped_BT, mask_BT) - logits_BTV)[2, -1].max() > 0.05


@pytest.mark.parametrize("columns, fill", [(5, PAD), (33, PAD), (5, 17)])
def test_left_padding_changes_no_logits(columns, fill, logits, sequences):
    """invariant 1: those of real tokens, whatever the padding holds; 7 + 33 columns fill the context."""
    tokens_BT, mask_BT = sequences
    expected = logits(tokens_BT, mask_BT)[mask_BT]
    actual = logits(left(tokens_BT, columns, fill), left(mask_BT, columns, 0))[:, columns:][mask_BT]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_padded_row_gets_the_logits_it_has_alone(logits, sequences):
    """invariant 1: position ids count real tokens only."""
    tokens_BT, mask_BT = sequences
    alone = logits(tokens_BT[1:2, 3:], jnp.ones((1, 4), bool))
    np.testing.assert_allclose(logits(tokens_BT, mask_BT)[1, 3:], alone[0], rtol=0, atol=1e-5)


def test_right_padding_changes_no_logits(logits, sequences):
    """invariant 1: nor do the columns after a response that has ended."""
    tokens_BT, mask_BT = sequences
    wide = (jnp.pad(tokens_BT, ((0, 0), (0, 5)), constant_values=17), jnp.pad(mask_BT, ((0, 0), (0, 5))))
    np.testing.assert_allclose(logits(*wide)[:, :7][mask_BT], logits(tokens_BT, mask_BT)[mask_BT], rtol=0, atol=1e-5)


def test_columns_may_exceed_the_context_when_tokens_do_not(model, params, logits, sequences):
    """invariant 1"""
    tokens_BT, mask_BT = sequences
    columns = model.config.context
    actual = logits(left(tokens_BT, columns, PAD), left(mask_BT, columns, 0))[:, columns:][mask_BT]
    np.testing.assert_allclose(actual, logits(tokens_BT, mask_BT)[mask_BT], rtol=0, atol=1e-5)


def test_a_position_beyond_the_context_is_an_error(model, params):
    """invariant 17: not NaN, compiled or not."""
    tokens_BT = jnp.full((1, model.config.context + 1), 3)
    message = f"model.context: expected at least {model.config.context + 1}, the tokens of a row, got "
    with pytest.raises(InputError, match=message):
        model.hidden(params, tokens_BT, jnp.ones_like(tokens_BT))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.jit(model.hidden)(params, tokens_BT, jnp.ones_like(tokens_BT)))
        jax.effects_barrier()


@pytest.mark.parametrize("place", range(1, 7))
def test_no_token_sees_a_later_one(place, model, logits, sequences):
    """Nor, in a layer with a window, one before the window."""
    tokens_BT, mask_BT = sequences
    before = logits(tokens_BT, mask_BT)[2]
    after = logits(tokens_BT.at[2, place].set((tokens_BT[2, place] + 1) % 29), mask_BT)[2]
    np.testing.assert_array_equal(before[:place], after[:place])
    end = place + (model.config.window or 7)
    np.testing.assert_array_equal(before[end:], after[end:])
    assert (jnp.abs(before - after)[place:end].max(axis=-1) > 1e-3).all()


def test_a_row_of_padding_alone_is_finite(model, params):
    """Nothing to attend to gives no NaN, forward or back."""
    tokens_BT, mask_BT = jnp.zeros((2, 3), int), jnp.array([[0, 0, 0], [0, 1, 1]])

    def total(params):
        return model.logits(params, model.hidden(params, tokens_BT, mask_BT)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


@cache
def _read(config, slots):
    trunk = decoder.Decoder(config)
    return jax.jit(lambda params, *args: trunk.apply({"params": params}, *args, slots=slots))


_hidden = jax.jit(LanguageModel.hidden, static_argnums=(0, 4))


@pytest.mark.parametrize("parts", [(7,), (1, 1, 1, 1, 1, 1, 1), (2, 1, 4)])
def test_a_cache_changes_nothing(parts, model, params, sequences):
    """invariant 4: read in parts, with padding, the tokens have the same hidden states as read whole."""
    tokens_BT, mask_BT = sequences
    read = partial(_read(model.config, 9), params)
    cache, states, start = None, [], 0
    for length in parts:
        columns = slice(start, start + length)
        hidden, cache = read(tokens_BT[:, columns], mask_BT[:, columns], cache)
        states.append(hidden)
        start += length
    whole_BTD = _hidden(model, params, tokens_BT, mask_BT)
    np.testing.assert_allclose(jnp.concatenate(states, axis=1)[mask_BT], whole_BTD[mask_BT], rtol=0, atol=1e-5)
    assert cache.used == 7
    np.testing.assert_array_equal(cache.valid_BS, jnp.pad(mask_BT, ((0, 0), (0, 2))))


@pytest.mark.parametrize("model", ["neox"], indirect=True)  # test_rollout.py tests GPT-2
def test_the_log_probs_of_samples_are_the_learners(model, params, prompts):
    """invariant 4: read token by token with a cache, and read whole."""
    prompt_BP, mask_BP = prompts
    config = generate.Sampling(max_tokens=5, eos_id=1, pad_id=PAD, temperature=0.7)
    draw, read = (
        jax.jit(generate.generate, static_argnums=(0, 5)),
        jax.jit(LanguageModel.logprobs, static_argnums=(0, 4)),
    )
    drawn = draw(model, params, prompt_BP, mask_BP, jax.random.split(jax.random.key(0), len(prompt_BP)), config)
    tokens_BT = jnp.concatenate([prompt_BP, drawn.response_BR], axis=1)
    logp_BR = read(model, params, tokens_BT, jnp.concatenate([mask_BP, drawn.mask_BR], axis=1), 5, temperature=0.7)
    np.testing.assert_allclose(jnp.where(drawn.mask_BR, logp_BR, 0), drawn.logp_BR, rtol=0, atol=1e-4)


def test_a_cache_with_a_gap_changes_nothing(model, params):
    """invariants 1 and 4: a token that was read with mask 0 is not seen, and takes no position."""
    read = partial(_read(model.config, 4), params)
    _, cache = read(jnp.array([[5, 6, 17]]), jnp.array([[1, 1, 0]]))
    hidden, _ = read(jnp.array([[7]]), jnp.ones((1, 1)), cache)
    alone, _ = read(jnp.array([[5, 6, 7]]), jnp.ones((1, 3)))
    np.testing.assert_allclose(hidden[0, 0], alone[0, 2], rtol=0, atol=1e-5)


def count(config):
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("gpt2", 50_257, 124_439_808),
        ("gpt2-medium", 50_257, 354_823_168),
        ("gpt2-large", 50_257, 774_030_080),
        ("gpt2-xl", 50_257, 1_557_611_200),
        ("pythia-160m", 50_304, 162_322_944),
        ("pythia-410m", 50_304, 405_334_016),
        ("pythia-1b", 50_304, 1_011_781_632),
        ("smollm2-135m", 49_152, 134_515_008),
        ("smollm2-360m", 49_152, 361_821_120),
        ("smollm2-1.7b", 49_152, 1_711_376_384),
        ("tinyllama-1.1b", 32_000, 1_100_048_384),
        ("llama-2-7b", 32_000, 6_738_415_616),
        ("llama-3-8b", 128_256, 8_030_261_248),
        ("llama-3.2-1b", 128_256, 1_235_814_400),
        ("llama-3.2-3b", 128_256, 3_212_749_824),
        ("mistral-7b-v0.1", 32_000, 7_241_732_096),
        ("mistral-7b-v0.3", 32_768, 7_248_023_552),
        ("qwen2.5-0.5b", 151_936, 494_032_768),
        ("qwen2.5-1.5b", 151_936, 1_543_714_304),
        ("qwen3-0.6b", 151_936, 596_049_920),
        ("qwen3-1.7b", 151_936, 1_720_574_976),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, vocab_size, parameters):
    """Counted from one layer and two: all layers are alike."""
    config = families.preset(name, vocab_size=vocab_size)
    one, two = (count(dataclasses.replace(config, layers=layers)) for layers in (1, 2))
    assert one + (config.layers - 1) * (two - one) == parameters
    fields.check(config)
    assert not list(families.of(config).refuses(config))


def test_every_preset_is_counted():
    counted = test_presets_have_the_published_number_of_parameters.pytestmark[0].args[1]
    assert {name for name, *_ in counted} == families.PRESETS.keys() - {"nano", "micro", "mini"}


def test_micro_is_the_articles():
    """4 layers, 3 heads, width 128, which 3 does not divide: the head size is free."""
    config = families.preset("micro", vocab_size=50, context=32)
    assert (config.layers, config.heads, config.width) == (4, 3, 128)
    params = jax.eval_shape(LanguageModel(config).init, jax.random.key(0))
    assert params["h_3"]["attn"]["qkv"]["kernel"].shape == (128, 3 * 3 * 48)
    assert params["h_3"]["attn"]["out"]["kernel"].shape == (3 * 48, 128)


def test_initial_parameters():
    """Weights N(0, .02), those that add to the residual stream smaller by sqrt(2N), biases 0."""
    model = LanguageModel(decoder.Config(layers=2, heads=4, head_size=16, width=64, vocab_size=300))
    params = jax.jit(model.init)(jax.random.key(0))
    block = params["h_1"]
    for x in params["wte"]["embedding"], params["wpe"]["embedding"], block["attn"]["qkv"]["kernel"]:
        np.testing.assert_allclose(x.std(), 0.02, rtol=0.05)
    for x in block["attn"]["out"]["kernel"], block["mlp"]["proj"]["kernel"]:
        np.testing.assert_allclose(x.std(), 0.02 / 4**0.5, rtol=0.05)
    for layer in block["attn"]["qkv"], block["mlp"]["fc"], params["ln_f"], block["ln_1"]:
        assert not layer["bias"].any()


def test_parallel_layers_read_the_same_sum(model, params, sequences):
    """If attention adds nothing, the two orders agree; otherwise they do not."""
    tokens_BT, mask_BT = sequences
    silent = jax.tree.map(lambda x: x, params)
    for i in range(model.config.layers):
        silent[f"h_{i}"]["attn"]["out"] = jax.tree.map(jnp.zeros_like, params[f"h_{i}"]["attn"]["out"])
    other = dataclasses.replace(model.config, parallel_residual=not model.config.parallel_residual)
    ours, theirs = (partial(_hidden, m) for m in (model, LanguageModel(other)))
    silent_BTD, other_BTD = ours(silent, tokens_BT, mask_BT), theirs(silent, tokens_BT, mask_BT)
    np.testing.assert_allclose(silent_BTD, other_BTD, rtol=0, atol=1e-5)  # two programs: other bits
    assert jnp.abs(ours(params, tokens_BT, mask_BT) - theirs(params, tokens_BT, mask_BT))[mask_BT].max() > 0.1


@pytest.mark.parametrize(("model", "dropout"), [("gpt2", 0.5), ("neox", 0.0)], indirect=["model"])
def test_layers_that_are_computed_again_have_the_same_gradients(dropout, model, params, sequences):
    """And their noise is the same the second time."""
    key = jax.random.key(3) if dropout else None
    both = []
    for remat in False, True:
        again = LanguageModel(dataclasses.replace(model.config, remat=remat, dropout=dropout))
        both.append(jax.jit(jax.value_and_grad(lambda p, m=again: m.logprobs(p, *sequences, 6, dropout_key=key).sum())))
    (ours, our_grads), (theirs, their_grads) = (function(params) for function in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * abs(y).max()), our_grads, their_grads
    )


def test_layers_that_are_computed_again_take_less_memory():
    """XLA's temporary memory for the gradients of four layers of 256 tokens; eight take longer to compile."""
    tokens_BT = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    bytes_needed = []
    for remat in False, True:
        model = LanguageModel(decoder.Config(layers=4, heads=2, head_size=16, width=32, vocab_size=50, remat=remat))
        grads = jax.jit(jax.grad(lambda p, t, m=model: m.logprobs(p, t, jnp.ones_like(t), 63).sum()))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        # XLA on a CPU merges equal computations, these too, unless this pass is off.
        program = grads.lower(shapes, tokens_BT).compile({"xla_disable_hlo_passes": "cse_barrier_expander"})
        bytes_needed.append(program.memory_analysis().temp_size_in_bytes)
    assert bytes_needed[1] < 0.6 * bytes_needed[0]


@pytest.mark.parametrize("model", ["gpt2"], indirect=True)
def test_dropout_only_where_a_key_is_given(model, params, sequences):
    """invariant 10: calls without a key, as in reward and RL stages, have no dropout whatever the rate."""
    tokens_BT, mask_BT = sequences
    noisy = LanguageModel(dataclasses.replace(model.config, dropout=0.5))
    hidden = partial(_hidden, noisy, params, tokens_BT, mask_BT, None)
    np.testing.assert_array_equal(hidden(), _hidden(model, params, tokens_BT, mask_BT))
    one, two = hidden(jax.random.key(0)), hidden(jax.random.key(1))
    assert jnp.abs(one - hidden()).max() > 0.1
    assert jnp.abs(one - two).max() > 0.1  # another key, another noise
    np.testing.assert_array_equal(one, hidden(jax.random.key(0)))
    assert jnp.abs(one[0, 6] - one[0, 5]).max() > 0  # the noise differs between positions


def test_half_precision(model, params, logits, sequences):
    """bfloat16 activations keep float32 parameters and give float32 logits, near the exact ones."""
    tokens_BT, mask_BT = sequences
    half = LanguageModel(dataclasses.replace(model.config, dtype="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0)))} == {"float32"}
    hidden_BTD = _hidden(half, params, tokens_BT, mask_BT)
    assert hidden_BTD.dtype == jnp.bfloat16
    logits_BTV = half.logits(params, hidden_BTD)
    assert logits_BTV.dtype == jnp.float32
    exact_BTV = logits(tokens_BT, mask_BT)
    assert jnp.abs(logits_BTV - exact_BTV)[mask_BT].max() < 0.1 * exact_BTV.std()


@pytest.mark.parametrize(
    ("dtype", "backend", "calls"), [("bfloat16", "gpu", 1), ("float32", "gpu", 0), ("bfloat16", "cpu", 0)]
)
def test_the_fused_kernel_is_used_where_possible(dtype, backend, calls, model, params, sequences, monkeypatch):
    """It gets whole sequences with their mask, and never a cache. Another function replaces it here; where it is not
    called, nothing is compiled."""
    called = []

    def replacement(q, k, v, mask):
        called.append(mask.shape)
        return attention.attend(q, k, v, mask)

    @partial(jax.jit, static_argnums=0)
    def hidden(model, params, tokens_BT, mask_BT):
        last_BD, cache = model.prefill(params, tokens_BT, mask_BT, 8)
        next_BD, _ = model.decode(params, tokens_BT[:, -1], jnp.ones(3, bool), cache, 7)
        return model.hidden(params, tokens_BT, mask_BT, 2), last_BD, next_BD

    half = LanguageModel(dataclasses.replace(model.config, dtype=dtype))
    expected = hidden(half, params, *sequences) if calls else ()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(attention, "fused", replacement)
    program = hidden.trace(LanguageModel(dataclasses.replace(half.config, fused=True)), params, *sequences)
    fused = program.lower().compile()(params, *sequences) if calls else ()
    whole = [(3, 7, 7)] * (model.config.layers - 1)
    assert called == [*whole, (3, 1, 7), *whole, (3, 2, 7)] * calls
    for ours, theirs in zip(fused, expected, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=0.05, atol=0.05)
