"""Our models against transformers' on tiny random checkpoints. make_*_parity.py, beside this file, made them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generate
from rlhf_jax.models import families, hf, hf_config
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.ops import logprobs, losses

HERE = Path(__file__).parent
PAD = 0


FOLDERS = [f"{name}_parity" for name in ("gpt2", "neox", "neox_sequential", "llama", "mistral", "qwen2", "qwen3")]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request):
    return HERE / request.param


@pytest.fixture(scope="module")
def expected(folder):
    with np.load(folder / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel(hf_config.read(folder))


@pytest.fixture(scope="module")
def params(folder, model):
    return hf.load(folder, model.config)


def more_padding(array_BT, columns, fill):
    return np.pad(array_BT, ((0, 0), (columns, 0)), constant_values=fill)


@pytest.mark.parametrize("columns", [0, 20])  # 16 + 20 columns are more than the context of 32; tokens are not
def test_hidden_states_and_logits(columns, model, params, expected):
    tokens_BT = more_padding(expected["tokens_BT"], columns, PAD)
    mask_BT = more_padding(expected["mask_BT"], columns, 0)
    hidden_BTD = jax.jit(model.hidden)(params, tokens_BT, mask_BT)[:, columns:]
    real_BT = expected["mask_BT"].astype(bool)
    np.testing.assert_allclose(hidden_BTD[real_BT], expected["hidden_BTD"][real_BT], rtol=0, atol=1e-4)
    logits_BTV = model.logits(params, hidden_BTD)
    np.testing.assert_allclose(logits_BTV[real_BT], expected["logits_BTV"][real_BT], rtol=0, atol=1e-4)


def test_greedy_continuations(model, params, expected):
    """Read token by token with a cache. Three of the four rows are left-padded, and then all."""
    tokens_BP, mask_BP = more_padding(expected["tokens_BT"], 5, PAD), more_padding(expected["mask_BT"], 5, 0)
    keys_B = jax.random.split(jax.random.key(0), len(tokens_BP))
    never = -1  # no token is EOS: every row is continued to the end
    config = generate.Sampling(max_tokens=expected["greedy_BR"].shape[1], eos_id=never, pad_id=PAD, temperature=0)
    drawn = jax.jit(generate.generate, static_argnums=(0, 5))(model, params, tokens_BP, mask_BP, keys_B, config)
    np.testing.assert_array_equal(drawn.response_BR, expected["greedy_BR"])


def test_loss_and_its_gradient_by_every_parameter(model, params, expected):
    tokens_BT = more_padding(expected["tokens_BT"], 5, PAD)
    mask_BT = jnp.array(more_padding(expected["mask_BT"], 5, 0))
    count = tokens_BT.shape[1] - 1
    target_mask = mask_BT[:, 1:] * logprobs.before(mask_BT, count)  # no real token is before the first one

    def cross_entropy(params):
        return losses.cross_entropy(model.logprobs(params, tokens_BT, mask_BT, count), target_mask)

    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(params)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)
    gradient = {f"gradient/{name}": x for name, x in hf.to_hf(gradient, model.config).items()}
    assert gradient.keys() == {name for name in expected if name.startswith("gradient/")}
    for name, x in gradient.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-4, err_msg=name)


def test_scores_of_a_reward_model(folder, model, expected):
    arrays = {**hf.read(folder), "score.weight": expected["score.weight"]}
    for head in "embed_out.weight", "lm_head.weight":
        arrays.pop(head, None)
    scalar = ScalarModel(model.config)
    tokens_BT = more_padding(expected["scored_BT"], 5, PAD)
    score_B = jax.jit(scalar.score)(hf.scalar_from_hf(arrays, model.config), tokens_BT, tokens_BT != PAD)
    np.testing.assert_allclose(score_B, expected["score_B"], rtol=0, atol=1e-4)


def test_round_trip_is_bit_exact(folder, model, params):
    saved = hf.read(folder / "model.safetensors")
    arrays = hf.to_hf(params, model.config)
    assert arrays.keys() == saved.keys()
    for name, x in arrays.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x.view(np.uint32), saved[name].view(np.uint32))


def test_each_fixture_has_the_architecture_of_its_name(folder, model):
    """By its config.json."""
    c = model.config
    settings = {
        "gpt2_parity": (0, 10_000, False, False, True, 1e-5),
        "neox_parity": (0.25, 10_000, True, True, False, 1e-5),
        "neox_sequential_parity": (0.5, 100, False, False, True, 1e-3),
        "llama_parity": (1, 1000, False, False, False, 1e-5),
        "mistral_parity": (1, 10_000, False, False, False, 1e-6),
        "qwen2_parity": (1, 10_000, False, False, True, 1e-6),
        "qwen3_parity": (1, 10_000, False, False, True, 1e-6),
    }[folder.name]
    assert (c.rotary_share, c.rotary_base, c.parallel_residual, c.exact_gelu, c.tied, c.norm_eps) == settings
    layout = {
        "llama_parity": ("attention", False, 0, 4.0, 6),
        "mistral_parity": ("none", False, 5, 1.0, 6),
        "qwen2_parity": ("qkv", False, 0, 1.0, 6),
        "qwen3_parity": ("none", True, 0, 1.0, 8),
    }.get(folder.name)
    if layout:
        assert (c.norm, c.feed_forward, c.heads, c.kv_heads) == ("rms", "swiglu", 4, 2)
        assert (c.biases, c.qk_norm, c.window, c.rotary_factor, c.head_size) == layout
    assert folder.name.split("_")[0].replace("neox", "gpt_neox") == families.of(c).TYPE
