"""Prompts -> Rollout: completions, and everything that stays frozen while the policy learns from them."""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from rlhf_jax import generate
from rlhf_jax.ops import kl, masked, padding


class Apply(NamedTuple):
    """The functions of parameters that rollouts and algorithms call; models/heads.py has the real ones.

    policy: prefill, decode, insert, logits, hidden, compare, logprobs. scalar: values, score.
    """

    policy: Any
    scalar: Any


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
    """Samples a completion of each prompt from the policy, each with its key; `compare` makes it a Rollout."""
    return generate.generate(apply.policy, policy, prompt_BP, prompt_mask_BP, keys_B, sampling)


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


def sample(apply, policy, reference, prompt_BP, prompt_mask_BP, keys_B, sampling):
    """`draw`, then `compare`. Call them separately to decode and score text on the host while the device compares."""
    drawn = draw(apply, policy, prompt_BP, prompt_mask_BP, keys_B, sampling)
    return compare(apply, policy, reference, prompt_BP, prompt_mask_BP, drawn, sampling)


def judge(apply, state, prompt_BP, prompt_mask_BP, drawn, sampling):
    """The scored Rollout with values that PPO needs, computed for sampling.lanes rows at a time (0: all)."""

    def read(rows):
        *prompts, drawn = rows

        def at_width(*prompts):
            compared = compare(apply, state.policy, state.reference, *prompts, drawn, sampling)
            judged = value(apply, state.value, score(apply, state.reward, compared))
            return judged.replace(prompt_BP=None, prompt_mask_BP=None)

        judged = padding.cut(at_width, *prompts, sampling.widths)
        return judged.replace(prompt_BP=prompts[0], prompt_mask_BP=prompts[1].astype(bool))

    B, rows = len(prompt_BP), (prompt_BP, prompt_mask_BP, drawn.replace(step=None, keys_B=None, cache=None))
    if sampling.lanes in (0, B):
        return read(rows)
    order_B = padding.alike(prompt_mask_BP, B // sampling.lanes)
    # Rows are dealt out in turn, as in optim.accumulate, so every part is spread evenly over the devices.
    dealt = jax.tree.map(lambda x: x[order_B].reshape(sampling.lanes, -1, *x.shape[1:]).swapaxes(0, 1), rows)
    parts, back_B = jax.lax.map(read, dealt), jnp.argsort(order_B)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, *x.shape[2:])[back_B], parts)


def score(apply, reward, rollout):
    """The rollout with the reward model's score of each completion, read at its last token."""
    return rollout.replace(score_B=apply.scalar.score(reward, rollout.tokens_BT, rollout.attend_BT))


def value(apply, value, rollout):
    """The rollout with the value before each response token."""
    values_BR = apply.scalar.values(value, rollout.tokens_BT, rollout.attend_BT, rollout.mask_BR.shape[1])
    return rollout.replace(values_BR=jnp.where(rollout.mask_BR, values_BR, 0))
