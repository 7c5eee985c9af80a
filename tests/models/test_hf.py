import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, families, hf, hf_config
from rlhf_jax.models.families import neox
from rlhf_jax.models.heads import LanguageModel, ScalarModel

# Every size is different: D 5, heads * head size 6, 3 * 6 = 18, F = 4 * 5 = 20.
GPT2 = decoder.Config(layers=1, heads=2, head_size=3, width=5, context=7, vocab_size=11)
NEOX = dataclasses.replace(GPT2, **neox.NEOX | {"context": 7, "rotary_share": 0.7})
SAVED = {"heads": 1, "head_size": 6, "width": 6}  # transformers requires heads * head size = width
IDS = {"eos_id": 3, "pad_id": 4}

GPT2_BLOCK = {
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
NEOX_BLOCK = {
    "input_layernorm.weight": (5,),
    "input_layernorm.bias": (5,),
    "attention.query_key_value.weight": (18, 5),
    "attention.query_key_value.bias": (18,),
    "attention.dense.weight": (5, 6),
    "attention.dense.bias": (5,),
    "post_attention_layernorm.weight": (5,),
    "post_attention_layernorm.bias": (5,),
    "mlp.dense_h_to_4h.weight": (20, 5),
    "mlp.dense_h_to_4h.bias": (20,),
    "mlp.dense_4h_to_h.weight": (5, 20),
    "mlp.dense_4h_to_h.bias": (5,),
}


def random(shapes):
    """A tree of these shapes in which no two numbers are the same."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)


def policy(config):
    return random(jax.eval_shape(LanguageModel(config).init, jax.random.key(0)))


def scalar(config, bias):
    params = random(jax.eval_shape(ScalarModel(config).zero_head, policy(config)))
    return {**params, "head": {**params["head"], "bias": np.float32(bias)}}


@pytest.fixture(scope="module", params=[GPT2, NEOX], ids=["gpt2", "neox"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def params(config):
    return policy(config)


@pytest.fixture
def arrays(params, config):
    return hf.to_hf(params, config)


@pytest.fixture
def gpt2_arrays():
    return hf.to_hf(policy(GPT2), GPT2)


def assert_same_tree(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def error(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names and layouts


def test_names_and_shapes_are_those_of_gpt2():
    trunk = {"wte.weight": (11, 5), "wpe.weight": (7, 5), "ln_f.weight": (5,), "ln_f.bias": (5,)}
    trunk |= {f"h.0.{name}": shape for name, shape in GPT2_BLOCK.items()}
    shapes = {name: x.shape for name, x in hf.to_hf(policy(GPT2), GPT2).items()}
    assert shapes == {f"transformer.{name}": shape for name, shape in trunk.items()}


def test_names_and_shapes_are_those_of_gpt_neox():
    trunk = {"embed_in.weight": (11, 5), "final_layer_norm.weight": (5,), "final_layer_norm.bias": (5,)}
    trunk |= {f"layers.0.{name}": shape for name, shape in NEOX_BLOCK.items()}
    shapes = {name: x.shape for name, x in hf.to_hf(policy(NEOX), NEOX).items()}
    assert shapes == {f"gpt_neox.{name}": shape for name, shape in trunk.items()} | {"embed_out.weight": (11, 5)}


def test_queries_keys_and_values_lie_by_head_in_gpt_neox():
    """Theirs are rows, head 0: q q q k k k v v v, head 1: ...; ours are columns, q: head 0, head 1, k: ..., v: ..."""
    params = policy(NEOX)
    rows = [f"{what}{head}{i}" for head in range(2) for what in "qkv" for i in range(3)]
    columns = [f"{what}{head}{i}" for what in "qkv" for head in range(2) for i in range(3)]
    theirs, ours = hf.to_hf(params, NEOX), params["h_0"]["attn"]["qkv"]
    for i, label in enumerate(rows):
        j = columns.index(label)
        name = "gpt_neox.layers.0.attention.query_key_value"
        np.testing.assert_array_equal(theirs[f"{name}.weight"][i], ours["kernel"][:, j])
        assert theirs[f"{name}.bias"][i] == ours["bias"][j]


def test_round_trip_is_exact(params, arrays, config):
    assert_same_tree(hf.from_hf(arrays, config), params)


def test_an_untied_gpt2_has_a_head_of_its_own():
    config = dataclasses.replace(GPT2, tied=False)
    arrays = hf.to_hf(policy(config), config)
    assert not np.array_equal(arrays["lm_head.weight"], arrays["transformer.wte.weight"])
    assert_same_tree(hf.from_hf(arrays, config), policy(config))


def test_more_than_nine_layers_keep_their_order():
    config = families.preset("nano", layers=12, width=4, heads=1, head_size=4, context=2, vocab_size=3)
    assert_same_tree(hf.from_hf(hf.to_hf(policy(config), config), config), policy(config))


def test_the_prefix_is_optional(params, arrays, config):
    """A trunk saved alone has none; the head never has."""
    bare = {re.sub(r"^(transformer|gpt_neox)\.", "", name): x for name, x in arrays.items()}
    assert bare.keys().isdisjoint(arrays.keys() - {"embed_out.weight"})
    assert_same_tree(hf.from_hf(bare, config), params)


def test_a_copy_of_the_embedding_it_is_tied_to_is_no_problem(gpt2_arrays):
    copy = {"lm_head.weight": gpt2_arrays["transformer.wte.weight"]}
    assert_same_tree(hf.from_hf(gpt2_arrays | copy, GPT2), policy(GPT2))
    bare = {name.removeprefix("transformer."): x for name, x in gpt2_arrays.items()}
    assert_same_tree(hf.from_hf(bare | copy, GPT2), policy(GPT2))


@pytest.mark.parametrize(
    "buffers",
    [("attn.bias", "attn.masked_bias"), ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")],
)
def test_constants_of_old_checkpoints_are_left_out(buffers, params, arrays, config):
    for prefix in "transformer.h", "gpt_neox.layers":
        arrays |= {f"{prefix}.0.{name}": np.tri(7) for name in buffers}
    theirs = "transformer." if config is GPT2 else "gpt_neox."
    arrays = {name: x for name, x in arrays.items() if name.startswith((theirs, "embed_out"))}
    assert_same_tree(hf.from_hf(arrays, config), params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype, arrays, config):
    halves = {name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}
    params = hf.from_hf(halves, config)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    for name, x in hf.to_hf(params, config).items():
        np.testing.assert_array_equal(x, halves[name].astype(np.float32))


def test_ids_without_a_row_start_as_the_mean_row(params, arrays, config):
    wide = dataclasses.replace(config, vocab_size=11 + 255)
    padded = hf.from_hf(arrays, wide)
    for name in {"wte", "unembed"} & params.keys():
        table_VD, known_VD = padded[name]["embedding"], params[name]["embedding"]
        assert table_VD.shape == (266, 5)
        np.testing.assert_array_equal(table_VD[:11], known_VD)
        np.testing.assert_allclose(table_VD[11:], np.tile(known_VD.mean(axis=0), (255, 1)), rtol=1e-6)
    # Exported, they stay: the model is the same function.
    assert_same_tree(hf.from_hf(hf.to_hf(padded, wide), wide), padded)
    message = error(hf.from_hf, arrays, dataclasses.replace(config, vocab_size=11 + 256))
    assert "weight has shape (11, 5), expected (267, 5)" in message


def test_every_problem_is_in_one_line(gpt2_arrays):
    arrays = gpt2_arrays
    del arrays["transformer.wpe.weight"]
    arrays["transformer.ln_f.bias"] = np.zeros(6)
    arrays["transformer.ln_f.weight"] = np.zeros(5, np.int8)
    arrays["transformer.wte.weight"] = np.zeros((12, 5))
    arrays["score.weight"] = np.zeros(1)
    arrays["wte.weight"] = arrays["transformer.wte.weight"]  # with the prefix and without: ambiguous
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1
    title, problems = error(hf.from_hf, arrays, GPT2).split(": ", 1)
    assert title == "gpt2 checkpoint"
    assert set(problems.split("; ")) == {
        "transformer.wpe.weight is missing",
        "transformer.ln_f.bias has shape (6,), expected (5,)",
        "transformer.ln_f.weight is of int8, expected floating-point numbers",
        "transformer.wte.weight has shape (12, 5), expected (11, 5)",
        "score.weight is unexpected",
        "wte.weight is unexpected",
        "lm_head.weight is not tied: expected it absent or equal to transformer.wte.weight",
    }


@pytest.mark.parametrize(
    "wrapped", ["_orig_mod.{}", "module.{}", "_orig_mod.module.{}", "model.{}", "module._orig_mod.model.{}"]
)
def test_names_of_wrappers_are_read_through(wrapped, arrays, params, config):
    """As torch.compile, DistributedDataParallel and trainers write them; also around a layer, and without a head."""
    assert_same_tree(hf.from_hf({wrapped.format(name): x for name, x in arrays.items()}, config), params)
    layers = {name.replace(".0.", ".0._orig_mod.").replace(".mlp.", ".mlp.module."): x for name, x in arrays.items()}
    assert layers.keys() != arrays.keys()
    assert_same_tree(hf.from_hf(layers, config), params)
    ours = scalar(config, bias=0)
    scores = {wrapped.format(name): x for name, x in hf.scalar_to_hf(ours, config).items()}
    assert_same_tree(hf.scalar_from_hf(scores, config), ours)


def test_an_array_with_and_without_a_wrapper_is_refused(gpt2_arrays):
    again = {"module.transformer.wte.weight": gpt2_arrays["transformer.wte.weight"]}
    expected = "transformer.wte.weight and module.transformer.wte.weight: expected one array of this name"
    assert error(hf.from_hf, gpt2_arrays | again, GPT2) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_number_that_is_not_finite_is_named_by_its_array(value, arrays, config):
    """A float64 too large for float32, too. Large numbers whose sum would overflow are fine."""
    name = next(name for name in arrays if name.endswith(("c_fc.weight", "h_to_4h.weight")))
    arrays[name] = np.array(arrays[name], np.float64)
    arrays[name][2, 3] = value
    model = "gpt_neox" if config is NEOX else "gpt2"
    expected = "expected finite numbers (float32), got 1 of 100 that are not"
    assert error(hf.from_hf, arrays, config) == f"{model} checkpoint: {name}: {expected}"
    arrays[name][:] = 3e38
    hf.from_hf(arrays, config)


def test_a_tied_table_with_nan_is_not_called_untied(gpt2_arrays):
    table = np.full_like(gpt2_arrays["transformer.wte.weight"], np.nan)
    gpt2_arrays |= {"transformer.wte.weight": table[:-1], "lm_head.weight": table[:-1].copy()}
    message = "gpt2 checkpoint: transformer.wte.weight: expected finite numbers (float32), got 55 of 55 that are not"
    assert error(hf.from_hf, gpt2_arrays, GPT2) == message


def test_of_many_problems_five_of_each_kind_are_listed(gpt2_arrays):
    others = {f"other.{i}": np.zeros(1) for i in range(8)}
    message = error(hf.from_hf, others, GPT2)
    assert message.count(" is missing") == message.count(" is unexpected") == 5
    assert " is missing and 11 more; other.0 is unexpected; " in message
    assert message.endswith("other.4 is unexpected and 3 more")


@pytest.mark.parametrize("place", ["file/model", "file/more/model"])
def test_a_folder_that_cannot_be_made_is_refused(place, tmp_path):
    (tmp_path / "file").touch()
    message = error(hf.check_folder, tmp_path / place)
    assert message == f"{tmp_path / place}: cannot be written ({tmp_path}/file is not a folder)"
    hf.check_folder(tmp_path / "new" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_architecture_is_refused(gpt2_arrays):
    message = error(hf.from_hf, gpt2_arrays, NEOX)
    assert "layers.0.attention.dense.bias is missing" in message
    assert "transformer.h.0.attn.c_proj.bias is unexpected" in message


def test_a_transposed_kernel_is_seen(arrays, config):
    name = next(name for name in arrays if name.endswith(("c_fc.weight", "h_to_4h.weight")))
    shape = arrays[name].shape
    arrays[name] = arrays[name].T
    assert f"{name} has shape {shape[::-1]}, expected {shape}" in error(hf.from_hf, arrays, config)


# Reward models


def score(params, config):
    tokens_BT = jnp.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    return jax.jit(ScalarModel(config).score)(params, tokens_BT, jnp.array([[1] * 5, [1, 1, 1, 0, 0]]))


def test_a_reward_model_without_a_bias_is_exact(config):
    arrays = hf.scalar_to_hf(scalar(config, bias=0), config)
    assert arrays["score.weight"].shape == (1, 5)
    assert arrays.keys().isdisjoint({"lm_head.weight", "embed_out.weight"})
    assert_same_tree(hf.scalar_from_hf(arrays, config), scalar(config, bias=0))


@pytest.mark.parametrize("bias", [0.5, -30.0])
def test_the_bias_moves_into_the_last_norm(bias, config):
    """Scores are the same; only the bias of that norm differs."""
    ours = scalar(config, bias)
    back = hf.scalar_from_hf(hf.scalar_to_hf(ours, config), config)
    np.testing.assert_allclose(score(back, config), score(ours, config), rtol=1e-6, atol=1e-5)
    assert back["head"]["bias"] == 0
    assert not np.array_equal(back["trunk"]["ln_f"]["bias"], ours["trunk"]["ln_f"]["bias"])
    np.testing.assert_array_equal(ours["trunk"]["ln_f"]["bias"], scalar(config, bias)["trunk"]["ln_f"]["bias"])
    back["trunk"]["ln_f"]["bias"] = ours["trunk"]["ln_f"]["bias"]
    assert_same_tree(back["trunk"], ours["trunk"])


def test_a_bias_with_a_head_of_zeros_is_refused(config):
    params = scalar(config, bias=2)
    params["head"]["kernel"] = np.zeros(5, np.float32)
    assert "expected weights other than 0, to export the bias of 2.0" in error(hf.scalar_to_hf, params, config)
    params["head"]["bias"] = np.float32(0)
    assert not hf.scalar_to_hf(params, config)["score.weight"].any()


def test_a_reward_model_has_one_label(config):
    arrays = hf.scalar_to_hf(scalar(config, bias=0), config)
    arrays["score.weight"] = np.zeros((2, 5))
    assert error(hf.scalar_from_hf, arrays, config).endswith("score.weight has shape (2, 5), expected (1, 5)")
    del arrays["score.weight"]
    assert error(hf.scalar_from_hf, arrays, config).endswith("score.weight is missing")


# Folders


@pytest.fixture
def saved(config, tmp_path):
    """(folder, its parameters, its config) of an exported language model."""
    config = dataclasses.replace(config, **SAVED)
    hf.save(tmp_path / "new" / "model", policy(config), config, **IDS)
    return tmp_path / "new" / "model", policy(config), config


def test_what_is_saved_is_loaded(saved):
    folder, params, config = saved
    assert hf_config.read(folder) == config
    for path in folder, folder / "model.safetensors", str(folder):
        assert_same_tree(hf.load(path, config), params)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}
    assert [file.name for file in folder.parent.iterdir()] == ["model"]
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers requires it
    tokens = {"bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 4}
    assert json.loads((folder / "generation_config.json").read_text()) == tokens
    assert tokens.items() <= json.loads((folder / "config.json").read_text()).items()


def test_arrays_on_a_device_are_saved_too(config, tmp_path):
    config = dataclasses.replace(config, **SAVED)
    hf.save(tmp_path / "a", jax.device_put(policy(config)), config, **IDS)
    assert_same_tree(hf.load(tmp_path / "a", config), policy(config))


def test_a_reward_model_is_saved(config, tmp_path):
    config = dataclasses.replace(config, **SAVED)
    hf.save_scalar(tmp_path, scalar(config, bias=0), config, **IDS)  # into an empty folder
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"][0].endswith("ForSequenceClassification")
    assert_same_tree(hf.scalar_from_hf(hf.read(tmp_path), hf_config.read(tmp_path)), scalar(config, bias=0))


def test_the_parameters_are_not_those_of_the_file(saved):
    """They outlive the file, and JAX on a CPU uses their memory without a copy."""
    folder, params, config = saved
    loaded = hf.load(folder, config)
    (folder / "model.safetensors").write_bytes(b"")
    assert_same_tree(loaded, params)
    for leaf in jax.tree.leaves(loaded):
        leaf[...] = 0  # writable
        assert leaf.ctypes.data % 64 == 0


def test_nothing_is_overwritten(saved, tmp_path):
    folder, params, config = saved
    before = (folder / "model.safetensors").read_bytes()
    other = jax.tree.map(np.zeros_like, params)
    assert error(hf.save, folder, other, config, **IDS) == f"{folder}: expected a new or an empty folder to write to"
    assert (folder / "model.safetensors").read_bytes() == before
    assert error(hf.save, folder / "config.json", other, config, **IDS).endswith("folder to write to")


def test_a_failed_export_leaves_nothing(saved, tmp_path, monkeypatch):
    _, params, config = saved

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    message = error(hf.save, tmp_path / "full" / "model", params, config, **IDS)
    assert "cannot be written" in message and "No space left" in message
    assert list((tmp_path / "full").iterdir()) == []


def test_an_export_that_was_killed_is_done_again(saved, tmp_path):
    _, params, config = saved
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "rest").touch()
    hf.save(tmp_path / "model", params, config, **IDS)
    assert not (tmp_path / "model" / "rest").exists() and not (tmp_path / ".model.unfinished").exists()


def test_other_sizes_than_config_json_are_refused(saved):
    """Shapes do not show the number of heads: 1 of size 6, or 2 of size 3."""
    folder, _, config = saved
    wrong = dataclasses.replace(config, heads=2, head_size=3)
    expected = "expected model.heads = 1 (not 2), model.head_size = 6 (not 3)"
    for path in folder, folder / "model.safetensors":
        assert error(hf.load, path, wrong) == f"{folder / 'config.json'}: {expected}"


def test_a_folder_needs_a_config_and_a_lone_file_does_not(saved):
    folder, params, config = saved
    (folder / "config.json").unlink()
    assert error(hf.load, folder, config).startswith(f"{folder / 'config.json'}: expected the config.json of trans")
    assert_same_tree(hf.load(folder / "model.safetensors", config), params)


def test_the_path_of_wrong_arrays_is_named(saved):
    folder, _, config = saved
    arrays = dict(hf.read(folder))
    save_file(
        {name: np.array(x) for name, x in arrays.items() if "ln_f" not in name and "final" not in name},
        folder / "model.safetensors",
    )
    assert re.match(
        rf"{folder}: (gpt2|gpt_neox) checkpoint: .* is missing; .* is missing$", error(hf.load, folder, config)
    )


# Memory


MEASURE = """
import re, sys
import jax, numpy as np
from rlhf_jax.models import decoder, hf
from rlhf_jax.models.heads import LanguageModel

def kilobytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

config = decoder.Config(**eval(sys.argv[2]))
jax.device_put(np.zeros(9))
jax.eval_shape(LanguageModel(config).init, jax.random.key(0))  # JAX's own memory, before the measurement
before = kilobytes("VmRSS")
params = hf.load(sys.argv[1], config)
sum(float(leaf.sum()) for leaf in jax.tree.leaves(params))
params = jax.block_until_ready(jax.device_put(params))
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("extra", [{}, neox.NEOX], ids=["gpt2", "neox"])
def test_a_checkpoint_is_in_memory_once(extra, tmp_path):
    """Read, with a row added for PAD, every number used, put on the device: less than 1.3 times the file."""
    config = decoder.Config(layers=8, heads=4, head_size=64, width=256, vocab_size=20_000, **extra)
    hf.save(tmp_path / "model", policy(config), config, **IDS)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    sizes = dataclasses.asdict(dataclasses.replace(config, vocab_size=20_001))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), repr(sizes)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) * 1024 < 1.3 * size
