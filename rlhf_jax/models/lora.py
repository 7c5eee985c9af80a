"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): the base stays frozen, and each chosen matrix W learns a sum.

    x W  ->  x W + (alpha / rank) (x A) B,        A [in, rank] ~ N(0, 1 / in),   B [rank, out] = 0 at first

Adapters are a tree of their own, {"h_0": {"attn": {"qkv": {"a", "b"}, "out": ...}, "mlp": {"fc", "proj"}}, ...}: what a
TrainState calls policy, reference, value and reward are then adapters (and heads), and everything that reads, updates,
copies or saves parameters treats them as any others. All of them stand on one Base, which only the models read.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from rlhf_jax.fields import number

PRODUCTS = ("qkv", "out", "fc", "proj")  # the matrices of a layer; with SwiGLU fc is the gate and what it gates


@dataclasses.dataclass(frozen=True)
class Config:
    """Adapters of which matrices, and of what rank."""

    rank: int = number(0, least=0)  # of each adapter; 0: no adapters, every parameter is trained
    alpha: float = number(32.0, above=0)  # the adapter's result is scaled by alpha / rank
    products: str = ",".join(PRODUCTS)  # the matrices that have one, with commas: qkv, out, fc, proj

    @property
    def names(self):
        """The products as a tuple."""
        return tuple(name.strip() for name in self.products.split(","))

    def problems(self):
        """Checks of the products' names."""
        if not set(self.names) <= set(PRODUCTS) or len(set(self.names)) < len(self.names):
            yield "products", f"some of {','.join(PRODUCTS)}, each once"

    def unused(self):
        """Fields without effect, and why."""
        if not self.rank:
            yield "alpha", "rank is 0"
            yield "products", "rank is 0"


def init(key, shapes, config):
    """Adapters for a tree of parameters (or of their shapes); the model is then the base itself."""
    adapters: dict[tuple, Any] = {}
    for i, (path, shape) in enumerate(_adapted(shapes, config).items()):
        rows, columns = shape
        a = jax.random.normal(jax.random.fold_in(key, i), (rows, config.rank)) / rows**0.5
        adapters |= {(*path, "a"): a, (*path, "b"): jnp.zeros((config.rank, columns))}
    return unflatten_dict(adapters)


def merge(params, adapters, config):
    """The parameters with each adapter added to its matrix: the same model without adapters."""
    leaves, parts = flatten_dict(params), flatten_dict(adapters)
    for path in _adapted(params, config):
        a, b = (jnp.asarray(parts[(*path, name)]) for name in ("a", "b"))
        leaves[(*path, "kernel")] = leaves[(*path, "kernel")] + (a @ b) * (config.alpha / config.rank)
    return unflatten_dict(leaves)


def _adapted(params, config):
    """{path without "kernel": shape} of the matrices that have an adapter."""
    leaves = {tuple(path): leaf for (*path, name), leaf in flatten_dict(params).items() if name == "kernel"}
    return {path: leaf.shape for path, leaf in leaves.items() if path[-1] in config.names}


class Base:
    """The frozen parameters that all adapters of a run stand on, read once, when they are first needed.

    `jit` compiles a function of adapters into one that is given these parameters too: as an argument, so that a
    program neither holds nor copies them. Models read `params`, which within such a function are its argument.
    """

    def __init__(self, config: Config, read: Callable[[], Any]):
        self.config, self._read, self._given = config, read, None

    @functools.cached_property
    def stored(self):
        """The parameters, or their shapes where only shapes are needed."""
        return self._read()

    @property
    def params(self):
        """The parameters, as the models read them."""
        return self.stored if self._given is None else self._given

    def variables(self, adapters):
        """What the decoder is applied to: its parameters, and adapters whose scale is part of B."""
        scale = self.config.alpha / self.config.rank
        scaled = {(*path, "b"): scale * leaf for (*path, name), leaf in flatten_dict(adapters).items() if name == "b"}
        return {"params": self.params, "lora": unflatten_dict(flatten_dict(adapters) | scaled)}

    def jit(self, function, jit=jax.jit, **options):
        """jit(function, **options) of a function that calls models on this base.

        options: donate_argnums, static_argnums, each one number.
        """
        return _Compiled(self, function, jit, options)

    @contextlib.contextmanager
    def given(self, params):
        """Within this, the models read these parameters."""
        before, self._given = self._given, params
        try:
            yield
        finally:
            self._given = before


class _Compiled:
    """What Base.jit returns: called and lowered like a function of jax.jit, without the parameters of the base."""

    def __init__(self, base, function, jit, options):
        def with_base(params, *args):
            with base.given(params):
                return function(*args)

        for name in options.keys() & {"donate_argnums", "static_argnums"}:
            options[name] += 1  # with_base has one more argument
        self._base, self._compiled, self.__wrapped__ = base, jit(with_base, **options), function

    def __call__(self, *args):
        return self._compiled(self._base.stored, *args)

    def trace(self, *args):
        """As that of jax.jit's functions."""
        return self._compiled.trace(self._base.stored, *args)

    def lower(self, *args):
        """As that of jax.jit's functions."""
        return self._compiled.lower(self._base.stored, *args)

    def eval_shape(self, *args):
        """As that of jax.jit's functions."""
        return self._compiled.eval_shape(self._base.stored, *args)
