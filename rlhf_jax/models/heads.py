"""Models with a head on the trunk: a language model (policy, reference) and a scalar model (value, reward).

Each is a bundle of pure functions of a parameter pytree; algorithms receive them as `apply`. A language model's tree is
the trunk's, plus {"unembed": {"embedding": [V, D]}} if the head is not tied. The reward and the value model share one
class and one tree, {"trunk": the decoder's, "head": {"kernel" [D], "bias" []}}.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import decoder, lora
from rlhf_jax.ops import kl, logprobs

NEVER = -1e9  # the logit of an id that the tokenizer does not have


def _variables(base, params):
    """What the decoder is applied to."""
    return {"params": params} if base is None else base.variables(params)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The decoder with its projection onto the vocabulary: the token embedding if tied, else a table of its own."""

    config: decoder.Config
    chunk: int = 2048  # tokens projected onto the vocabulary at a time
    ids: int = 0  # ids that the tokenizer has; those beyond are never sampled. 0: all of the vocabulary
    base: lora.Base | None = None  # parameters that stay frozen: those of the functions below are then adapters

    def init(self, key):
        """Random parameters, or adapters with which the model is the base."""
        if self.base is None:
            return self.whole(key)
        return lora.init(key, jax.eval_shape(self.whole, key), self.base.config)

    def whole(self, key):
        """Random parameters of all of the model."""
        c, tokens_BT = self.config, jnp.zeros((1, 1), jnp.int32)
        trunk = decoder.Decoder(c).init(key, tokens_BT, jnp.ones_like(tokens_BT))["params"]
        if c.tied:
            return trunk
        table_VD = c.init_std * jax.random.normal(jax.random.fold_in(key, 0), (c.vocab_size, c.width))
        return {**trunk, "unembed": {"embedding": table_VD}}

    def _apply(self, params, *args, **how):
        return decoder.Decoder(self.config).apply(_variables(self.base, params), *args, **how)

    def hidden(self, params, tokens_BT, mask_BT, count=None, dropout_key=None):
        """The hidden state before each of the last `count` tokens, [B, count, D]; without a count, of all tokens.

        Dropout is applied only if a key is given.
        """
        how: dict[str, Any] = {} if dropout_key is None else {"deterministic": False, "rngs": {"dropout": dropout_key}}
        select = None if count is None else functools.partial(logprobs.before, count=count)
        return self._apply(params, tokens_BT, mask_BT, select=select, **how)[0]

    def logits(self, params, hidden):
        """hidden [..., D] -> logits [..., V] in float32."""
        params = params if self.base is None else self.base.params
        table_VD = params["wte" if self.config.tied else "unembed"]["embedding"].astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table_VD, preferred_element_type=jnp.float32)
        if not 0 < self.ids < self.config.vocab_size:
            return logits
        # Sampler and learner alike. Not -inf: a KL would be the difference of two of them.
        return jnp.where(jnp.arange(self.config.vocab_size) < self.ids, logits, NEVER)

    def cast(self, params):
        """The parameters with matrices in the type of the activations, as every product takes them.

        What reads them many times, such as sampling, does this once: the results are the same bits.
        """

        def one(path, leaf):
            return leaf.astype(self.config.dtype) if path[-1].key in ("kernel", "embedding") else leaf

        return jax.tree_util.tree_map_with_path(one, params)

    def prefill(self, params, tokens_BP, mask_BP, slots):
        """Reads the prompts: (hidden [B, D] of the last prompt token, cache with `slots` slots)."""
        hidden_B1D, cache = self._apply(params, tokens_BP, mask_BP, slots=slots, select=lambda x_BP: x_BP[:, -1:])
        return hidden_B1D[:, 0], cache

    def decode(self, params, token_B, mask_B, cache, slot=None):
        """Reads one more token per row (mask_B 0: the row has ended): (hidden [B, D], cache).

        Its keys and values go to the next slot or, if given, to `slot`, whose contents must be no longer needed.
        """
        cache = cache if slot is None else cache.replace(used=slot)
        hidden_B1D, cache = self._apply(params, token_B[:, None], mask_B[:, None], cache)
        return hidden_B1D[:, 0], cache

    def insert(self, cache, new, rows_G):
        """The cache with each row rows_G[g] replaced by row g of `new`; both have the same number of slots."""

        def put(g, arrays):
            def one(array_B, new_G):
                row_1 = jax.lax.dynamic_slice_in_dim(new_G, g, 1)
                return jax.lax.dynamic_update_slice_in_dim(array_B, row_1, rows_G[g], axis=0)

            return jax.tree.map(one, arrays, new.replace(used=None))

        return jax.lax.fori_loop(0, len(rows_G), put, cache.replace(used=None)).replace(used=cache.used)

    def repeat(self, cache, rows, padding):
        """The cache of one prompt for `rows` rows, without the first `padding` slots: left padding is not kept."""

        def rolled(x_1):  # slots are the axis before the last of keys and values, and the last one of the others
            return jnp.repeat(jnp.roll(x_1, -padding, axis=-2 if x_1.ndim == 4 else -1), rows, axis=0)

        return jax.tree.map(rolled, cache.replace(used=None)).replace(used=cache.used - padding)

    def logprobs(self, params, tokens_BT, mask_BT, count, *, temperature=1.0, dropout_key=None):
        """Log-probs [B, count], in nats, of the last `count` tokens; only these are projected onto the vocabulary."""
        hidden = self.hidden(params, tokens_BT, mask_BT, count, dropout_key)

        def project(hidden, targets):
            return logprobs.gather(self.logits(params, hidden), targets, temperature=temperature)

        return logprobs.chunked(project, hidden, tokens_BT[:, -count:], chunk=self.chunk)

    def compare(self, policy, hidden, reference, hidden_ref, targets, *, temperature=1.0):
        """Full-vocabulary comparison of two models at the same tokens, from their hidden states [B, R, D].

        Returns (logp_ref, exact KL(policy || reference), entropy of the policy), each [B, R], in nats.
        """

        def project(hidden, hidden_ref, targets):
            logits, logits_ref = self.logits(policy, hidden), self.logits(reference, hidden_ref)
            return (
                logprobs.gather(logits_ref, targets, temperature=temperature),
                kl.exact(logits, logits_ref, temperature=temperature),
                logprobs.entropy(logits, temperature=temperature),
            )

        return logprobs.chunked(project, hidden, hidden_ref, targets, chunk=self.chunk)


