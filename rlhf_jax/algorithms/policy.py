"""What every policy algorithm shares: its config, its state, and one update on a scored rollout.

`step` makes an iteration's update of an Algorithm. rollout.py samples, and the reward scores.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from rlhf_jax.fields import choice, neutral, number
from rlhf_jax.ops import kl, logprobs, masked, padding, sharded
from rlhf_jax.rollout import Apply, Rollout
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState

KLS = ("reward", "k2", "k3", "exact", "off")  # where the KL is penalized, and which estimate of it


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are the published TL;DR recipe (arXiv 2403.17031)."""

    steps: int = number(1_953, least=1)  # rollouts
    batch: int = number(512, least=1)  # episodes a rollout
    # Completions generated (and scored) at once; a finished lane takes the next prompt. 0: the whole batch.
    lanes: int = number(0, least=0, neutral=True)
    # Number of compiled prompt widths, in equal steps; a slice of prompts uses the smallest that fits.
    widths: int = number(1, least=1, neutral=True)
    group: int = number(1, least=1)  # completions of each prompt, in rows next to each other; batch counts them all
    epochs: int = number(4, least=1)  # passes over a rollout
    minibatches: int = number(1, least=1)  # optimizer steps an epoch
    # Slices of a minibatch whose gradients are summed: less memory.
    microbatches: int = number(1, least=1, neutral=True)
    temperature: float = number(0.7, above=0, most=100)  # of sampling, and of every log-prob
    top_k: int = number(0, least=0)  # must stay 0: rollouts sample the distribution that the update differentiates
    top_p: float = number(1.0, least=0, most=1)  # must stay 1
    kl_coef: float = number(0.05, least=0)  # reward subtracted per nat of KL from the reference
    # Where the KL is penalized. reward: k1 of each token, in its reward; k2, k3, exact: this number of each token, in
    # the loss; off: nowhere.
    kl: str = choice("reward", *KLS)
    kl_target: float = number(0.0, least=0)  # nats a sequence that kl_coef is adapted to reach; 0: kl_coef is fixed
    kl_horizon: int = number(10_000, least=1)  # episodes over which kl_coef adapts; more: slower
    gamma: float = number(1.0, least=0, most=1)  # discount of rewards, per token
    missing_eos: str = choice("replace", "replace", "subtract")  # for a response without EOS; see missing_eos_penalty
    missing_eos_penalty: float = number(1.0, least=0)  # replace: the score becomes -penalty; subtract: score - penalty
    # The mean of the policy's loss. token: over all tokens; sequence: over rows, of each row's mean; constant: over
    # rows, of each row's sum divided by the task's response length.
    reduction: str = choice("token", *masked.REDUCTIONS)
    entropy_coef: float = number(0.0, least=0)  # reward per nat of the policy's entropy, in the loss of each token
    # Weight of the cross-entropy of texts that the policy was trained on before: a row of these for each episode
    # (PPO-ptx of InstructGPT, arXiv 2203.02155, eq. 2).
    ptx_coef: float = number(0.0, least=0)
    whiten_advantages: bool = True  # scale the advantages of a rollout to mean 0, variance 1
    trace_epochs: bool = neutral(False)  # log approx KL and clip fraction after each epoch too
    eval_every: int = number(50, least=0)  # rollouts between evaluations; 0: only at the end
    save_every: int = number(100, least=0, neutral=True)  # rollouts between checkpoints; 0: only at the end

    def problems(self):
        """Checks that concern several fields."""
        slices = self.group * self.minibatches * self.microbatches
        if self.group > 1 and self.batch % slices:
            yield "batch", f"a multiple of group x minibatches x microbatches = {slices}"
        yield from optim.problems(self, minibatches=self.minibatches)
        why = "a rollout samples the distribution that the update differentiates; top-k and top-p are for evaluation"
        if self.top_k != 0:
            yield "top_k", f"0 in training ({why})"
        if self.top_p != 1:
            yield "top_p", f"1 in training ({why})"
        if self.lanes and self.batch % self.lanes:
            yield "lanes", f"0, or a divisor of batch = {self.batch}"
        if self.lanes % self.group:
            yield "lanes", f"0, or a multiple of group = {self.group}"
        limit = kl.LARGEST_ERROR * self.batch
        if self.kl_target and self.kl_horizon <= limit:
            yield "kl_horizon", f"more than {kl.LARGEST_ERROR:g} batch = {limit:g}, to keep kl_coef positive"

    def unused(self):
        """Fields without effect, and why."""
        yield from super().unused()
        if self.kl == "off":
            for name in ("kl_coef", "kl_target", "kl_horizon"):
                yield name, "kl is off"
        elif not self.kl_target:
            yield "kl_horizon", "kl_target is 0"
        elif not self.kl_coef:
            yield "kl_target", "kl_coef is 0, and only scaled by this"
            yield "kl_horizon", "kl_coef is 0"
        if self.epochs * self.minibatches == 1:
            why = "a rollout has one optimizer step (epochs x minibatches), before which nothing has moved"
            for name in ("clip", "clip_high", "value_clip"):
                if hasattr(self, name):
                    yield name, why

    @property
    def updates(self):
        """Optimizer steps of the whole stage."""
        return self.steps * self.epochs * self.minibatches


