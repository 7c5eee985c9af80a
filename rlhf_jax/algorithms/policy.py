"""What every policy algorithm shares: its config, its state, and one update on a scored rollout.

`step` makes an iteration's update of an Algorithm. rollout.py samples, and the reward scores.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rlhf_jax.fields import choice, neutral, number
from rlhf_jax.ops import kl, masked, padding
from rlhf_jax.rollout import Apply, Rollout
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are the published TL;DR recipe (arXiv 2403.17031)."""

    steps: int = number(1_953, least=1)  # rollouts
    batch: int = number(512, least=1)  # episodes a rollout
    # Completions generated (and scored) at once; a finished lane takes the next prompt. 0: the whole batch.
    lanes: int = number(0, least=0, neutral=True)
    # Number of compiled prompt widths, in equal steps; a slice of prompts uses the smallest that fits.
    widths: int = number(1, least=1, neutral=True)
    epochs: int = number(4, least=1)  # passes over a rollout
    minibatches: int = number(1, least=1)  # optimizer steps an epoch
    # Slices of a minibatch whose gradients are summed: less memory.
    microbatches: int = number(1, least=1, neutral=True)
    temperature: float = number(0.7, above=0, most=100)  # of sampling, and of every log-prob
    top_k: int = number(0, least=0)  # must stay 0: rollouts sample the distribution that the update differentiates
    top_p: float = number(1.0, least=0, most=1)  # must stay 1
    kl_coef: float = number(0.05, least=0)  # reward subtracted per nat of KL from the reference
    kl_target: float = number(0.0, least=0)  # nats a sequence that kl_coef is adapted to reach; 0: kl_coef is fixed
    kl_horizon: int = number(10_000, least=1)  # episodes over which kl_coef adapts; more: slower
    gamma: float = number(1.0, least=0, most=1)  # discount of rewards, per token
    missing_eos: str = choice("replace", "replace", "subtract")  # for a response without EOS; see missing_eos_penalty
    missing_eos_penalty: float = number(1.0, least=0)  # replace: the score becomes -penalty; subtract: score - penalty
    whiten_advantages: bool = True  # scale the advantages of a rollout to mean 0, variance 1
    trace_epochs: bool = neutral(False)  # log approx KL and clip fraction after each epoch too
    eval_every: int = number(50, least=0)  # rollouts between evaluations; 0: only at the end
    save_every: int = number(100, least=0, neutral=True)  # rollouts between checkpoints; 0: only at the end

    def problems(self):
        """Checks that concern several fields."""
        yield from optim.problems(self, minibatches=self.minibatches)
        why = "a rollout samples the distribution that the update differentiates; top-k and top-p are for evaluation"
        if self.top_k != 0:
            yield "top_k", f"0 in training ({why})"
        if self.top_p != 1:
            yield "top_p", f"1 in training ({why})"
        if self.lanes and self.batch % self.lanes:
            yield "lanes", f"0, or a divisor of batch = {self.batch}"
        limit = kl.LARGEST_ERROR * self.batch
        if self.kl_target and self.kl_horizon <= limit:
            yield "kl_horizon", f"more than {kl.LARGEST_ERROR:g} batch = {limit:g}, to keep kl_coef positive"

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        if not self.kl_target:
            yield "kl_horizon", "kl_target is 0"
        elif not self.kl_coef:
            yield "kl_target", "kl_coef is 0, and only scaled by this"
            yield "kl_horizon", "kl_coef is 0"

    @property
    def updates(self):
        """Optimizer steps of the whole stage."""
        return self.steps * self.epochs * self.minibatches


class Algorithm(Protocol):
    """A module such as ppo.py: its config, two flags and three pure functions."""

    NEEDS_VALUE: bool
    SHUFFLES: bool  # every epoch has its own order of the rows

    @property
    def Config(self) -> type[Any]:
        """A subclass of the Config above."""

    def estimate(self, rollout: Rollout, kl_coef, *, config) -> Rollout:
        """The rollout with advantages (and returns)."""

    def loss(self, params, batch: Rollout, *, config, apply: Apply) -> tuple[jax.Array, dict[str, Any]]:
        """(scalar, metrics) of a minibatch; params are trees by name: "policy" (and "value").

        metrics["rows"] has what was computed for each token, {name: [B, R]}, which a trace may record.
        """

    def metrics(self, rollout: Rollout, *, kl_coef, config) -> dict[str, jax.Array]:
        """{name: scalar} of the rollout before the update."""


def init(policy, key, *, config, tx, value=None, reward=None):
    """The state before the first rollout; the reference is the policy as it is now."""
    # Copies, because the trees may share arrays: the state is donated to the update, and a buffer can be only once.
    policy, reference, value, reward = jax.tree.map(jnp.copy, (policy, policy, value, reward))
    trained = {"policy": policy} | ({} if value is None else {"value": value})
    return TrainState.create(
        key,
        policy=policy,
        reference=reference,
        value=value,
        reward=reward,
        optimizer={name: tx.init(params) for name, params in trained.items()},
        kl_coef=jnp.float32(config.kl_coef),
    )


def final_score(score_B, eos_B, *, missing_eos, penalty):
    """The score that is maximized: responses that never ended are punished.

    missing_eos "replace": their score becomes -penalty, however good the start is; "subtract": it becomes score -
    penalty.
    """
    punished_B = jnp.full_like(score_B, -penalty) if missing_eos == "replace" else score_B - penalty
    return jnp.where(eos_B, score_B, punished_B)


