"""A reward model from preference pairs (Bradley-Terry). Trains `reward`."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.fields import number
from rlhf_jax.ops import losses
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are the published TL;DR recipe (arXiv 2403.17031): one epoch of 92.8k pairs."""

    steps: int = number(1_450, least=0)  # optimizer steps; 0: only where the reward is not learned
    batch: int = number(64, least=1)  # pairs a step
    microbatches: int = number(1, least=1, neutral=True)  # slices of a batch whose gradients are summed: less memory
    normalize_before: bool = False  # references score mean 0, std 1 before the training too, not only after it
    eval_every: int = number(100, least=0)  # steps between evaluations; 0: only at the end
    save_every: int = number(500, least=0, neutral=True)  # steps between checkpoints; 0: only at the end

    def problems(self):
        """Checks that concern several fields."""
        yield from optim.problems(self)


def init(reward, key, *, tx):
    """The state before the first step."""
    return TrainState.create(key, reward=reward, optimizer={"reward": tx.init(reward)})


def sides(batch):
    """(tokens [2B, T], mask [2B, T]): the chosen completions after their prompts, then the rejected ones."""

    def join(prompt, chosen, rejected):
        both = jnp.concatenate([batch[chosen], batch[rejected]])
        return jnp.concatenate([jnp.tile(batch[prompt], (2, 1)), both], axis=1)

    tokens_BT = join("prompt_BP", "chosen_BR", "rejected_BR")
    return tokens_BT, join("prompt_mask_BP", "chosen_mask_BR", "rejected_mask_BR")


def scores(reward, batch, *, apply):
    """(chosen [B], rejected [B]): the reward model's scores of both completions, read at EOS.

    Both sides go through the model in one pass of 2B rows. Dropout is off: a noisy score would be a noisy label.
    """
    return jnp.split(apply.scalar.score(reward, *sides(batch)), 2)


def loss(reward, batch, *, apply):
    """-log sigmoid(chosen - rejected), mean over pairs: (scalar, metrics)."""
    chosen_B, rejected_B = scores(reward, batch, apply=apply)
    value = jnp.mean(losses.bradley_terry(chosen_B, rejected_B))
    margin_B = chosen_B - rejected_B
    return value, {
        "loss": value,
        "accuracy": jnp.mean((margin_B > 0) + 0.5 * (margin_B == 0)),
        "margin": jnp.mean(margin_B),
        "rows": {"chosen_B": chosen_B, "rejected_B": rejected_B},
    }


def step(state, batch, *, config, apply, tx, guard="off", record=False):
    """One optimizer step: (state, metrics); with `record` also what the loss computed, for a trace."""

    def grads(part):
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.reward, part, apply=apply)
        return optim.apart(grads, aux, record)

    how = {"microbatches": config.microbatches, "tx": tx, "guard": guard, "record": record}
    return optim.once(state, "reward", grads, batch, jnp.ones(batch["prompt_BP"].shape[0]), **how)
