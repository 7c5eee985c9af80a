"""One device or many, on one code path: a mesh of all devices, rows of a batch laid over it, parameters on each."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def mesh():
    """All devices on one axis, "data". Axes are Auto: XLA places what the program does not say."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh):
    """The pytree on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch, mesh):
    """Rows (the first axis) of every array spread over the devices, which must divide their number."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def gather(tree):
    """The pytree as NumPy arrays on the host."""
    return jax.tree.map(np.asarray, tree)
