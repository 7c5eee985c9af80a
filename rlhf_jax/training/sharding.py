"""One code path for one device or many: a batch's rows are spread over a mesh of all devices, parameters are copied."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.errors import InputError


def devices():
    """All devices. Raises InputError where JAX_PLATFORMS requests a kind of device that is not there."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where this JAX was built without CUDA
        requested, why = os.environ.get("JAX_PLATFORMS", ""), str(error).split("\n")[0]
        expected = "a kind of device that this machine and this JAX have, or nothing"
        raise InputError(f"JAX_PLATFORMS: expected {expected}, got {requested!r} {f'({why})' * bool(why)}") from None


def mesh():
    """All devices on one axis, "data". Axes are Auto: XLA chooses every placement that the program leaves open."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh):
    """The pytree on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch, mesh):
    """Spreads the rows (the first axis) of every array over the devices; these must divide the number of rows."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def gather(tree):
    """The pytree as NumPy arrays on the host."""
    return jax.tree.map(np.asarray, tree)
