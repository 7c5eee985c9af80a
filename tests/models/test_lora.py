"""Adapters: the base at first, the matrix they stand for at full rank, and one base for every compiled function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import generate
from rlhf_jax.models import hf, lora, peft
from rlhf_jax.models.families.llama import LLAMA
from rlhf_jax.models.families.neox import NEOX
from rlhf_jax.models.heads import LanguageModel, ScalarModel

PARTS = ("attn", "attn", "mlp", "mlp")  # of PRODUCTS
TOKENS_BT, MASK_BT = jnp.array([[0, 0, 5, 3, 7, 2], [4, 9, 1, 28, 3, 6]]), jnp.arange(6) >= jnp.array([[2], [0]])


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def whole(request, apply):
    """A layer of a model without adapters."""
    llama = LLAMA | dict(context=40, kv_heads=1, head_size=6, feed_forward_size=20)
    changes = {"layers": 1} | (llama if request.param == "llama" else {})
    return LanguageModel(dataclasses.replace(apply.policy.config, **changes))


@pytest.fixture(scope="module")
def params(whole):
    draw, shapes = np.random.default_rng(0), jax.eval_shape(whole.init, jax.random.key(0))
    return jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def adapted(whole, params, **fields):
    """(the model with adapters on these parameters, its base)."""
    base = lora.Base(lora.Config(**fields), lambda: params)
    return dataclasses.replace(whole, base=base), base


def moved(adapters, seed=0):
    """Adapters as after some training."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(np.float32), adapters)


def total(model):
    """(parameters) -> the sum of log-probs."""
    return lambda params: model.logprobs(params, TOKENS_BT, MASK_BT, 4).sum()


def test_a_new_adapter_changes_nothing(whole, params):
    model, base = adapted(whole, params, rank=2)
    adapters = model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, adapters["h_0"]["attn"]["out"]) == {
        "a": (whole.config.heads * whole.config.head_size, 2),
        "b": (2, 16),
    }
    np.testing.assert_allclose(base.jit(total(model))(adapters), jax.jit(total(whole))(params), rtol=1e-6)
    gradient = base.jit(jax.grad(total(model)))(adapters)["h_0"]["mlp"]["fc"]
    assert not gradient["a"].any() and gradient["b"].all()


