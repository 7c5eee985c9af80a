import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from rlhf_jax.models import decoder, heads, lora
from rlhf_jax.ops import sharded
from rlhf_jax.training import optim, sharding
from tests.support import error


@pytest.fixture(scope="module")
def trained():
    """The report of train_on_devices.py, by mesh: data, fsdp, tensor."""
    # NPROC: with fewer threads than devices, XLA's virtual devices can wait for each other forever.
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    flags = {"XLA_FLAGS": devices, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).parents[1] / "train_on_devices.py"],
        env=os.environ | flags | cache,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_device_and_eight_agree(trained):
    """invariants 8 and 11: in every metric, parameter and token, with lanes and without; no two rows share noise."""
    assert trained["completions"] > 8  # of four prompts: with the same noise on every device there were fewer
    for mesh in "8,1,1", "2,4,1", "4,1,2":
        found = trained[mesh]
        assert found["tokens"] == 0
        assert max(found["metrics"].values()) <= 1, found["metrics"]  # 1e-5 of the number; of a KL 1e-6 too
        assert max(found["arrays"].values()) <= 1, found["arrays"]  # 1e-5 of the largest entry
        assert set(found["moved"].values()) == {0}  # arrays of the state that an update lays out anew


def test_the_work_is_divided(trained):
    """Each of eight devices has at most 1.25 eighths of the FLOPs. An update that gathered its minibatch had all."""
    for mesh in "8,1,1", "2,4,1":
        shares = {name: share["flops"] * 8 for name, share in trained[mesh]["share"].items()}
        assert max(shares.values()) <= 1.25, shares
    assert {"ppo draw", "ppo judge", "ppo update", "grpo update", "sft", "reward", "dpo"} <= shares.keys()


def test_no_device_waits_for_another_while_it_samples(trained):
    """Without `tensor`, nothing is sent within the loops of sampling; an update gathers parameters in its own."""
    for mesh in "8,1,1", "2,4,1":
        assert trained[mesh]["inner"]["ppo draw"] == 0 < trained[mesh]["inner"]["ppo update"]


def test_parameters_and_memory_are_divided(trained):
    """fsdp = 4 divides parameters and Adam's moments; norms, biases and the rollout's copies are whole."""
    four = trained["fsdp of 4"]
    assert four["arguments"] <= 0.35 and four["temp"] <= 0.35, four
    assert trained["8,1,1"]["share"]["ppo update"]["arguments"] > 0.9


SIZES = {"layers": 1, "heads": 4, "kv_heads": 2, "head_size": 4, "width": 8, "context": 8, "vocab_size": 16}
LLAMA = {"norm": "rms", "biases": "none", "feed_forward": "swiglu", "rotary_share": 1.0, "tied": False}
MESH = AbstractMesh((1, 4, 2), sharding.AXES)


def specs(tree):
    found = jax.tree.map(lambda where: where.spec, sharding.shardings(tree, MESH))
    return {sharding._name(path): tuple(spec) for path, spec in jax.tree.leaves_with_path(found)}


@pytest.mark.parametrize("family", [{}, LLAMA])
def test_rules_of_each_family(family):
    """Every matrix is divided by fsdp and tensor, in whatever tree it stands; norms and heads are whole."""
    config = decoder.Config(**SIZES | family)
    policy = jax.eval_shape(heads.LanguageModel(config).init, jax.random.key(0))
    found = specs({"value": {"trunk": policy}, "optimizer": {"policy": ({"mu": policy},)}})
    matrices = {
        "qkv": ("fsdp", "tensor"),
        "fc": ("fsdp", "tensor"),
        "out": ("tensor", "fsdp"),
        "proj": ("tensor", "fsdp"),
    }
    for name, spec in found.items():
        *_, part, leaf = name.split("/")
        expected = {"kernel": matrices.get(part), "embedding": (None if part == "wpe" else "tensor", "fsdp")}.get(
            leaf, ()
        )
        if leaf == "bias" and part in ("qkv", "fc"):
            expected = ("tensor",)
        assert spec == expected, name
    adapters = jax.eval_shape(lambda key: lora.init(key, policy, lora.Config(rank=4)), jax.random.key(0))
    found = specs(adapters)
    assert found["h_0/attn/qkv/a"] == ("fsdp",) and found["h_0/attn/qkv/b"] == (None, "tensor")
    assert found["h_0/mlp/proj/a"] == ("tensor",) and found["h_0/mlp/proj/b"] == (None, "fsdp")


