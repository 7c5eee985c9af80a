"""FLOPs and bytes that a decoder needs, counted from its Config.

FLOPs are those of matrix products; a multiplication and its addition are two. Norms, softmax, activations, rotary
positions and the look-up of embeddings are not counted: they are a few percent in all but the narrowest models.
Attention counts the pairs that a causal mask leaves, without a window. The last layer counts what the selected tokens
need (`select` in decoder.py). A backward pass costs twice its forward pass, once for the gradient of each factor. What
is computed twice to save memory counts once.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.models import heads


def trunk(config, tokens, first, count):
    """FLOPs of the hidden states of `count` tokens, from index `first` on, in a sequence of `tokens` tokens.

    Every layer but the last is computed for all tokens. The last layer computes keys and values of all tokens, and the
    rest for the selected `count` only.
    """
    all_pairs = tokens * (tokens + 1) // 2
    pairs = sum(range(first + 1, first + count + 1))
    return (config.layers - 1) * _layer(config, tokens, tokens, all_pairs) + _layer(config, tokens, count, pairs)


def step(config, seen):
    """FLOPs of the hidden state of one more token after `seen` tokens whose keys and values are cached."""
    return config.layers * _layer(config, 1, 1, seen + 1)


def _layer(config, tokens, queries, pairs):
    """pairs: the number of (query, key) pairs that the mask leaves."""
    width, inner = config.width, config.heads * config.head_size
    keys_and_values = tokens * 2 * width * 2 * config.cached_heads * config.head_size
    matrices = 3 if config.feed_forward == "swiglu" else 2
    feed_forward = matrices * width * config.hidden_size
    rest = queries * 2 * (width * inner + inner * width + feed_forward)  # queries, out, feed-forward layer
    return keys_and_values + rest + pairs * 2 * 2 * inner  # scores, and the weighted sums of values


def logits(config):
    """FLOPs of one token's logits."""
    return 2 * config.width * config.vocab_size


def scalar(config):
    """FLOPs of one token's score or value, from its hidden state."""
    return 2 * config.width


def step_bytes(config, batch, seen):
    """Bytes that one decode step must read, for `batch` rows with `seen` tokens in the cache each.

    These are every weight once, and the cached keys and values. Weights count in the type of the activations, to which
    they are cast.
    """
    cached = 2 * config.layers * config.cached_heads * config.head_size * seen * batch
    return (_step_weights(config) + cached) * jnp.dtype(config.dtype).itemsize


def _step_weights(config):
    """Number of parameters, without the tables from which a step reads single rows."""
    tree = jax.eval_shape(heads.LanguageModel(config).init, jax.random.key(0))
    read_by_row = {"wpe"} if config.tied else {"wpe", "wte"}
    return sum(leaf.size for name in tree.keys() - read_by_row for leaf in jax.tree.leaves(tree[name]))
