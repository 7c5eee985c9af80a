"""One decoder for every family: tokens, mask, cache -> hidden states, cache. Parameters are a plain nested dict.

{"wte": {"embedding": [V, D]}, "wpe": {"embedding": [context, D]}, "ln_f": {"scale", "bias"},
 "h_0": {"ln_1", "attn": {"qkv": [D, (H + 2A)K], "out": [HK, D]}, "ln_2", "mlp": {"fc": [D, F], "proj": [F, D]}}, ...}

The defaults are GPT-2's (Radford et al. 2019). The other families (families/: GPT-NeoX, Llama, Mistral, Qwen) are the
same code with other Config fields. With rotary positions there is no "wpe"; without biases, no "bias"; with SwiGLU "fc"
is [D, 2F], the gate and then what it gates; with qk_norm, "attn" has "q_norm" and "k_norm" too.
"""

import dataclasses
from collections.abc import Callable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.errors import InputError
from rlhf_jax.fields import choice, neutral, number, path
from rlhf_jax.models import rotary
from rlhf_jax.ops import attention, sharded

BIASES = {"all": ("qkv", "out", "fc", "proj"), "attention": ("qkv", "out"), "qkv": ("qkv",), "none": ()}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a decoder, and the choices in which families differ. heads * head_size need not equal the width."""

    layers: int = number(12, least=1)  # blocks of attention and feed-forward
    heads: int = number(12, least=1)  # of attention, a block
    # Heads of keys and values, a divisor of heads: each is read by heads / kv_heads heads (Ainslie et al. 2023,
    # arXiv 2305.13245). 0: heads
    kv_heads: int = number(0, least=0)
    head_size: int = number(64, least=1)  # entries
    width: int = number(768, least=1)  # entries of the residual stream
    feed_forward: str = choice("gelu", "gelu", "swiglu")  # swiglu: silu(gate) * up (Shazeer 2020, arXiv 2002.05202)
    feed_forward_size: int = number(0, least=0)  # entries of the feed-forward layer; 0: 4 x width
    context: int = number(1024, least=1)  # most tokens of a sequence, prompt and response together
    # Most tokens that a token attends to, itself included (Mistral: arXiv 2310.06825); 0: all before it.
    window: int = number(0, least=0)
    vocab_size: int = number(0, least=0)  # tokens; 0: the tokenizer's. The extra ids of a larger one are never targets
    # Share of each head's entries that is rotated (GPT-NeoX: .25, Llama: 1); 0: learned positions.
    rotary_share: float = number(0.0, least=0, most=1)
    rotary_base: float = number(10_000.0, above=0)  # the longest wavelength is nearly 2 pi x this, in tokens
    # Llama 3.1's scaling (rotary.py: scaled). Slow rotations are this many times slower; 1: none is.
    rotary_factor: float = number(1.0, least=1)
    rotary_context: int = number(8192, least=1)  # tokens of a sequence before that scaling
    rotary_slow: float = number(1.0, above=0)  # most turns in rotary_context of a rotation that is slowed in full
    rotary_fast: float = number(4.0, above=0)  # fewest turns in it of a rotation that stays as it is
    norm: str = choice("layer", "layer", "rms")  # rms: no mean, no bias (Zhang & Sennrich 2019, arXiv 1910.07467)
    norm_eps: float = number(1e-5, above=0, most=1)  # added to the variance in norms
    qk_norm: bool = False  # queries and keys are RMS-normalized, each head by itself (Qwen3)
    biases: str = choice("all", *BIASES)  # dense layers that have one: all, attention's, those of queries/keys/values
    parallel_residual: bool = False  # attention and feed-forward read the same input (GPT-NeoX)
    exact_gelu: bool = False  # x Phi(x) (GPT-NeoX), not the tanh approximation
    tied: bool = True  # the output projection is the token embedding, not a table of its own
    # Standard deviation of random weights. Narrow models learn to copy much sooner with about 1 / sqrt(width).
    init_std: float = number(0.02, above=0, most=10)
    dropout: float = number(0.0, least=0, below=1)  # share of activations set to 0, in supervised training only
    dtype: str = choice("float32", "float32", "bfloat16")  # of the activations; parameters are float32
    fused: bool = False  # cuDNN attention for whole sequences; needs dtype bfloat16 and an NVIDIA GPU
    remat: bool = neutral(False)  # recompute layers in the backward pass: less memory (not on a CPU), a third more work
    # Weights to start from: a model.safetensors, a folder of transformers, or NAME or NAME@REVISION on the hub; empty:
    # random.
    init: str = path()

    def problems(self):
        """Checks that concern several fields."""
        entries = int(self.head_size * self.rotary_share)
        if self.rotary_share and (entries < 2 or entries % 2):
            yield "rotary_share", f"0, or a share of head_size = {self.head_size} that is an even number of entries"
        if self.kv_heads and self.heads % self.kv_heads:
            yield "kv_heads", f"0, or a divisor of heads = {self.heads}"
        if self.rotary_fast <= self.rotary_slow:
            yield "rotary_fast", f"more than rotary_slow = {self.rotary_slow:g}"

    def unused(self):
        """Fields without effect, and why."""
        if not self.rotary_share:
            for name in ("rotary_base", "rotary_factor"):
                yield name, "rotary_share is 0, and positions are learned"
        if not self.rotary_share or self.rotary_factor == 1:
            for name in ("rotary_context", "rotary_slow", "rotary_fast"):
                yield name, "no rotation is scaled (rotary_factor)"
        if self.feed_forward != "gelu":
            yield "exact_gelu", f"feed_forward is {self.feed_forward}"
        if self.window >= self.context:
            yield "window", f"context = {self.context} has no more tokens"
        if self.init:
            yield "init_std", "init is given, and no weight is random"
        if self.fused and self.dtype != "bfloat16":
            yield "fused", "it needs dtype bfloat16"

    @property
    def cached_heads(self):
        """Number of heads of keys and values, A."""
        return self.kv_heads or self.heads

    @property
    def hidden_size(self):
        """Number of entries of the feed-forward layer, F."""
        return self.feed_forward_size or 4 * self.width

    @property
    def rotary_planes(self):
        """Number of planes that a head is rotated in: half the number of its rotated entries."""
        return int(self.head_size * self.rotary_share) // 2

    @property
    def fuses(self):
        """Whether fused attention is used: it needs `fused`, bfloat16 and a GPU."""
        return self.fused and self.dtype == "bfloat16" and jax.default_backend() == "gpu"


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one [B, A, S, K] array a layer; A heads of keys and values.

    valid_BS is 1 where a slot holds a real token. New tokens are written from slot `used` on. The order of the slots
    does not matter: every valid slot holds an earlier token. position_BS is its position, kept only where the slots
    are more than the window.
    """

    keys: tuple
    values: tuple
    valid_BS: jax.Array
    used: jax.Array
    position_BS: jax.Array | None = None


