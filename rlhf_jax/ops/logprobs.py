"""Log-probabilities of chosen tokens, and the only shift by one in the project.

A language model's output at position t scores the token at t + 1. Only `before` applies this shift.
"""

import math

import jax
import jax.numpy as jnp

from rlhf_jax.ops import sharded


def before(x_BT, count):
    """The `count` entries of x one position before the last `count` tokens: x_BT[:, -count-1:-1].

    Logits, hidden states and values at these positions belong to the last `count` tokens. In a prompt followed by
    its response, `before(hidden_BTD, R)` predicts the R response tokens, and `before(hidden_BTD, T - 1)` every token
    but the first. x may have axes after T.
    """
    return x_BT[:, -count - 1 : -1]


def predicted(real_BT):
    """Which of the tokens after the first [B, T - 1] are real and stand after a real one, which predicts them."""
    real_BT = real_BT.astype(bool)
    return real_BT[:, 1:] & before(real_BT, real_BT.shape[1] - 1)


def scale(logits, temperature):
    """Logits / temperature in float32 or wider. Sampler, learner and reference all take the softmax of this."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature


def gather(logits_TV, targets_T, *, temperature=1.0):
    """log softmax(logits / temperature)[t, targets[t]], in nats, shape of targets.

    logits_TV[t] must already be the distribution *of* targets_T[t] (see `before`). Both may have leading axes.
    """
    logits_TV = scale(logits_TV, temperature)
    chosen_T = jnp.take_along_axis(logits_TV, targets_T[..., None], axis=-1)[..., 0]
    return chosen_T - jax.nn.logsumexp(logits_TV, axis=-1)


def entropy(logits_TV, *, temperature=1.0):
    """Entropy of softmax(logits / temperature) in nats, >= 0: log-sum-exp minus the mean logit."""
    logits_TV = scale(logits_TV, temperature)
    logp_TV = jax.nn.log_softmax(logits_TV, axis=-1)
    return jnp.maximum(-jnp.sum(jnp.exp(logp_TV) * logp_TV, axis=-1), 0)


def chunked(function, hidden, *arrays, chunk):
    """function(hidden_XD, *arrays), computed for `chunk` tokens a device at a time; X stands for any number of axes.

    `function` computes logits over the vocabulary and from them a few numbers per token. The backward pass recomputes
    a chunk's logits, so neither pass holds a [B, T, V] array. Every array begins with the token axes X and may have
    more; the results have only X.
    """
    axes = hidden.shape[:-1]
    devices = sharded.shards() if axes and axes[0] % sharded.shards() == 0 else 1
    tokens = math.prod(axes) // devices  # of a device
    if tokens <= chunk:
        return function(hidden, *arrays)

    def fold(x):
        """Each device's tokens as chunks: [chunks, devices x chunk, ...]."""
        x = x.reshape(devices, tokens, *x.shape[len(axes) :])
        x = jnp.pad(x, [(0, 0), (0, -tokens % chunk)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(devices, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return sharded.constrain(x.reshape(-1, devices * chunk, *x.shape[3:]), None, sharded.ROWS)

    def unfold(x):
        x = x.reshape(-1, devices, chunk).swapaxes(0, 1).reshape(devices, -1)
        return sharded.rows(x[:, :tokens].reshape(axes))

    out = jax.lax.map(lambda part: jax.checkpoint(function)(*part), jax.tree.map(fold, (hidden, *arrays)))
    return jax.tree.map(unfold, out)
