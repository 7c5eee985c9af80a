"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290). Trains `policy` on preference pairs.

    r = beta (log pi - log pi_ref), a completion's implicit reward        loss = -log sigmoid(r_chosen - r_rejected)

No reward model and no sampling. The log-probs of the reference are computed once and are part of the data.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import preference
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import losses, masked
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState

TOTALS = ("sum", "mean")


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are those of the paper's summarization (app. B), at its smaller learning rate."""

    lr: float = number(1e-6, above=0, most=10)
    steps: int = number(1_450, least=1)  # optimizer steps
    batch: int = number(64, least=1)  # pairs a step
    microbatches: int = number(1, least=1, neutral=True)  # slices of a batch whose gradients are summed: less memory
    beta: float = number(0.1, above=0)  # reward per nat of log pi - log pi_ref: larger stays closer to the reference
    loss: str = choice("sigmoid", *losses.DPO)  # of a pair: ops/losses.py, dpo
    smoothing: float = number(0.0, least=0, below=0.5)  # share of pairs taken to be swapped
    # Log-prob of a completion: the sum or the mean of its tokens'. auto: mean where loss is ipo, else sum.
    total: str = choice("auto", "auto", *TOTALS)
    sft_coef: float = number(0.0, least=0)  # weight of the cross-entropy of the chosen completions, in nats a token
    eval_every: int = number(100, least=0)  # steps between evaluations; 0: only at the end
    save_every: int = number(500, least=0, neutral=True)  # steps between checkpoints; 0: only at the end

    temperature: ClassVar[float] = 1.0  # of every log-prob

    def problems(self):
        """Checks that concern several fields."""
        yield from optim.problems(self)

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        if self.loss not in losses.SMOOTHED:
            yield "smoothing", f"loss is {self.loss}"

    @property
    def mean(self) -> bool:
        """Whether a completion's log-prob is a mean over its tokens."""
        return averaged(self.total, self.loss)


def averaged(total: str, loss: str) -> bool:
    """Whether a completion's log-prob is a mean over its tokens, by the fields of a config."""
    return total == "mean" or (total == "auto" and loss == "ipo")


def init(policy, key, *, tx):
    """The state before the first step; the reference is the policy as it is now."""
    policy, reference = jax.tree.map(jnp.copy, (policy, policy))
    return TrainState.create(key, policy=policy, reference=reference, optimizer={"policy": tx.init(policy)})


def logprobs(policy, batch, *, config, apply):
    """{"chosen_B", "rejected_B"}: log-probs of the completions, in nats; both sides in one pass of 2B rows."""
    tokens_BT, mask_BT = preference.sides(batch)
    R = batch["chosen_BR"].shape[1]
    logp_BR = apply.policy.logprobs(policy, tokens_BT, mask_BT, R, temperature=config.temperature)
    total = masked.mean if config.mean else masked.sum
    chosen_B, rejected_B = jnp.split(total(logp_BR, mask_BT[:, -R:], axis=1), 2)
    return {"chosen_B": chosen_B, "rejected_B": rejected_B}


def loss(policy, batch, *, config, apply):
    """The loss of ops.losses.dpo, mean over pairs, and sft_coef cross-entropy: (scalar, metrics).

    `batch` has pairs as data/batches.py makes them, and chosen_ref_B and rejected_ref_B, `logprobs` of the reference.
    """
    found = logprobs(policy, batch, config=config, apply=apply)
    sides = (found["chosen_B"], found["rejected_B"], batch["chosen_ref_B"], batch["rejected_ref_B"])
    dpo_B = losses.dpo(*sides, beta=config.beta, kind=config.loss, smoothing=config.smoothing)
    gain_B = {side: found[f"{side}_B"] - batch[f"{side}_ref_B"] for side in ("chosen", "rejected")}
    margin_B = config.beta * (gain_B["chosen"] - gain_B["rejected"])
    length_B = {side: jnp.sum(batch[f"{side}_mask_BR"], axis=1) for side in gain_B}
    numbers = {
        "dpo_loss": jnp.mean(dpo_B),
        "accuracy": jnp.mean((margin_B > 0) + 0.5 * (margin_B == 0)),
        "margin": jnp.mean(margin_B),  # of the implicit rewards
        "chosen_logp": jnp.mean(found["chosen_B"]),
        "rejected_logp": jnp.mean(found["rejected_B"]),
        "chosen_gain": jnp.mean(gain_B["chosen"]),  # log pi - log pi_ref; below 0 the chosen became less likely
        "length_difference": jnp.mean(length_B["chosen"] - length_B["rejected"]),  # tokens
    }
    value = numbers["dpo_loss"]
    if config.sft_coef:
        each_B = found["chosen_B"] if config.mean else found["chosen_B"] / jnp.maximum(length_B["chosen"], 1)
        numbers["sft_loss"] = -jnp.mean(each_B)
        value += config.sft_coef * numbers["sft_loss"]
    return value, {"loss": value} | numbers | {"rows": found}


def step(state, batch, *, config, apply, tx, guard="off", record=False):
    """One optimizer step: (state, metrics); with `record` also what the loss computed, for a trace."""

    def grads(part):
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.policy, part, config=config, apply=apply)
        return optim.apart(grads, aux, record)

    how = {"microbatches": config.microbatches, "tx": tx, "guard": guard, "record": record}
    return optim.once(state, "policy", grads, batch, jnp.ones(batch["prompt_BP"].shape[0]), **how)