class Dense(nn.Module):
    """A linear layer; `columns` computes only some of its outputs."""

    config: Config
    features: int
    biased: bool = True
    residual: bool = False  # the result is added to the residual stream

    @nn.compact
    def __call__(self, x_BTD, columns=slice(None)):
        c = self.config
        # GPT-2 scales what 2N layers add to the stream by 1 / sqrt(2N), so its variance does not grow with depth.
        std = c.init_std / (2 * c.layers) ** 0.5 if self.residual else c.init_std
        kernel = self.param("kernel", nn.initializers.normal(std), (x_BTD.shape[-1], self.features))
        flat = x_BTD.reshape(-1, x_BTD.shape[-1]) @ kernel[:, columns].astype(c.dtype)
        if self.has_variable("lora", "a"):  # an adapter (lora.py)
            low = x_BTD.reshape(-1, x_BTD.shape[-1]) @ self.get_variable("lora", "a").astype(c.dtype)
            flat = flat + low @ self.get_variable("lora", "b")[:, columns].astype(c.dtype)
        if self.biased:
            flat = flat + self.param("bias", nn.initializers.zeros_init(), (self.features,))[columns].astype(c.dtype)
        return flat.reshape(*x_BTD.shape[:-1], -1)


def _dense(config, name, features, residual=False):
    return Dense(config, features, biased=name in BIASES[config.biases], residual=residual, name=name)


