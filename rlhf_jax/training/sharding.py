"""One code path for one device or many: rows and parameters are laid over a mesh of all devices.

A mesh has three axes. Rows of a batch are spread over data x fsdp. Parameters, gradients and optimizer states are
divided by fsdp (Zhao et al. 2023, arXiv 2304.11277) and, in the products of a layer, by tensor (Shoeybi et al. 2019,
arXiv 1909.08053), as RULES say for every family of models; along data they are copies. ops/sharded.py has what a
program says of its own arrays, and XLA chooses what it leaves open (GSPMD: Xu et al. 2021, arXiv 2105.04663).
"""

import contextlib
import dataclasses
import functools
import math
import os
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax import hosts
from rlhf_jax.errors import InputError
from rlhf_jax.fields import number
from rlhf_jax.ops import sharded

AXES = ("data", "fsdp", "tensor")
# By the end of a parameter's path, in any tree: policy, value/trunk, optimizer/policy/.../mu. The first match counts.
RULES = (
    (r"(wte|unembed)/embedding", ("tensor", "fsdp")),
    (r"wpe/embedding", (None, "fsdp")),
    (r"(qkv|fc)/kernel", ("fsdp", "tensor")),
    (r"(qkv|fc)/bias", ("tensor",)),
    (r"(out|proj)/kernel", ("tensor", "fsdp")),
    (r"(qkv|fc)/a", ("fsdp",)),  # adapters: the rank is left whole
    (r"(qkv|fc)/b", (None, "tensor")),
    (r"(out|proj)/a", ("tensor",)),
    (r"(out|proj)/b", (None, "fsdp")),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How devices share the work: data x fsdp x tensor is their number. No number of a run depends on it."""

    # Parts that rows are spread over, with a copy of the parameters each; -1: the devices that the others leave.
    data: int = number(-1, least=-1, neutral=True)
    fsdp: int = number(1, least=1, neutral=True)  # parts that rows, parameters and optimizer states are spread over
    tensor: int = number(1, least=1, neutral=True)  # parts of each layer's heads, a divisor of their number

    def problems(self):
        """Checks of one field."""
        if self.data == 0:
            yield "data", "-1 (all devices that are left), or at least 1"

    def shape(self, devices):
        """(data, fsdp, tensor) of so many devices; InputError where the mesh does not multiply to them."""
        rest = self.fsdp * self.tensor
        data = devices // rest if self.data == -1 else self.data
        if data * rest != devices:
            field, value = ("fsdp", self.fsdp) if self.data == -1 else ("data", self.data)
            parts = f"{'data' if self.data == -1 else self.data} x {self.fsdp} x {self.tensor}"
            expected = f"data x fsdp x tensor to be the number of devices = {devices}"
            raise InputError(f"mesh.{field}: expected {expected}, got {value} in {parts}")
        return data, self.fsdp, self.tensor


def devices():
    """All devices. Raises InputError where JAX_PLATFORMS requests a kind of device that is not there."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where this JAX was built without CUDA
        requested, why = os.environ.get("JAX_PLATFORMS", ""), str(error).split("\n")[0]
        expected = "a kind of device that this machine and this JAX have, or nothing"
        raise InputError(f"JAX_PLATFORMS: expected {expected}, got {requested!r} {f'({why})' * bool(why)}") from None


def mesh(config=Config(), devices=None):
    """The mesh of all devices, or of the given ones. Its axes are Auto: XLA chooses what the program leaves open."""
    shape = config.shape(len(devices or jax.devices()))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_of(tree):
    """The mesh that the arrays of a tree lie on; where they lie on none, that of all devices."""
    placed = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((where.mesh for where in placed if isinstance(where, NamedSharding)), None) or mesh()


def shards(mesh):
    """The number of parts that rows are spread over."""
    return math.prod(mesh.shape[name] for name in sharded.ROWS)


def jit(function, mesh, jit=jax.jit, **options):
    """jit(function, **options), compiled for the mesh. Its arguments must be placed on it already.

    A partial of the same function with equal arguments is the same program, and is traced and compiled once in a
    process: several seeds, or runs of equal sizes one after the other, begin without waiting.
    """
    if jit is jax.jit and isinstance(function, functools.partial):
        keywords, how = (tuple(sorted(named.items())) for named in (function.keywords, options))
        with contextlib.suppress(TypeError):  # an argument that cannot be compared
            return _program(function.func, function.args, keywords, how, mesh)
    return _jit(function, mesh, jit, **options)


@functools.lru_cache(maxsize=64)
def _program(function, args, keywords, options, mesh):
    return _jit(functools.partial(function, *args, **dict(keywords)), mesh, jax.jit, **dict(options))


def _jit(function, mesh, jit, **options):
    if mesh.size == 1:
        return jit(function, **options)

    @functools.wraps(function)
    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return jit(on_mesh, **options)


def shardings(tree, mesh):
    """The NamedSharding of each array of a tree of parameters, optimizer states and whatever is beside them."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(tree, _sizes(mesh)), is_leaf=_is_spec)


def place(tree, mesh):
    """The tree on the devices, as RULES say."""
    return _put(tree, shardings(tree, mesh))


def like(shapes, mesh):
    """The shapes of a tree, each where `place` puts its array."""
    where = shardings(shapes, mesh)
    return jax.tree.map(lambda x, there: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), shapes, where)


def keep(tree):
    """Within a compiled function: the tree of parameters as RULES say, so that an update does not change its layout."""
    sizes = sharded.sizes()
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, _specs(tree, sizes)) if sizes else tree


def undivided(tree, mesh):
    """A line about the parameters that RULES would divide, and that an axis of the mesh does not divide; or nothing."""
    sizes, found = _sizes(mesh), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        wanted = {axis for axis in _rule(path) if axis in sizes}
        if missing := wanted - set(sharded.spec(leaf.shape, _rule(path), sizes)):
            found.append(f"{_name(path)} {list(leaf.shape)} by {' and '.join(sorted(missing))}")
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"mesh: left whole, as it does not divide them: {', '.join(found[:3])}{more}"


def shard(batch, mesh):
    """Spreads the rows (the first axis) of every array over data x fsdp, which must divide the number of rows."""
    return _put(batch, jax.tree.map(lambda _: rows(mesh), batch))


def rows(mesh):
    """The NamedSharding of arrays whose rows are spread over data x fsdp."""
    return NamedSharding(mesh, sharded.spec((shards(mesh),), (sharded.ROWS,), _sizes(mesh)))


def everywhere(tree):
    """The tree with each array on all devices of all hosts: those of this host alone, the same on each, are copied."""
    if not hosts.several() or all(map(_is_shared, jax.tree.leaves(tree))):
        return tree
    mesh = mesh_of(tree)
    return jax.tree.map(lambda x: x if _is_shared(x) else _share(x, NamedSharding(mesh, PartitionSpec())), tree)


def gather(tree):
    """The pytree as NumPy arrays on the host; of several hosts, the whole arrays on each of them, which all call it."""
    return jax.tree.map(_gather, tree)


def of_each_host(array):
    """[hosts, ...]: a NumPy array of each host, on all of them."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array)


def rows_here(array):
    """The rows of a batch's array that this host has, as NumPy; all of them where there is one host."""
    if not hosts.several() or _is_whole(array):
        return np.asarray(array)
    places = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(places[start]) for start in sorted(places)])


def _put(tree, where):
    """The tree, laid out so. Of several hosts, each has the whole arrays, or the arrays are laid out already."""
    if not hosts.several():
        return jax.device_put(tree, where)
    return jax.tree.map(_share, tree, where)


def _share(x, where):
    if _is_shared(x):
        return x if x.sharding.is_equivalent_to(where, x.ndim) else jax.device_put(x, where)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _share(jax.random.key_data(x), NamedSharding(where.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def _is_shared(x):
    """Whether an array lies on devices of several hosts."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _is_whole(x):
    """Whether this host has all of an array."""
    return not _is_shared(x) or x.is_fully_replicated


def _gather(x):
    if _is_whole(x):
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def _sizes(mesh):
    return {name: size for name, size in mesh.shape.items() if size > 1}


def _specs(tree, sizes):
    return jax.tree_util.tree_map_with_path(lambda path, x: sharded.spec(np.shape(x), _rule(path), sizes), tree)


def _is_spec(x):
    return isinstance(x, PartitionSpec)


def _rule(path):
    name = _name(path)
    return next(axes for rule, axes in RULES if re.search(rf"(^|/){rule}$", name))


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
