"""Prompts -> Rollout: completions, and everything that stays frozen while the policy learns from them."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import flax
import jax
import jax.numpy as jnp

from rlhf_jax import generate
from rlhf_jax.ops import kl, logprobs, masked, padding, sharded


class Policy(Protocol):
    """A language model as pure functions of its parameters; models/heads.py has the real one."""

    @property
    def config(self) -> Any:
        """Its sizes."""

    def init(self, key) -> Any:
        """Random parameters."""

    def cast(self, params) -> Any:
        """The parameters in the types that they are computed with."""

    def prefill(self, params, tokens_BP, mask_BP, slots) -> tuple[jax.Array, Any]:
        """Reads the prompts: (hidden states [B, D] of the last prompt token, a cache with `slots` places)."""

    def decode(self, params, token_B, mask_B, cache, slot=None) -> tuple[jax.Array, Any]:
        """Reads one more token a row: (hidden states [B, D], cache)."""

    def insert(self, cache, new, rows_G) -> Any:
        """The cache with each row rows_G[g] replaced by row g of the cache `new`."""

    def repeat(self, cache, rows, padding) -> Any:
        """The cache of one prompt for `rows` rows, without the slots of its `padding` left columns."""

    def hidden(self, params, tokens_BT, mask_BT, count=None, dropout_key=None) -> jax.Array:
        """The hidden states before each of the last `count` tokens, [B, count, D]."""

    def logits(self, params, hidden) -> jax.Array:
        """hidden [..., D] -> logits [..., V] in float32."""

    def logprobs(self, params, tokens_BT, mask_BT, count, *, temperature=1.0, dropout_key=None) -> jax.Array:
        """Log-probs [B, count] of the last `count` tokens, in nats, at the temperature."""

    def compare(self, policy, hidden, reference, hidden_ref, targets, *, temperature=1.0) -> tuple[jax.Array, ...]:
        """(log-probs of the reference, exact KL, entropy), each [B, R], in nats."""


class Scalar(Protocol):
    """A model with one number a position: value model or reward model."""

    def init(self, key, policy) -> Any:
        """Parameters: the trunk of the policy under a random head."""

    def zero_head(self, policy) -> Any:
        """Parameters: the trunk of the policy under a head that returns 0."""

    def values(self, params, tokens_BT, mask_BT, count) -> jax.Array:
        """The value before each of the last `count` tokens, [B, count]."""

    def score(self, params, tokens_BT, mask_BT) -> jax.Array:
        """The score [B] of each sequence, read at its last real token."""

    def normalize(self, params, mean, std) -> Any:
        """Parameters whose scores are (score - mean) / std."""


class Apply(NamedTuple):
    """The functions of parameters that rollouts and algorithms call."""

    policy: Policy
    scalar: Scalar


@flax.struct.dataclass
class Rollout:
    """A batch of completions. Old log-probs, old values and advantages are constants to the update.

    Log-probs, KL and entropy are in nats at the sampling temperature. Where mask_BR is 0, response_BR is PAD and every
    other `_BR` array is 0. Fields that are not computed yet are None.
    """

    prompt_BP: jax.Array
    prompt_mask_BP: jax.Array
    response_BR: jax.Array
    mask_BR: jax.Array
    eos_B: jax.Array  # 1 where the response ends with EOS
    logp_BR: jax.Array
    logp_ref_BR: jax.Array
    kl_exact_BR: jax.Array  # full-vocabulary KL(policy || reference)
    entropy_BR: jax.Array
    values_BR: jax.Array | None = None
    score_B: jax.Array | None = None
    advantages_BR: jax.Array | None = None
    returns_BR: jax.Array | None = None
    weight_B: jax.Array | None = None  # of the rows in a minibatch's means, where these are not over tokens
    # Other texts beside the completions, whose log-likelihood the loss raises (ptx_coef): tokens, and which are real.
    mix_BT: jax.Array | None = None
    mix_mask_BT: jax.Array | None = None
    mix_weight_B: jax.Array | None = None  # of the texts in a minibatch's mean
    # Intermediate results of an algorithm's `estimate`; no update needs them, a trace records them.
    rewards_BR: jax.Array | None = None  # of each token
    raw_advantages_BR: jax.Array | None = None  # before whitening

    @property
    def tokens_BT(self):
        """Each prompt, followed by its response."""
        return jnp.concatenate([self.prompt_BP, self.response_BR], axis=1)

    @property
    def attend_BT(self):
        """1 at real tokens of prompt and response."""
        return jnp.concatenate([self.prompt_mask_BP, self.mask_BR], axis=1).astype(bool)

    @property
    def kl_BR(self):
        """k1 per token: the estimate that the reward's KL penalty uses."""
        return kl.k1(self.logp_BR, self.logp_ref_BR)

    @property
    def length_B(self):
        """Number of response tokens, EOS included."""
        return jnp.sum(self.mask_BR, axis=1)

    def statistics(self, kl_coef):
        """Metrics of a scored rollout: {name: scalar}, in nats and in tokens (EOS included).

        kl, kl_k2, kl_k3 and kl_exact are sums over a sequence, averaged over the batch; entropy is per token.
        """
        mask_BR = self.mask_BR
        assert self.score_B is not None

        def per_sequence(x_BR):
            return jnp.mean(masked.sum(x_BR, mask_BR, axis=1))

        return {
            "score": jnp.mean(self.score_B),
            "kl": per_sequence(self.kl_BR),
            "kl_k2": per_sequence(kl.k2(self.logp_BR, self.logp_ref_BR)),
            "kl_k3": per_sequence(kl.k3(self.logp_BR, self.logp_ref_BR)),
            "kl_exact": per_sequence(self.kl_exact_BR),
            "kl_coef": kl_coef,
            "entropy": masked.mean(self.entropy_BR, mask_BR),
            "eos_rate": jnp.mean(self.eos_B),
            "length": jnp.mean(self.length_B),
        }


