"""Where the arrays of a program lie on its devices. On one device, or without a mesh, all of this does nothing.

The mesh is that of JAX's context, which training/sharding.py sets around a compiled function. Rows of a batch are
spread over its axes "data" and "fsdp", which also divides the parameters; heads and the feed-forward layer over
"tensor". Inside `by_rows` a function sees the rows of its own device, and only "tensor" is left to the compiler.
"""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

ROWS = ("data", "fsdp")


def sizes():
    """{axis: number of devices} of the axes that the compiler lays arrays over, where there are several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind is AxisType.Auto and size > 1}


def shards():
    """The number of parts that rows are spread over."""
    return math.prod(size for name, size in sizes().items() if name in ROWS)


def spec(shape, axes, sizes):
    """The PartitionSpec of an array: for each dimension an axis or a tuple of them, left out where it does not divide.

    Axes of one device and trailing Nones are left out, as JAX takes specs that differ in these for different ones.
    """
    kept: list = []
    for length, axis in zip(shape, axes, strict=False):
        names = tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name in sizes)
        divides = names and length % math.prod(sizes[name] for name in names) == 0
        kept.append((names if len(names) > 1 else names[0]) if divides else None)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def constrain(x, *axes):
    """x, laid over these axes of the mesh; dimensions without an axis are whole on every device."""
    found = sizes()
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, found)) if found else x


def rows(tree):
    """The arrays with their first dimension spread over the devices, and all others whole."""
    return jax.tree.map(lambda x: constrain(x, ROWS), tree)


def whole(tree):
    """The arrays whole on every device."""
    return jax.tree.map(constrain, tree)


def by_rows(function, params, *rows):
    """function(params, *rows), where each device computes with its own rows and all of params, and waits for no other.

    The results must have rows too. Devices along "tensor" share the rows and the parameters, as the compiler decides.
    """
    found = sizes()
    if shards() == 1:
        return function(params, *rows)
    axes = set(ROWS) if "tensor" in found else set(jax.sharding.get_abstract_mesh().axis_names)
    specs = (PartitionSpec(), *(PartitionSpec(ROWS) for _ in rows))
    mapped = jax.shard_map(function, in_specs=specs, out_specs=PartitionSpec(ROWS), axis_names=axes, check_vma=False)
    # What was cast before is gathered as it is now, and once.
    return mapped(jax.lax.optimization_barrier(params), *rows)