def test_what_does_not_divide_is_left_whole_and_said():
    tree = {"wte": {"embedding": jnp.zeros((17, 8))}, "h_0": {"attn": {"qkv": {"kernel": jnp.zeros((6, 8))}}}}
    assert specs(tree) == {"wte/embedding": (None, "fsdp"), "h_0/attn/qkv/kernel": (None, "tensor")}
    line = sharding.undivided(tree, MESH)
    assert "wte/embedding [17, 8] by tensor" in line and "qkv/kernel [6, 8] by fsdp" in line and "\n" not in line
    assert sharding.undivided(tree, AbstractMesh((8, 1, 1), sharding.AXES)) == ""


def test_a_spec_has_one_form():
    """JAX takes (None,) and () for different, and would compile again."""
    sizes = {"fsdp": 4}
    assert sharded.spec((8, 3), ("fsdp", None), sizes) == PartitionSpec("fsdp")
    assert sharded.spec((8, 3), ("tensor", "fsdp"), sizes) == PartitionSpec()
    assert sharded.spec((8,), (sharded.ROWS,), sizes) == PartitionSpec("fsdp")
    assert sharded.spec((8,), (sharded.ROWS,), {"data": 2, "fsdp": 4}) == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            {"data": 3},
            8,
            "mesh.data: expected data x fsdp x tensor to be the number of devices = 8, got 3 in 3 x 1 x 1",
        ),
        (
            {"fsdp": 3},
            8,
            "mesh.fsdp: expected data x fsdp x tensor to be the number of devices = 8, got 3 in data x 3 x 1",
        ),
        (
            {"tensor": 4},
            2,
            "mesh.fsdp: expected data x fsdp x tensor to be the number of devices = 2, got 1 in data x 1 x 4",
        ),
    ],
)
def test_a_mesh_that_is_not_all_devices_is_refused(config, devices, message):
    assert error(sharding.Config(**config).shape, devices) == message


def test_the_mesh_takes_the_devices_that_are_left():
    assert sharding.Config(fsdp=2, tensor=2).shape(8) == (2, 2, 2)
    assert sharding.Config().shape(1) == (1, 1, 1)


def test_equal_programs_are_compiled_once(compilations):
    """A partial of the same function with equal arguments; what cannot be compared is compiled by itself."""

    def added(x, *, config, by=0):
        return x + config.lr + by

    def compiled(**parts):
        return sharding.jit(functools.partial(added, **parts), sharding.mesh())

    x, config = jnp.zeros(3), optim.Config(lr=0.5)
    with compilations() as names:
        for _ in range(2):  # equal, not the same
            np.testing.assert_array_equal(compiled(config=optim.Config(lr=0.5))(x), 0.5)
            np.testing.assert_array_equal(compiled(config=config, by=1)(x), 1.5)
    assert names == ["added"] * 2
    assert compiled(config=config) is not compiled(config=optim.Config(lr=0.25))
    assert optim.adamw(config, 3) is optim.adamw(optim.Config(lr=0.5), 3) is not optim.adamw(config, 4)
    one, other = (compiled(config=config, by=jnp.ones(3)) for _ in range(2))
    np.testing.assert_array_equal(one(x), other(x))
    assert one is not other


def test_there_and_back():
    mesh = sharding.mesh()
    assert mesh.axis_names == sharding.AXES and mesh.size == jax.device_count()
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.ones(4, bool), None)}
    for placed in sharding.shard(tree, mesh), sharding.place(tree, mesh):
        back = sharding.gather(placed)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(back))
        jax.tree.map(np.testing.assert_array_equal, back, tree)
