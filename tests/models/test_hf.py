import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.models import gpt2, hf
from rlhf_jax.models.heads import LanguageModel

CONFIG = gpt2.Config(layers=1, heads=2, head_size=3, width=5, context=7, vocab_size=11)  # every size tells which it is


@pytest.fixture(scope="module")
def params():
    return LanguageModel(CONFIG).init(jax.random.key(0))


@pytest.fixture
def arrays(params):
    return hf.to_hf(params)


def assert_same_tree(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_names_and_shapes_are_those_of_gpt2(arrays):
    # D 5, heads * head size 6, 3 * 6 = 18, F = 4 * 5 = 20
    block = {
        "ln_1.weight": (5,),
        "ln_1.bias": (5,),
        "attn.c_attn.weight": (5, 18),
        "attn.c_attn.bias": (18,),
        "attn.c_proj.weight": (6, 5),
        "attn.c_proj.bias": (5,),
        "ln_2.weight": (5,),
        "ln_2.bias": (5,),
        "mlp.c_fc.weight": (5, 20),
        "mlp.c_fc.bias": (20,),
        "mlp.c_proj.weight": (20, 5),
        "mlp.c_proj.bias": (5,),
    }
    trunk = {"wte.weight": (11, 5), "wpe.weight": (7, 5), "ln_f.weight": (5,), "ln_f.bias": (5,)}
    trunk |= {f"h.0.{name}": shape for name, shape in block.items()}
    assert {name: x.shape for name, x in arrays.items()} == {f"transformer.{name}": s for name, s in trunk.items()}


def test_round_trip_through_a_file_is_exact(params, arrays, tmp_path):
    save_file(arrays, tmp_path / "model.safetensors")
    assert_same_tree(hf.from_hf(hf.read(tmp_path / "model.safetensors"), CONFIG), params)


def test_more_than_nine_layers_keep_their_order():
    config = gpt2.preset("nano", layers=12, width=4, heads=1, head_size=4, context=2, vocab_size=3)
    params = LanguageModel(config).init(jax.random.key(0))
    assert_same_tree(hf.from_hf(hf.to_hf(params), config), params)


def test_prefix_tied_head_and_mask_buffers_are_optional(params, arrays):
    bare = {name.removeprefix("transformer."): x for name, x in arrays.items()}
    assert_same_tree(hf.from_hf(bare, CONFIG), params)
    bare |= {"h.0.attn.bias": np.tri(7)[None, None], "h.0.attn.masked_bias": np.float32(-1e4)}
    assert_same_tree(hf.from_hf(bare | {"lm_head.weight": bare["wte.weight"]}, CONFIG), params)
    arrays |= {"transformer.h.0.attn.bias": np.tri(7), "lm_head.weight": arrays["transformer.wte.weight"]}
    assert_same_tree(hf.from_hf(arrays, CONFIG), params)


def test_half_precision_becomes_float32(arrays):
    halves = {name: x.astype(np.float16) for name, x in arrays.items()}
    leaf = hf.from_hf(halves, CONFIG)["wte"]["embedding"]
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, halves["transformer.wte.weight"])


def test_every_problem_is_in_one_line(arrays):
    del arrays["transformer.wpe.weight"]
    arrays["transformer.ln_f.bias"] = np.zeros(6)
    arrays["score.weight"] = np.zeros(1)
    arrays["wte.weight"] = arrays["transformer.wte.weight"]  # with the prefix and without: which one is meant?
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1
    with pytest.raises(InputError) as caught:
        hf.from_hf(arrays, CONFIG)
    title, problems = str(caught.value).split(": ", 1)
    assert title == "GPT-2 checkpoint"
    assert set(problems.split("; ")) == {
        "transformer.wpe.weight is missing",
        "transformer.ln_f.bias has shape (6,), expected (5,)",
        "score.weight is unexpected",
        "wte.weight is unexpected",
        "lm_head.weight is not tied: expected it absent or equal to transformer.wte.weight",
    }


@pytest.mark.parametrize("content", [None, b"not a checkpoint"])
def test_unreadable_files_are_named(content, tmp_path):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: expected a readable safetensors file"):
        hf.read(path)
