import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlhf_jax.errors import InputError
from rlhf_jax.models import weights

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float32)}


def error(path):
    with pytest.raises(InputError) as caught:
        weights.read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_shards(folder, files, weight_map):
    """Files of {name: {array name: array}} and the index that lists their arrays."""
    for name, arrays in files.items():
        save_file(arrays, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path):
    files = {"one.safetensors": {"a": ARRAYS["a"]}, "two.safetensors": {"b": ARRAYS["b"]}}
    save_shards(tmp_path, files, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def assert_same(arrays):
    assert set(arrays) == set(ARRAYS) and len(arrays) == 2
    for name, x in ARRAYS.items():
        assert arrays[name].dtype == x.dtype
        np.testing.assert_array_equal(arrays[name], x)


def test_a_file_a_folder_and_shards_hold_the_same(shards, tmp_path_factory):
    assert_same(weights.read(shards))
    folder = tmp_path_factory.mktemp("one")
    save_file(ARRAYS, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(weights.read(folder))
    assert_same(weights.read(str(folder / "model.safetensors")))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "bool", "int64", "uint8"])
def test_types_and_shapes(dtype, tmp_path):
    """Arrays between others and at unaligned offsets; an array without axes; an axis of length 0."""
    arrays = {"a": np.arange(3), "b": np.arange(6).reshape(2, 3), "c": np.array(1), "d": np.zeros((0, 4))}
    arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}
    save_file(arrays, tmp_path / "model.safetensors")
    arrays = weights.read(tmp_path)
    for name, x in arrays.items():
        assert (arrays[name].dtype, arrays[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(arrays[name], x)


def test_nothing_can_be_written_into_the_checkpoint(shards):
    with pytest.raises(ValueError, match="read-only"):
        weights.read(shards)["a"][0, 0] = 1


@pytest.mark.parametrize(
    "content", [None, b"", b"not a checkpoint", b"\xff" * 64, (2).to_bytes(8, "little") + b"{}" + b"surplus"]
)
def test_files_that_are_not_safetensors_are_named(content, tmp_path):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert error(path).startswith(f"{path}: expected a readable safetensors file")


@pytest.mark.parametrize("kept", [4, 20, 0.5, -1])
def test_truncated_files_are_named(kept, tmp_path):
    """Cut in the length, in the header, in the arrays, and by one byte."""
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if kept == 0.5 else kept])
    assert error(tmp_path).startswith(f"{path}: expected a readable safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt"])
def test_pickles_are_refused_unread(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    for place in path, tmp_path:
        message = error(place)
        assert message.startswith(f"{path}: expected safetensors; loading a pickle can run any code")
        assert "save_pretrained" in message


def test_gguf_is_refused(tmp_path):
    path = tmp_path / "model.Q4_0.gguf"
    path.write_bytes(b"GGUF")
    for place in path, tmp_path:
        assert error(place).startswith(f"{path}: expected safetensors; GGUF holds quantized weights")


def test_a_folder_without_weights_is_named(tmp_path):
    assert error(tmp_path) == f"{tmp_path}: expected model.safetensors or model.safetensors.index.json in this folder"


def test_numbers_of_eight_bits_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    assert re.fullmatch(rf"{path}: expected arrays of F64, .*, got w of F8_E4M3", error(path))


def test_absent_shards_are_all_named(shards):
    for name in "one.safetensors", "two.safetensors":
        (shards / name).unlink()
    index = shards / "model.safetensors.index.json"
    assert error(shards) == f"{index}: expected these files beside it: one.safetensors, two.safetensors"


def test_an_index_that_does_not_match_its_files(tmp_path):
    files = {"one.safetensors": {"a": ARRAYS["a"], "c": ARRAYS["b"]}}
    save_shards(tmp_path, files, {"a": "one.safetensors", "b": "one.safetensors"})
    index = tmp_path / "model.safetensors.index.json"
    assert error(tmp_path) == (
        f"{index}: expected an index that matches the files: "
        "b is not in one.safetensors; c of one.safetensors is not in the index"
    )


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert error(tmp_path).endswith("model.safetensors: expected a readable safetensors file, got something else")


@pytest.mark.parametrize(
    "content",
    [
        *(
            "{",
            "[]",
            "{}",
            '{"weight_map": []}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": "../b"}}',
            "[" * 5_000,
        ),
        '{"weight_map": {"a": "' + 5_000 * "b" + '"}}',
    ],
)
def test_a_damaged_index_is_named(content, tmp_path):
    """Its files must be in the same folder."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert error(tmp_path) == f"{index}: expected JSON with weight_map, an object of array -> file name"