@dataclasses.dataclass(frozen=True)
class ScalarModel:
    """The decoder with one number per position: read at every response token (value) or at the last (reward)."""

    config: decoder.Config
    base: lora.Base | None = None  # as a LanguageModel's: the trunk is then adapters

    def init(self, key, policy):
        """The trunk of the given policy with a new head ~ N(0, 1/sqrt(D + 1)) and bias 0 (arXiv 2403.17031)."""
        width = self.config.width
        kernel_D = jax.random.normal(key, (width,)) / (width + 1) ** 0.5
        return {"trunk": self._without_unembed(policy), "head": {"kernel": kernel_D, "bias": jnp.zeros(())}}

    def zero_head(self, policy):
        """The trunk of the given policy with a head that returns 0 everywhere."""
        head = {"kernel": jnp.zeros((self.config.width,)), "bias": jnp.zeros(())}
        return {"trunk": self._without_unembed(policy), "head": head}

    def read(self, params, hidden):
        """hidden [..., D] -> [...] in float32."""
        head = params["head"]
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head["kernel"]) + head["bias"]

    def values(self, params, tokens_BT, mask_BT, count):
        """The value before each of the last `count` tokens, [B, count]."""
        before = functools.partial(logprobs.before, count=count)
        return self.read(params, self._hidden(params, tokens_BT, mask_BT, before))

    def score(self, params, tokens_BT, mask_BT):
        """The score of each sequence [B], read at its last real token: EOS where there is one."""
        index_T = jnp.arange(tokens_BT.shape[1])
        last_B1 = jnp.max(jnp.where(mask_BT, index_T, 0), axis=1, keepdims=True)

        def last(x_BT):
            return jnp.take_along_axis(x_BT, last_B1.reshape(-1, 1, *(1,) * (x_BT.ndim - 2)), axis=1)

        return self.read(params, self._hidden(params, tokens_BT, mask_BT, last)[:, 0])

    def _hidden(self, params, tokens_BT, mask_BT, select):
        variables = _variables(self.base, params["trunk"])
        return decoder.Decoder(self.config).apply(variables, tokens_BT, mask_BT, select=select)[0]

    def _without_unembed(self, policy):
        # A scalar model never reads this table, which is as large as the token embedding.
        return policy if self.config.tied else {name: leaf for name, leaf in policy.items() if name != "unembed"}

    @staticmethod
    def normalize(params, mean, std):
        """The same model with gain 1/std and bias -mean/std folded into its head.

        Scores with this mean and standard deviation get mean 0 and standard deviation 1.
        """
        head = params["head"]
        return {**params, "head": {"kernel": head["kernel"] / std, "bias": (head["bias"] - mean) / std}}
