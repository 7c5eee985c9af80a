"""Our GPT-2 against transformers' on a tiny random checkpoint. make_gpt2_parity.py, beside this file, made it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generate
from rlhf_jax.models import gpt2, hf
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.ops import logprobs, losses

FOLDER = Path(__file__).with_name("gpt2_parity")
PAD = 0


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model():
    sizes = json.loads((FOLDER / "config.json").read_text())
    config = gpt2.Config(
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        head_size=sizes["n_embd"] // sizes["n_head"],
        width=sizes["n_embd"],
        context=sizes["n_positions"],
        vocab_size=sizes["vocab_size"],
    )
    return LanguageModel(config)


@pytest.fixture(scope="module")
def params(model):
    return hf.from_hf(hf.read(FOLDER / "model.safetensors"), model.config)


def more_padding(array_BT, columns, fill):
    return np.pad(array_BT, ((0, 0), (columns, 0)), constant_values=fill)


@pytest.mark.parametrize("columns", [0, 1, 20])  # 16 + 20 columns are more than the context of 32; tokens are not
def test_hidden_states_and_logits(columns, model, params, expected):
    tokens_BT = more_padding(expected["tokens_BT"], columns, PAD)
    mask_BT = more_padding(expected["mask_BT"], columns, 0)
    hidden_BTD = model.hidden(params, tokens_BT, mask_BT)[:, columns:]
    real_BT = expected["mask_BT"].astype(bool)
    np.testing.assert_allclose(hidden_BTD[real_BT], expected["hidden_BTD"][real_BT], rtol=0, atol=1e-4)
    logits_BTV = model.logits(params, hidden_BTD)
    np.testing.assert_allclose(logits_BTV[real_BT], expected["logits_BTV"][real_BT], rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [0, 5])
def test_greedy_continuations(columns, model, params, expected):
    tokens_BP = more_padding(expected["tokens_BT"], columns, PAD)
    mask_BP = more_padding(expected["mask_BT"], columns, 0)
    keys_B = jax.random.split(jax.random.key(0), len(tokens_BP))
    never = -1  # no token is EOS: every row is continued to the end
    config = generate.Sampling(max_tokens=expected["greedy_BR"].shape[1], eos_id=never, pad_id=PAD, temperature=0)
    drawn = jax.jit(generate.generate, static_argnums=(0, 5))(model, params, tokens_BP, mask_BP, keys_B, config)
    np.testing.assert_array_equal(drawn.response_BR, expected["greedy_BR"])


@pytest.mark.parametrize("columns", [0, 5])
def test_loss_and_its_gradient_by_every_parameter(columns, model, params, expected):
    tokens_BT = more_padding(expected["tokens_BT"], columns, PAD)
    mask_BT = jnp.array(more_padding(expected["mask_BT"], columns, 0))
    count = tokens_BT.shape[1] - 1
    target_mask = mask_BT[:, 1:] * logprobs.before(mask_BT, count)  # the first real token has nothing before it

    def cross_entropy(params):
        return losses.cross_entropy(model.logprobs(params, tokens_BT, mask_BT, count), target_mask)

    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(params)
    np.testing.assert_allclose(loss, expected["loss"], rtol=0, atol=1e-5)
    gradient = {f"gradient/{name}": x for name, x in hf.to_hf(gradient).items()}
    assert gradient.keys() == {name for name in expected if name.startswith("gradient/")}
    for name, x in gradient.items():
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-4, err_msg=name)


def test_round_trip_is_bit_exact(params):
    saved = hf.read(FOLDER / "model.safetensors")
    arrays = hf.to_hf(params)
    assert arrays.keys() == saved.keys()
    for name, x in arrays.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x.view(np.uint32), saved[name].view(np.uint32))
