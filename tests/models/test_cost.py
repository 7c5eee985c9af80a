"""By hand, and against the count of XLA before it optimizes a program; XLA counts a loop once."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models import cost, decoder
from rlhf_jax.models.families import neox
from rlhf_jax.models.families.llama import LLAMA
from rlhf_jax.models.heads import LanguageModel, ScalarModel

HAND = decoder.Config(layers=1, heads=1, head_size=2, width=3, context=4, vocab_size=5)
WIDE = decoder.Config(layers=3, heads=4, head_size=32, width=128, context=128, vocab_size=512)
NEOX = dataclasses.replace(WIDE, **neox.NEOX | {"context": 128})
GROUPED = dataclasses.replace(WIDE, **LLAMA | {"kv_heads": 2, "feed_forward_size": 340})
# XLA also counts norms, GELU (more for the exact one), the rotation of keys, and most of the masked pairs.
MORE = {WIDE: 1.06, NEOX: 1.12, GROUPED: 1.12}


def test_a_layer_by_hand():
    """Keys and values of a token: 3 x 4 products, 24 FLOPs. The part of a query: 3 x 2 for it, 2 x 3 after the mix,
    3 x 12 and 12 x 3 in the feed-forward layer: 84, 168 FLOPs. A query with a key: 2 for the score, 2 to mix: 8."""
    assert cost.trunk(HAND, tokens=4, first=2, count=1) == 4 * 24 + 168 + 3 * 8
    assert cost.trunk(HAND, tokens=4, first=1, count=2) == 4 * 24 + 2 * 168 + (2 + 3) * 8
    assert cost.step(HAND, seen=3) == 24 + 168 + 4 * 8
    assert (cost.logits(HAND), cost.scalar(HAND)) == (2 * 3 * 5, 2 * 3)


def test_a_layer_of_llama_by_hand():
    """Two heads of size 2 read one of keys and values: 3 x 4 products, 24 FLOPs a token. The part of a query: 3 x 4
    twice and three products of 3 x 7, 87 or 174 FLOPs; a pair: 4 for the scores, 4 to mix, 16. Cached per token and
    row: 2 + 2 numbers, not the 4 + 4 of the query heads."""
    llama = dataclasses.replace(HAND, heads=2, kv_heads=1, feed_forward="swiglu", feed_forward_size=7)
    assert cost.trunk(llama, tokens=4, first=2, count=1) == 4 * 24 + 174 + 3 * 16
    more = cost.step_bytes(llama, batch=3, seen=5) - cost.step_bytes(llama, batch=3, seen=4)
    assert more == 4 * 3 * 4
    cache = jax.eval_shape(lambda: _cache(llama, rows=3, slots=5))
    assert sum(x.size for x in jax.tree.leaves((cache.keys, cache.values))) == 3 * 5 * 4


def _cache(config, rows, slots):
    model, tokens_BP = LanguageModel(config), jnp.zeros((rows, 2), jnp.int32)
    return model.prefill(model.init(jax.random.key(0)), tokens_BP, jnp.ones_like(tokens_BP), slots)[1]


def test_only_the_last_of_several_layers_is_computed_in_part():
    two = dataclasses.replace(HAND, layers=2)
    whole = 4 * 24 + 4 * 168 + (1 + 2 + 3 + 4) * 8
    assert cost.trunk(two, tokens=4, first=2, count=1) == whole + cost.trunk(HAND, tokens=4, first=2, count=1)
    assert cost.trunk(two, tokens=4, first=0, count=4) == 2 * whole
    assert cost.step(two, seen=3) == 2 * cost.step(HAND, seen=3)


def test_a_step_reads_all_weights_and_the_cache_once():
    """Weights and biases: 24 of queries, keys and values, 9 after the mix, 48 and 39 of the feed-forward layer, 18 of
    three norms, 15 of the projection onto the vocabulary. The cache has 2 keys and 2 values per token and row."""
    assert cost.step_bytes(HAND, batch=3, seen=4) == 4 * (24 + 9 + 48 + 39 + 18 + 15 + 3 * 4 * 4)
    assert cost.step_bytes(dataclasses.replace(HAND, dtype="bfloat16"), batch=3, seen=4) == 2 * (153 + 48)
    assert cost.step_bytes(dataclasses.replace(HAND, tied=False), batch=3, seen=4) == 4 * (153 + 48)


def counted(function, *args):
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize("config", [WIDE, NEOX, GROUPED], ids=["gpt2", "neox", "llama"])
def test_a_forward_pass_is_what_xla_counts(config):
    model = LanguageModel(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens_BT, token_B = jax.ShapeDtypeStruct((2, 96), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def logprobs(params, tokens_BT):
        return model.logprobs(params, tokens_BT, jnp.ones_like(tokens_BT), 40)

    flops = 2 * (cost.trunk(config, 96, first=55, count=40) + 40 * cost.logits(config))
    assert flops < counted(logprobs, params, tokens_BT) < MORE[config] * flops
    grads = jax.grad(lambda *args: logprobs(*args).sum())
    assert 3 * flops < counted(grads, params, tokens_BT) < MORE[config] * 3 * flops

    def prefill(params, tokens_BT):
        return model.prefill(params, tokens_BT, jnp.ones_like(tokens_BT), 96)

    flops = 2 * cost.trunk(config, 96, first=95, count=1)
    assert flops < counted(prefill, params, tokens_BT) < MORE[config] * flops
    _, cache = jax.eval_shape(prefill, params, tokens_BT)
    flops = 2 * cost.step(config, seen=95)
    assert flops < counted(model.decode, params, token_B, token_B, cache) < MORE[config] * flops


def test_a_score_is_what_xla_counts():
    scalar, tokens_BT = ScalarModel(WIDE), jax.ShapeDtypeStruct((2, 96), jnp.int32)
    params = jax.eval_shape(lambda key: scalar.zero_head(LanguageModel(WIDE).init(key)), jax.random.key(0))
    flops = 2 * (cost.trunk(WIDE, 96, first=95, count=1) + cost.scalar(WIDE))
    score = counted(lambda params, tokens_BT: scalar.score(params, tokens_BT, tokens_BT > 0), params, tokens_BT)
    assert flops < score < MORE[WIDE] * flops
