import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.training import sharding


def test_one_device_and_eight_agree():
    """invariants 8 and 11: in every metric, every parameter and every token; and no two rows share their noise."""
    # NPROC: with fewer threads than devices, XLA's virtual devices can wait for each other forever.
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    flags = {"XLA_FLAGS": devices, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).parents[1] / "train_on_devices.py"
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=os.environ | flags | cache,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    apart = json.loads(done.stdout.splitlines()[-1])
    assert apart.pop("rows a device") == [2] * 8
    assert apart.pop("completions") > 8  # of one prompt: with the same noise on every device there were two
    assert apart.pop("response_BR") == 0
    assert apart.keys() == {
        f"{name} {what}" for name in ("sft", "reward", "grpo", "ppo") for what in ("metrics", "parameters")
    }
    assert max(apart.values()) <= 1e-5, apart


def test_there_and_back():
    mesh = sharding.mesh()
    assert mesh.axis_names == ("data",) and mesh.size == jax.device_count()
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.ones(4, bool), None)}
    for placed in sharding.shard(tree, mesh), sharding.replicate(tree, mesh):
        back = sharding.gather(placed)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(back))
        jax.tree.map(np.testing.assert_array_equal, back, tree)