class Attention(nn.Module):
    """Causal attention; `past` is this layer's (keys, values, slot to write at) or None.

    select(x [B, T, ...]) -> [B, U, ...], if given, picks the tokens that are queries; all tokens are keys and values.
    """

    config: Config
    select: Callable | None = None

    @nn.compact
    def __call__(self, x_BTD, attend_BTS, angles_BTJ, past):
        c = self.config
        queries, both = c.heads * c.head_size, (c.heads + c.cached_heads) * c.head_size
        qkv = _dense(c, "qkv", queries + 2 * c.cached_heads * c.head_size)
        if self.select is None:
            parts = jnp.split(jax.lax.optimization_barrier(qkv(x_BTD)), [queries, both], axis=-1)
            angles_q = angles_BTJ
        else:
            q = qkv(self.select(x_BTD), slice(queries))
            parts = [q, *jnp.split(qkv(x_BTD, slice(queries, None)), 2, axis=-1)]
            attend_BTS = self.select(attend_BTS)
            angles_q = None if angles_BTJ is None else self.select(angles_BTJ)
        # Heads move next to the batch: products as `bthk,bshk->bhts` are three times slower on a CPU.
        q_BHTK, k_BASK, v_BASK = (jnp.moveaxis(part.reshape(*part.shape[:2], -1, c.head_size), 1, 2) for part in parts)
        q_BHTK, k_BASK, v_BASK = (sharded.constrain(x, sharded.ROWS, "tensor") for x in (q_BHTK, k_BASK, v_BASK))
        if c.qk_norm:
            q_BHTK, k_BASK = _rms(c, "q_norm")(q_BHTK), _rms(c, "k_norm")(k_BASK)
        if angles_BTJ is not None:  # cached keys are already rotated: their positions never change
            q_BHTK, k_BASK = rotary.rotate(q_BHTK, angles_q[:, None]), rotary.rotate(k_BASK, angles_BTJ[:, None])
        if past is not None:
            keys, values, slot = past
            k_BASK = jax.lax.dynamic_update_slice_in_dim(keys, k_BASK, slot, axis=2)
            v_BASK = jax.lax.dynamic_update_slice_in_dim(values, v_BASK, slot, axis=2)
        if c.fuses and past is None:
            mixed_BHTK = attention.fused(q_BHTK, k_BASK, v_BASK, attend_BTS)
        else:
            causal = past is None and self.select is None
            mixed_BHTK = attention.attend(q_BHTK, k_BASK, v_BASK, attend_BTS, causal=causal)
        mixed = jnp.moveaxis(mixed_BHTK, 1, 2).reshape(*parts[0].shape)
        out = _dense(c, "out", c.width, residual=True)
        return out(jax.lax.optimization_barrier(mixed)), (k_BASK, v_BASK)


class MLP(nn.Module):
    """The feed-forward layer: width -> feed_forward_size -> width, with GELU or a gate between."""

    config: Config

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        if c.feed_forward == "swiglu":
            gate_BTF, up_BTF = jnp.split(_dense(c, "fc", 2 * c.hidden_size)(x_BTD), 2, axis=-1)
            h_BTF = jax.nn.silu(gate_BTF) * up_BTF
        else:
            h_BTF = jax.nn.gelu(_dense(c, "fc", c.hidden_size)(x_BTD), approximate=not c.exact_gelu)
        return _dense(c, "proj", c.width, residual=True)(sharded.constrain(h_BTF, sharded.ROWS, None, "tensor"))


class Block(nn.Module):
    """Attention, then the feed-forward layer: each reads a normalized stream and adds its result to the stream.

    With parallel_residual both read the same stream. `select` is Attention's; the block returns only these tokens.
    """

    config: Config
    deterministic: bool
    select: Callable | None = None

    @nn.compact
    def __call__(self, x_BTD, attend_BTS, angles_BTJ, past):
        dropout = nn.Dropout(self.config.dropout, deterministic=self.deterministic, name="dropout")
        normed_BTD = _norm(self.config, "ln_1")(x_BTD)
        mixed_BTD, kv = Attention(self.config, self.select, name="attn")(normed_BTD, attend_BTS, angles_BTJ, past)
        x_BTD = x_BTD if self.select is None else self.select(x_BTD)
        sum_BTD = x_BTD + dropout(mixed_BTD)
        seen_BTD = x_BTD if self.config.parallel_residual else sum_BTD
        return sum_BTD + dropout(MLP(self.config, name="mlp")(_norm(self.config, "ln_2")(seen_BTD))), kv