def keys(state, rows):
    """The keys [rows] that the next step samples its completions with; its shuffles have other keys."""
    return jax.random.split(jax.random.fold_in(state.step_key, 0), rows)


def draw(apply, policy, prompt_BP, prompt_mask_BP, keys_B, sampling):
    """Samples a completion of each prompt from the policy, each with its key; `compare` makes it a Rollout.

    Every device completes its own rows, in its share of the lanes, until they have ended. The State has rows only.
    """
    share = dataclasses.replace(sampling, lanes=sampling.lanes // sharded.shards())

    def complete(policy, prompt_BP, prompt_mask_BP, keys_B):
        drawn = generate.generate(apply.policy, policy, prompt_BP, prompt_mask_BP, keys_B, share)
        return drawn.replace(step=None, keys_B=None, cache=None)

    return sharded.by_rows(complete, apply.policy.cast(policy), prompt_BP, prompt_mask_BP, keys_B)


def sample(state, prompt_BP, prompt_mask_BP, *, apply, sampling, rows):
    """`draw` of the state's policy, with the keys of its next step."""
    return draw(apply, state.policy, prompt_BP, prompt_mask_BP, keys(state, rows), sampling)


def compare(apply, policy, reference, prompt_BP, prompt_mask_BP, drawn, sampling):
    """The Rollout of sampled completions: compares policy and reference at every response token."""
    tokens_BT = jnp.concatenate([prompt_BP, drawn.response_BR], axis=1)
    attend_BT = jnp.concatenate([prompt_mask_BP.astype(bool), drawn.mask_BR], axis=1)
    hidden_ref_BRD = apply.policy.hidden(reference, tokens_BT, attend_BT, sampling.max_tokens)
    compared = apply.policy.compare(
        policy, drawn.hidden_BRD, reference, hidden_ref_BRD, drawn.response_BR, temperature=sampling.temperature
    )
    logp_ref_BR, kl_exact_BR, entropy_BR = (jnp.where(drawn.mask_BR, x_BR, 0) for x_BR in compared)
    return Rollout(
        prompt_BP=prompt_BP,
        prompt_mask_BP=prompt_mask_BP.astype(bool),
        response_BR=drawn.response_BR,
        mask_BR=drawn.mask_BR,
        eos_B=drawn.done_B,
        logp_BR=drawn.logp_BR,
        logp_ref_BR=logp_ref_BR,
        kl_exact_BR=kl_exact_BR,
        entropy_BR=entropy_BR,
    )


def judge(apply, state, prompt_BP, prompt_mask_BP, drawn, sampling):
    """`compare`, and the values where the state has a value model: what an algorithm needs beside the score."""

    def read(prompt_BP, prompt_mask_BP, drawn):
        prompts = (prompt_BP, prompt_mask_BP)
        compared = compare(apply, state.policy, state.reference, *prompts, drawn, sampling)
        judged = compared if state.value is None else value(apply, state.value, compared)
        return judged.replace(prompt_BP=None, prompt_mask_BP=None)

    judged = _by_slices(read, prompt_BP, prompt_mask_BP, drawn, sampling)
    return judged.replace(prompt_BP=prompt_BP, prompt_mask_BP=prompt_mask_BP.astype(bool))


def score(apply, reward, rollout, sampling):
    """The reward model's score of each completion [B], read at its last token."""

    def read(prompt_BP, prompt_mask_BP, response):
        tokens_BT = jnp.concatenate([prompt_BP, response[0]], axis=1)
        attend_BT = jnp.concatenate([prompt_mask_BP, response[1]], axis=1).astype(bool)
        return apply.scalar.score(reward, tokens_BT, attend_BT)

    response = (rollout.response_BR, rollout.mask_BR)
    return _by_slices(read, rollout.prompt_BP, rollout.prompt_mask_BP, response, sampling)


def value(apply, value, rollout):
    """The rollout with the value before each response token."""
    values_BR = apply.scalar.values(value, rollout.tokens_BT, rollout.attend_BT, rollout.mask_BR.shape[1])
    return rollout.replace(values_BR=jnp.where(rollout.mask_BR, values_BR, 0))


def logprobs_of(apply, policy, batch, *, temperature):
    """Log-probs [B, R], 0 after the response, of a batch {"prompt_BP", "prompt_mask_BP", "response_BR", "mask_BR"}."""
    tokens_BT = jnp.concatenate([batch["prompt_BP"], batch["response_BR"]], axis=1)
    attend_BT = jnp.concatenate([batch["prompt_mask_BP"], batch["mask_BR"]], axis=1).astype(bool)
    R = batch["mask_BR"].shape[1]
    logp_BR = apply.policy.logprobs(policy, tokens_BT, attend_BT, R, temperature=temperature)
    return jnp.where(batch["mask_BR"], logp_BR, 0)


# Of a trace: rows of a batch whose logits are recorded, the best (and the worst) among them, likeliest tokens of each.
SHOWN, EXTREMES, LIKELIEST = 16, 2, 8


def look(apply, state, scored, *, temperature):
    """Of the rows that a trace shows: the logit of each chosen token, its log-sum-exp, and the likeliest tokens.

    Rows are the first of the batch, whose prompts are random, then the best and the worst by score of the others. This
    is a scoring pass of its own, so it checks the log-probs of the sampler.
    """
    first, B = SHOWN - 2 * EXTREMES, len(scored.score_B)
    order = first + jnp.argsort(scored.score_B[first:])
    extremes = (order[::-1][:EXTREMES], order[:EXTREMES])
    rows = jnp.concatenate([jnp.arange(first), *extremes]) if B > SHOWN else jnp.arange(B)
    shown = jax.tree.map(lambda x: x[rows], scored)
    R = shown.mask_BR.shape[1]
    # position_R: where the model's output scores each response token.
    found = {"rows_B": rows, "position_R": logprobs.before(jnp.arange(shown.tokens_BT.shape[1])[None], R)[0]}
    for name, params in (("policy", state.policy), ("reference", state.reference)):

        def read(row, params=params):
            hidden_RD, target_R = row
            logits_RV = logprobs.scale(apply.policy.logits(params, hidden_RD), temperature)
            total_R = jax.nn.logsumexp(logits_RV, axis=-1)
            top, ids = jax.lax.top_k(logits_RV, min(LIKELIEST, logits_RV.shape[-1]))
            chosen_R = jnp.take_along_axis(logits_RV, target_R[:, None], axis=-1)[:, 0]
            return {"logit": chosen_R, "logsumexp": total_R, "top_ids": ids, "top_logp": top - total_R[:, None]}

        hidden_BRD = apply.policy.hidden(params, shown.tokens_BT, shown.attend_BT, R)
        # A row at a time, so that no array has all rows and the vocabulary.
        rows_of = jax.lax.map(read, (hidden_BRD, shown.response_BR))
        found |= {f"{name}_{key}_BR": array for key, array in rows_of.items()}
    return found


def _by_slices(read, prompt_BP, prompt_mask_BP, rows, sampling):
    """read(prompt, mask, rows) of all rows, sampling.lanes of them at a time, without padding that they share."""

    def at_width(part):
        prompt_BP, prompt_mask_BP, rows = part
        return padding.cut(lambda *prompts: read(*prompts, rows), prompt_BP, prompt_mask_BP, sampling.widths)

    B, rows = len(prompt_BP), (prompt_BP, prompt_mask_BP, rows)
    if sampling.lanes in (0, B):
        return at_width(rows)
    # Each device sorts its own rows, and deals them out in turn: a slice has as many rows of every device.
    slices, own = B // sampling.lanes, (sharded.shards(), -1)
    order = jax.vmap(lambda mask_BP: padding.alike(mask_BP, slices))(
        prompt_mask_BP.reshape(*own, prompt_mask_BP.shape[1])
    )
    back = jnp.argsort(order, axis=1)

    def take(x, index):
        return jax.vmap(lambda x, index: x[index])(x.reshape(*own, *x.shape[1:]), index).reshape(x.shape)

    def deal(x):
        x = take(x, order).reshape(sampling.lanes, slices, *x.shape[1:]).swapaxes(0, 1)
        return sharded.constrain(x, None, sharded.ROWS)

    def collect(x):
        return take(sharded.rows(x.swapaxes(0, 1).reshape(B, *x.shape[2:])), back)

    return jax.tree.map(collect, jax.lax.map(at_width, jax.tree.map(deal, rows)))