def test_at_full_rank_its_gradient_is_that_of_the_matrix(whole, params):
    """With A the identity and alpha the rank, B is what is added to W; of all matrices at once."""
    kernels = {name: params["h_0"][part][name]["kernel"] for name, part in zip(lora.PRODUCTS, PARTS, strict=True)}
    expected = jax.jit(jax.grad(total(whole)))(params)["h_0"]
    for rank in {kernel.shape[0] for kernel in kernels.values()}:
        names = [name for name, kernel in kernels.items() if kernel.shape[0] == rank]
        model, base = adapted(whole, params, rank=rank, alpha=float(rank), products=",".join(names))
        eye = jnp.eye(rank)
        adapters = jax.tree.map(lambda x, eye=eye: eye if x.any() else x, model.init(jax.random.key(0)))
        gradient = base.jit(jax.grad(total(model)))(adapters)["h_0"]
        for name in names:
            part = PARTS[lora.PRODUCTS.index(name)]
            assert jnp.abs(expected[part][name]["kernel"]).max() > 0.1
            np.testing.assert_allclose(gradient[part][name]["b"], expected[part][name]["kernel"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
def test_merged_parameters_are_the_same_model(whole, params):
    """In log-probs, in samples read with a cache, and in the scores of a scalar model on the same base."""
    model, base = adapted(whole, params, rank=3, alpha=6.0)
    adapters = moved(model.init(jax.random.key(0)))
    merged = lora.merge(params, adapters, base.config)
    assert np.abs(merged["h_0"]["mlp"]["fc"]["kernel"] - params["h_0"]["mlp"]["fc"]["kernel"]).max() > 0.1
    np.testing.assert_allclose(base.jit(total(model))(adapters), jax.jit(total(whole))(merged), rtol=1e-5)
    sampling = generate.Sampling(max_tokens=4, eos_id=-1, pad_id=0)
    keys_B = jax.random.split(jax.random.key(1), 2)

    def draw(model):
        return lambda params: generate.generate(model, params, TOKENS_BT, MASK_BT, keys_B, sampling)

    ours, theirs = base.jit(draw(model))(adapters), jax.jit(draw(whole))(merged)
    np.testing.assert_array_equal(ours.response_BR, theirs.response_BR)
    np.testing.assert_allclose(ours.logp_BR, theirs.logp_BR, rtol=0, atol=1e-4)
    reward, plain = ScalarModel(whole.config, base), ScalarModel(whole.config)
    score_B = base.jit(reward.score)(reward.init(jax.random.key(2), adapters), TOKENS_BT, MASK_BT)
    expected_B = jax.jit(plain.score)(plain.init(jax.random.key(2), merged), TOKENS_BT, MASK_BT)
    np.testing.assert_allclose(score_B, expected_B, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, NEOX, LLAMA | {"kv_heads": 1}], ids=["gpt2", "neox", "llama"])
def test_a_folder_of_peft_holds_the_same_sum(changes, apply):
    """W + (alpha / rank) B A of each matrix of transformers is that matrix of the merged model."""
    config = dataclasses.replace(apply.policy.config, **{"rotary_share": 0.6, "layers": 1, "context": 40} | changes)
    whole = LanguageModel(config if changes else dataclasses.replace(config, rotary_share=0.0))
    params = moved(jax.eval_shape(whole.init, jax.random.key(0)), seed=1)
    model, base = adapted(whole, params, rank=2, alpha=3.0)
    adapters = moved(jax.eval_shape(model.init, jax.random.key(0)))
    arrays, theirs = peft.to_peft(adapters, whole.config), hf.to_hf(params, whole.config)
    merged = hf.to_hf(lora.merge(params, adapters, base.config), whole.config)
    record = peft.record(adapters, whole.config, base.config, base="there")
    changed = {name for name in theirs if not np.array_equal(theirs[name], merged[name])}
    ends = tuple(f".{module}.weight" for module in record["target_modules"])
    assert changed == {name for name in theirs if name.endswith(ends)}
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (arrays.pop(f"{module}.lora_{letter}.weight") for letter in "AB")
        product = (b @ a).T if record["fan_in_fan_out"] else b @ a
        np.testing.assert_allclose(theirs[name] + 1.5 * product, merged[name], rtol=0, atol=1e-6)
    assert not arrays


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
def test_compiled_functions_are_given_the_base_and_keep_nothing_of_it(whole, params):
    """Two functions, one base: its arrays are arguments, are not donated, and nothing is traced into the model."""
    model, base = adapted(whole, params, rank=2)
    adapters = jax.device_put(moved(model.init(jax.random.key(0))))

    def step(adapters, factor):
        return jax.tree.map(lambda x: factor * x, adapters), total(model)(adapters)

    compiled = base.jit(step, donate_argnums=0)
    lowered = compiled.lower(adapters, 2.0)
    shape = "x".join(map(str, params["wte"]["embedding"].shape))
    assert f"tensor<{shape}xf32>" in lowered.as_text().split("->")[0]  # among the arguments
    assert compiled.eval_shape(adapters, 2.0)[1].shape == ()
    first = compiled(adapters, 2.0)[1]
    assert adapters["h_0"]["attn"]["qkv"]["a"].is_deleted() and base.params is base.stored
    base.stored = jax.tree.map(lambda x: 2 * x, params)  # another base: nothing is compiled for it, or remembered
    assert compiled(moved(model.init(jax.random.key(0))), 2.0)[1] != first


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
def test_only_the_chosen_products_have_adapters(whole, params):
    model, _ = adapted(whole, params, rank=2, products="qkv, proj")
    layer = model.init(jax.random.key(0))["h_0"]
    assert layer["attn"].keys() == {"qkv"} and layer["mlp"].keys() == {"proj"}
