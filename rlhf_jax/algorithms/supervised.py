"""Next-token training on text: pretraining and fine-tuning. Trains `policy`."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.fields import choice, number
from rlhf_jax.ops import logprobs, losses
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are the published TL;DR recipe (arXiv 2403.17031): one epoch of 116,722 examples."""

    schedule: str = choice("cosine", *optim.SCHEDULES)
    steps: int = number(911, least=0)  # optimizer steps; 0: the stage is left out
    batch: int = number(128, least=1)  # rows a step
    microbatches: int = number(1, least=1, neutral=True)  # slices of a batch whose gradients are summed: less memory
    loss_on: str = choice("all", "all", "response")  # which tokens; all: prompt and response, as published
    eval_every: int = number(100, least=0)  # steps between evaluations; 0: only at the end
    save_every: int = number(300, least=0, neutral=True)  # steps between checkpoints; 0: only at the end

    def problems(self):
        """Checks that concern several fields."""
        yield from optim.problems(self)


def init(policy, key, *, tx):
    """The state before the first step."""
    return TrainState.create(key, policy=policy, optimizer={"policy": tx.init(policy)})


def tokens(batch, loss_on):
    """A batch of data/batches.py as (tokens [B, T], real [B, T], which tokens count in the loss [B, T - 1])."""
    tokens_BT = jnp.concatenate([batch["prompt_BP"], batch["response_BR"]], axis=1)
    real_BT = jnp.concatenate([batch["prompt_mask_BP"], batch["response_mask_BR"]], axis=1).astype(bool)
    in_loss_BT = real_BT.at[:, : batch["prompt_BP"].shape[1]].set(False) if loss_on == "response" else real_BT
    return tokens_BT, real_BT, in_loss_BT[:, 1:] & logprobs.predicted(real_BT)


def loss(policy, batch, *, config, apply, dropout_key=None):
    """Cross-entropy in nats per token: (scalar, metrics)."""
    tokens_BT, real_BT, mask_BT = tokens(batch, config.loss_on)
    logp_BT = apply.policy.logprobs(policy, tokens_BT, real_BT, mask_BT.shape[1], dropout_key=dropout_key)
    value = losses.cross_entropy(logp_BT, mask_BT)
    return value, {"loss": value, "rows": {"logp_BT": logp_BT, "mask_BT": mask_BT}}


def token_logprobs(policy, batch, *, config, apply):
    """(log-probs [B, T - 1], which of them the loss counts): what a held-out loss is summed from."""
    tokens_BT, real_BT, mask_BT = tokens(batch, config.loss_on)
    return apply.policy.logprobs(policy, tokens_BT, real_BT, mask_BT.shape[1]), mask_BT


def step(state, batch, *, config, apply, tx, guard="off", record=False):
    """One optimizer step: (state, metrics); with `record` also what the loss computed, for a trace."""
    *_, mask_BT = tokens(batch, config.loss_on)

    def grads(part):
        # A slice has its own noise: its first row's index tells slices apart.
        key = jax.random.fold_in(state.step_key, part["index_B"][0])
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(
            state.policy, part, config=config, apply=apply, dropout_key=key
        )
        return optim.apart(grads, aux, record)

    how = {"microbatches": config.microbatches, "tx": tx, "guard": guard, "record": record}
    return optim.once(state, "policy", grads, batch, jnp.sum(mask_BT, axis=1), **how)
