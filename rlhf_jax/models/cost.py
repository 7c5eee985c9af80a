"""What a GPT-2 has to compute and to read, counted from its Config.

Counted are matrix products, in FLOPs: a multiplication with its addition is two. Norms, softmax, GELU and the look-up
of embeddings are not; in all but the narrowest models they are a few percent. Of attention what a causal mask leaves
is counted, of the last layer what the tokens that are asked for need (`select` in gpt2.py). A backward pass costs twice
its forward pass, once for the gradient of each factor; what is computed twice to save memory counts once.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.models import heads


def trunk(config, tokens, first, asked):
    """FLOPs of the hidden states of `asked` tokens from number `first` on (counted from 0), of a sequence of `tokens`.

    Every layer but the last is computed for all tokens; the last makes keys and values of all, and goes on with those
    that are asked for.
    """
    all_pairs = tokens * (tokens + 1) // 2
    asked_pairs = sum(range(first + 1, first + asked + 1))
    return (config.layers - 1) * _layer(config, tokens, tokens, all_pairs) + _layer(config, tokens, asked, asked_pairs)


def step(config, seen):
    """FLOPs of the hidden state of one more token after `seen` tokens whose keys and values are cached."""
    return config.layers * _layer(config, 1, 1, seen + 1)


def _layer(config, tokens, queries, pairs):
    """pairs: how many keys the queries see, summed."""
    width, inner = config.width, config.heads * config.head_size
    keys_and_values = tokens * 2 * width * 2 * inner
    rest = queries * 2 * (width * inner + inner * width + 2 * width * 4 * width)  # queries, out, feed-forward layer
    return keys_and_values + rest + pairs * 2 * 2 * inner  # scores, and the mix of values


def logits(config):
    """FLOPs of a token's projection on the vocabulary."""
    return 2 * config.width * config.vocab_size


def scalar(config):
    """FLOPs of a token's score or value, from its hidden state."""
    return 2 * config.width


def step_bytes(config, batch, seen):
    """Bytes that one decode step must read at least, for `batch` rows that have seen `seen` tokens each: every weight
    once, and the keys and values so far. Weights count in the type of the activations, which they are turned into."""
    cached = 2 * config.layers * config.heads * config.head_size * seen * batch
    return (_step_weights(config) + cached) * jnp.dtype(config.dtype).itemsize


def _step_weights(config):
    """All parameters but the tables of which a step reads single rows."""
    tree = jax.eval_shape(heads.LanguageModel(config).init, jax.random.key(0))
    read_by_row = {"wpe"} if config.tied else {"wpe", "wte"}
    return sum(leaf.size for name in tree.keys() - read_by_row for leaf in jax.tree.leaves(tree[name]))