def kl_problems(config):
    """Checks of the KL where completions are compared by their score, and not by the reward that has the KL in it."""
    if config.kl == "reward":
        yield "kl", "k2, k3, exact or off (completions are compared by their score)"


class Algorithm(Protocol):
    """A module such as ppo.py: its config, two flags and three pure functions."""

    NEEDS_VALUE: bool
    SHUFFLES: bool  # every epoch has its own order of the rows

    @property
    def Config(self) -> type[Any]:
        """A subclass of the Config above."""

    def estimate(self, rollout: Rollout, kl_coef, *, config) -> Rollout:
        """The rollout with advantages and returns, and the rewards and raw advantages that a trace records.

        kl_coef is that of the reward: 0 where the KL is in the loss or off.
        """

    def loss(self, params, batch: Rollout, *, config, apply: Apply) -> tuple[jax.Array, dict[str, Any]]:
        """(scalar, metrics) of a minibatch; params are trees by name: "policy" (and "value").

        metrics["rows"] has what was computed for each token, {name: [B, R]}, which a trace may record; `logp_BR` is
        what `regularize` reads. Means are `masked.mean` with batch.weight_B.
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


def penalty(rollout, config):
    """The KL [B, R] that `config.kl` penalizes, as sampled: 0 where that is off."""
    estimates = {"reward": kl.k1, "k2": kl.k2, "k3": kl.k3}
    if config.kl in estimates:
        return estimates[config.kl](rollout.logp_BR, rollout.logp_ref_BR)
    return rollout.kl_exact_BR * (config.kl == "exact")


def regularize(value, aux, params, batch, *, kl_coef, reference, config, apply):
    """A loss and its metrics with what `config` adds: KL penalty, entropy bonus, other texts: (scalar, metrics).

    k2's gradient is that of KL(policy || reference) on the policy's own samples, k3's that of KL(reference || policy);
    k1's is 0 on average, so it is no loss. `exact` needs one more pass of the reference, and has no sampling noise.
    """
    mask_BR, terms = batch.mask_BR, {}
    if config.kl in ("k2", "k3"):
        estimate = {"k2": kl.k2, "k3": kl.k3}[config.kl]
        terms["kl_loss"] = kl_coef, estimate(jnp.where(mask_BR, aux["rows"]["logp_BR"], 0), batch.logp_ref_BR)
    if config.kl == "exact" or config.entropy_coef:
        inputs = (batch.tokens_BT, batch.attend_BT, mask_BR.shape[1])
        other = reference if config.kl == "exact" else params["policy"]
        sides = [(tree, apply.policy.hidden(tree, *inputs)) for tree in (params["policy"], other)]
        compared = apply.policy.compare(*sides[0], *sides[1], batch.response_BR, temperature=config.temperature)
        if config.kl == "exact":
            terms["kl_loss"] = kl_coef, compared[1]
        if config.entropy_coef:
            terms["entropy_bonus"] = -config.entropy_coef, compared[2]
    for name, (coef, term_BR) in terms.items():
        aux = aux | {name: masked.mean(term_BR, mask_BR, weight_B=batch.weight_B)}
        aux["rows"] = aux["rows"] | {f"{name}_BR": term_BR}
        value += coef * aux[name]
    if config.ptx_coef:
        aux = aux | {"ptx_loss": mixed(params["policy"], batch, apply=apply)}
        value += config.ptx_coef * aux["ptx_loss"]
    return value, aux


def mixed(policy, batch, *, apply):
    """Cross-entropy of the texts beside a rollout's completions, in nats a token of the whole minibatch's texts."""
    mask_BT = logprobs.predicted(batch.mix_mask_BT)
    nats_BT = -apply.policy.logprobs(policy, batch.mix_BT, batch.mix_mask_BT, mask_BT.shape[1])
    nats_B = masked.sum(nats_BT, mask_BT, axis=1)
    return jnp.sum(batch.mix_weight_B * nats_B) / jnp.maximum(jnp.sum(batch.mask_BR), 1)


def update(algorithm, state, rollout, *, config, apply, tx, guard="off", record=False, length=None):
    """All epochs and minibatches on one rollout with advantages: (state, metrics [epochs, minibatches] each).

    One compiled scan; every epoch has its own permutation, of groups. length: tokens that the reduction `constant`
    divides by; None: the columns of the responses. Reference and reward stay as they are. With a `guard`, the
    first optimizer step that is not finite and all later ones change nothing (training/optim.py). With `record`,
    metrics["record"] has each minibatch's rows of the rollout, and what the loss computed for their tokens.
    """
    B, R = rollout.mask_BR.shape
    rollout = sharded.whole(rollout)  # small, and a permutation takes rows from every device
    shuffle_key = jax.random.fold_in(state.step_key, 1)

    def of_groups(groups):
        """The rows of some groups, each with its rows next to each other."""
        return groups if config.group == 1 else (groups[:, None] * config.group + jnp.arange(config.group)).reshape(-1)

    def loss(params, batch):
        value, aux = algorithm.loss(params, batch, config=config, apply=apply)
        parts = {"kl_coef": state.kl_coef, "reference": state.reference, "config": config, "apply": apply}
        return regularize(value, aux, params, batch, **parts)

    def minibatch(carry, rows):
        if config.widths > 1:
            first = rows[:: config.group]
            rows = rows[of_groups(padding.alike(rollout.prompt_mask_BP[first], config.microbatches))]
        batch = sharded.rows(jax.tree.map(lambda x: x[rows], rollout))
        if config.reduction != "token":
            weight_B = masked.row_weights(batch.mask_BR, config.reduction, length=R if length is None else length)
            batch = batch.replace(weight_B=weight_B)
        if config.ptx_coef:
            # Slices are weighted by their completions' tokens: this makes their mean one over the texts' tokens.
            texts = jnp.maximum(jnp.sum(logprobs.predicted(batch.mix_mask_BT)), 1)
            batch = batch.replace(mix_weight_B=jnp.full(len(rows), jnp.sum(batch.mask_BR) / texts))

        def grads(part):
            def at_width(prompt_BP, prompt_mask_BP):
                narrow = part.replace(prompt_BP=prompt_BP, prompt_mask_BP=prompt_mask_BP)
                (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(carry.params, narrow)
                return optim.apart(grads, aux, record)

            return padding.cut(at_width, part.prompt_BP, part.prompt_mask_BP, config.widths)

        tokens_B = jnp.sum(batch.mask_BR, axis=1)
        parts = {"has_rows": True, "group": config.group}
        (grads, aux), arrays = optim.accumulate(grads, batch, tokens_B, config.microbatches, **parts)
        carry, norms = optim.step(carry, state, grads, aux, tx=tx, guard=guard)
        return carry, aux | norms | ({"record": arrays | {"rows_B": rows}} if record else {})

    def epoch(carry, key):
        groups = B // config.group
        order = jax.random.permutation(key, groups) if algorithm.SHUFFLES else jnp.arange(groups)
        return jax.lax.scan(minibatch, carry, of_groups(order).reshape(config.minibatches, -1))

    start = optim.begin(state, tuple(state.optimizer), rollout, guard=guard)
    end, aux = jax.lax.scan(epoch, start, jax.random.split(shuffle_key, config.epochs))
    state, skipped = optim.end(state, end, guard=guard)
    return state, aux | skipped


def step(algorithm, state, rollout, *, config, apply, tx, guard="off", record=False, length=None):
    """Advantages, update and KL controller for a scored rollout (with values, where NEEDS_VALUE): (state, metrics).

    With `record`, metrics["record"] has the arrays that the loss was given ("rollout"), what it computed for each token
    ("update": [epochs, minibatches, rows, R]) and its scalars ("minibatch": [epochs, minibatches]). `length` is that of
    `update`.
    """
    estimated = algorithm.estimate(rollout, state.kl_coef if config.kl == "reward" else 0.0, config=config)
    rollout = estimated.replace(rewards_BR=None, raw_advantages_BR=None)
    numbers = algorithm.metrics(rollout, kl_coef=state.kl_coef, config=config)
    parts = {"config": config, "apply": apply, "tx": tx, "guard": guard, "record": record, "length": length}
    new, aux = update(algorithm, state, rollout, **parts)
    tokens = aux.pop("record", None)
    control = {"target": config.kl_target, "horizon": config.kl_horizon, "episodes": rollout.mask_BR.shape[0]}
    adapted = kl.adapt(state.kl_coef, numbers["kl"], **control)
    new = new.replace(kl_coef=jnp.where(new.skipped == state.skipped, adapted, state.kl_coef))
    skipped = aux.pop("skipped")
    estimated = estimated.replace(mix_BT=None, mix_mask_BT=None)
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
    """{"score_final", "score_total"}: the score after the rule for a missing EOS, and the total that is maximized.

    The total subtracts kl_coef times the KL that `penalty` has, summed over the sequence.
    """
    score_B = scored(rollout, config)
    return {
        "score_final": jnp.mean(score_B),
        "score_total": jnp.mean(score_B - kl_coef * masked.sum(penalty(rollout, config), rollout.mask_BR, axis=1)),
    }