def scored(rollout, config):
    """`final_score` of a rollout's scores."""
    return final_score(
        rollout.score_B, rollout.eos_B, missing_eos=config.missing_eos, penalty=config.missing_eos_penalty
    )


def update(algorithm, state, rollout, *, config, apply, tx, guard="off", record=False):
    """All epochs and minibatches on one rollout with advantages: (state, metrics [epochs, minibatches] each).

    One compiled scan; every epoch has its own permutation. Reference and reward stay as they are. With a `guard`, the
    first optimizer step that is not finite and all later ones change nothing (training/optim.py). With `record`,
    metrics["record"] has each minibatch's rows of the rollout, and what the loss computed for their tokens.
    """
    B = rollout.mask_BR.shape[0]
    shuffle_key = jax.random.fold_in(state.step_key, 1)

    def minibatch(carry, rows):
        if config.widths > 1:
            rows = rows[padding.alike(rollout.prompt_mask_BP[rows], config.microbatches)]
        batch = jax.tree.map(lambda x: x[rows], rollout)

        def grads(part):
            def at_width(prompt_BP, prompt_mask_BP):
                narrow = part.replace(prompt_BP=prompt_BP, prompt_mask_BP=prompt_mask_BP)
                (_, aux), grads = jax.value_and_grad(algorithm.loss, has_aux=True)(
                    carry.params, narrow, config=config, apply=apply
                )
                return optim.apart(grads, aux, record)

            return padding.cut(at_width, part.prompt_BP, part.prompt_mask_BP, config.widths)

        tokens_B = jnp.sum(batch.mask_BR, axis=1)
        (grads, aux), arrays = optim.accumulate(grads, batch, tokens_B, config.microbatches, has_rows=True)
        carry, norms = optim.step(carry, state, grads, aux, tx=tx, guard=guard)
        return carry, aux | norms | ({"record": arrays | {"rows_B": rows}} if record else {})

    def epoch(carry, key):
        rows = jax.random.permutation(key, B) if algorithm.SHUFFLES else jnp.arange(B)
        return jax.lax.scan(minibatch, carry, rows.reshape(config.minibatches, -1))

    start = optim.begin(state, tuple(state.optimizer), rollout, guard=guard)
    end, aux = jax.lax.scan(epoch, start, jax.random.split(shuffle_key, config.epochs))
    state, skipped = optim.end(state, end, guard=guard)
    return state, aux | skipped


def step(algorithm, state, rollout, *, config, apply, tx, guard="off", record=False):
    """Advantages, update and KL controller for a scored rollout (with values, where NEEDS_VALUE): (state, metrics).

    With `record`, metrics["record"] has the arrays that the loss was given ("rollout"), what it computed for each token
    ("update": [epochs, minibatches, rows, R]) and its scalars ("minibatch": [epochs, minibatches]).
    """
    estimated = algorithm.estimate(rollout, state.kl_coef, config=config)
    rollout = estimated.replace(rewards_BR=None, raw_advantages_BR=None)
    numbers = algorithm.metrics(rollout, kl_coef=state.kl_coef, config=config)
    new, aux = update(algorithm, state, rollout, config=config, apply=apply, tx=tx, guard=guard, record=record)
    tokens = aux.pop("record", None)
    control = {"target": config.kl_target, "horizon": config.kl_horizon, "episodes": rollout.mask_BR.shape[0]}
    adapted = kl.adapt(state.kl_coef, numbers["kl"], **control)
    new = new.replace(kl_coef=jnp.where(new.skipped == state.skipped, adapted, state.kl_coef))
    skipped = aux.pop("skipped")
    recorded = {"record": {"rollout": estimated, "update": tokens, "minibatch": dict(aux)}} if record else {}
    aux["ess"] = jnp.square(aux["ratio"]) / aux.pop("ratio_square")
    if config.trace_epochs:
        numbers |= trace(aux)
    numbers |= {name: jnp.mean(value) for name, value in aux.items()}
    numbers |= {f"{name}_last": aux[name][-1, -1] for name in ("approx_kl", "ess")}
    return new, numbers | {"skipped": skipped} | recorded


def trace(aux):
    """How far the policy has moved after each epoch of an update: means over the epochs so far, counted from 1.

    aux is that of `update`. With one minibatch an epoch the first entries are 0: they are measured before any step.
    """
    numbers: dict[str, jax.Array] = {}
    for name in {"approx_kl", "clip_fraction"} & aux.keys():
        mean_E = jnp.mean(aux[name], axis=1)
        running_E = jnp.cumsum(mean_E) / jnp.arange(1, len(mean_E) + 1)
        numbers |= {f"{name}_epoch_{epoch}": running for epoch, running in enumerate(running_E, start=1)}
    return numbers


def totals(rollout, kl_coef, config):
    """{"score_final", "score_total"}: the score after the rule for a missing EOS, and the total that is maximized."""
    score_B = scored(rollout, config)
    return {
        "score_final": jnp.mean(score_B),
        "score_total": jnp.mean(score_B - kl_coef * masked.sum(rollout.kl_BR, rollout.mask_BR, axis=1)),
    }