class Decoder(nn.Module):
    """The trunk: everything but the projection onto the vocabulary."""

    config: Config

    @nn.compact
    def __call__(self, tokens_BT, mask_BT, cache=None, *, slots=0, select=None, deterministic=True):
        """(tokens [B, T] int, mask [B, T] 1 at real tokens, cache) -> (hidden [B, T, D], cache or None).

        Positions count real tokens only, so left padding changes no real token's result. With a cache, the tokens
        follow those that it holds, and the returned cache holds both. Without one, slots > 0 returns a new cache of
        that size. select(x [B, T, ...]) -> [B, U, ...] picks the tokens whose hidden states are returned; for the
        others the last layer computes only keys and values.
        """
        c = self.config
        B, T = tokens_BT.shape
        mask_BT = mask_BT.astype(bool)
        seen = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32)
        attend_BTS = jnp.tril(jnp.ones((T, T), bool)) & mask_BT[:, None, :]
        if cache is not None:
            seen = seen + jnp.sum(cache.valid_BS, axis=1, keepdims=True, dtype=jnp.int32)
            before_BTS = jnp.broadcast_to(cache.valid_BS[:, None], (B, T, cache.valid_BS.shape[1]))
            attend_BTS = jax.lax.dynamic_update_slice_in_dim(before_BTS, attend_BTS, cache.used, axis=2)
        x_BTD = _embed(c, c.vocab_size, "wte")(tokens_BT)
        positions_BT = jnp.maximum(seen - 1, 0)
        if (T if cache is None else cache.valid_BS.shape[1]) > c.context:  # else no position can be too large
            _check(positions_BT, c.context)
        position_BS = None
        if 0 < c.window < (max(T, slots) if cache is None else cache.valid_BS.shape[1]):  # else all are within it
            position_BS = positions_BT
            if cache is not None:
                position_BS = jax.lax.dynamic_update_slice_in_dim(cache.position_BS, positions_BT, cache.used, axis=1)
            attend_BTS &= positions_BT[:, :, None] - position_BS[:, None] < c.window
        if c.rotary_share:
            angles_BTJ = rotary.angles(positions_BT, _frequencies(c))
        else:
            angles_BTJ = None
            x_BTD = x_BTD + _embed(c, c.context, "wpe")(positions_BT)
        x_BTD = nn.Dropout(c.dropout, deterministic=deterministic, name="dropout")(x_BTD)
        # remat keeps only a layer's input for the backward pass, which computes the layer a second time.
        block = nn.remat(Block) if c.remat and cache is None and not slots else Block
        layers = []
        for i in range(c.layers):
            past = None if cache is None else (cache.keys[i], cache.values[i], cache.used)
            selected = select if i == c.layers - 1 else None
            x_BTD, kv = block(c, deterministic, selected, name=f"h_{i}")(
                sharded.rows(x_BTD), attend_BTS, angles_BTJ, past
            )
            layers.append(kv)
        x_BTD = sharded.rows(_norm(c, "ln_f")(x_BTD))
        keys, values = zip(*layers, strict=True)
        if cache is not None:
            valid_BS = jax.lax.dynamic_update_slice_in_dim(cache.valid_BS, mask_BT, cache.used, axis=1)
            return x_BTD, KVCache(keys, values, valid_BS, cache.used + T, position_BS)
        if not slots:
            return x_BTD, None
        keys, values = (tuple(_widen(x_BATK, slots, axis=2) for x_BATK in each) for each in (keys, values))
        position_BS = None if position_BS is None else _widen(position_BS, slots, axis=1)
        return x_BTD, KVCache(keys, values, _widen(mask_BT, slots, axis=1), jnp.int32(T), position_BS)


def _check(positions_BT, context):
    """Refuses a position beyond the context, where a table of positions would give NaN. Padding has no position."""

    def check(largest):
        if largest >= context:
            raise InputError(f"model.context: expected at least {int(largest) + 1}, the tokens of a row, got {context}")

    if isinstance(positions_BT, jax.core.Tracer):
        jax.debug.callback(check, jnp.max(positions_BT))
    else:
        check(jnp.max(positions_BT))


def _widen(x, size, axis):
    """x padded with zeros at the end of the axis, to `size`."""
    return jnp.pad(x, [(0, size - length if i == axis else 0) for i, length in enumerate(x.shape)])


class Embed(nn.Embed):
    """A table whose rows are looked up. Devices gather it first: XLA would do so with every array that is looked up."""

    def __call__(self, inputs):
        table = self.embedding.astype(self.dtype)
        return jnp.take(sharded.constrain(table, "tensor"), inputs, axis=0)


def _embed(config, entries, name):
    init = nn.initializers.normal(config.init_std)
    return Embed(entries, config.width, name=name, dtype=config.dtype, embedding_init=init)


def _norm(config, name):
    if config.norm == "rms":
        return _rms(config, name)
    return nn.LayerNorm(epsilon=config.norm_eps, name=name, dtype=config.dtype)


def _rms(config, name):
    return nn.RMSNorm(epsilon=config.norm_eps, name=name, dtype=config.dtype)


def _frequencies(config):
    frequencies_J = rotary.frequencies(config.rotary_planes, config.rotary_base)
    if config.rotary_factor == 1:
        return frequencies_J
    turns = {"slow": config.rotary_slow, "fast": config.rotary_fast}
    return rotary.scaled(frequencies_J, config.rotary_factor, context=config.rotary_context, **turns)
