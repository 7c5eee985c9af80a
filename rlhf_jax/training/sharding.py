"""One code path for one device or many: a batch's rows are spread over a mesh of all devices, parameters are copied."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


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
