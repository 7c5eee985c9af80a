"""Proximal policy optimization (Schulman et al. 2017) for language models. Trains `policy` and `value`.

One step is: sample a Rollout from the policy, score it, `estimate` advantages, then `update` for some epochs of
minibatches on the frozen rollout. Sampling and scoring are rollout.py's; this file starts where the score is known.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax import rollout as rollouts
from rlhf_jax.fields import choice, neutral, number
from rlhf_jax.ops import advantages, kl, losses, masked, padding
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are the published TL;DR recipe (arXiv 2403.17031): about 1M episodes."""

    steps: int = number(1_953, least=0)  # rollouts; 0: the stage is left out
    batch: int = number(512, least=1)  # episodes a rollout
    # Completions generated (and scored) at once; a finished lane takes the next prompt. 0: the whole batch.
    lanes: int = number(0, least=0, neutral=True)
    # Prompt widths compiled for, in equal steps; a slice of prompts uses the smallest that holds its longest.
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
    lam: float = number(0.95, least=0, most=1)  # GAE's lambda; 1: returns, 0: TD errors
    clip: float = number(0.2, above=0)  # of the probability ratio: 1 - clip to 1 + clip
    value_clip: float = number(0.2, above=0)  # how far a value may move from the rollout's, in units of reward
    value_coef: float = number(0.1, least=0)  # weight of the value loss
    # auto: reward where there is a reward model, else zero; reward: trunk and head of the reward model;
    # zero: the policy's trunk under a zero head
    value_init: str = choice("auto", "auto", "reward", "zero")
    missing_eos: str = choice("replace", "replace", "subtract")  # for a response without EOS; see missing_eos_penalty
    missing_eos_penalty: float = number(1.0, least=0)  # replace: the score becomes -penalty; subtract: score - penalty
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    trace_epochs: bool = neutral(False)  # log approx KL and clip fraction after each epoch too
    eval_every: int = number(50, least=0)  # rollouts between evaluations; 0: only at the end
    save_every: int = number(100, least=0, neutral=True)  # rollouts between checkpoints; 0: only at the end

    def problems(self):
        """Checks that concern several fields."""
        updates = self.steps * self.epochs * self.minibatches
        yield from optim.problems(self, updates=updates, minibatches=self.minibatches)
        yield from rollouts.problems(self)
        if self.lanes and self.batch % self.lanes:
            yield "lanes", f"0, or a divisor of batch = {self.batch}"


def init(policy, value, reward, key, *, config, tx):
    """The state before the first rollout; the reference is the policy as it is now."""
    # Copies, because the trees may share arrays: the state is donated to the update, and a buffer can be only once.
    policy, reference, value, reward = jax.tree.map(jnp.copy, (policy, policy, value, reward))
    return TrainState.create(
        key,
        policy=policy,
        reference=reference,
        value=value,
        reward=reward,
        optimizer={"policy": tx.init(policy), "value": tx.init(value)},
        kl_coef=jnp.float32(config.kl_coef),
    )


def final_score(score_B, eos_B, *, missing_eos, penalty):
    """The score that PPO is given: responses that never ended are punished.

    missing_eos "replace": their score becomes -penalty (the default: a good start does not pay for no end);
    "subtract": it becomes score - penalty.
    """
    punished_B = jnp.full_like(score_B, -penalty) if missing_eos == "replace" else score_B - penalty
    return jnp.where(eos_B, score_B, punished_B)


def estimate(rollout, kl_coef, *, config):
    """The rollout with advantages and returns: from here on they are constants."""
    score_B = final_score(
        rollout.score_B, rollout.eos_B, missing_eos=config.missing_eos, penalty=config.missing_eos_penalty
    )
    shape = jax.vmap(lambda score, kl_R, mask_R: advantages.shape_rewards(score, kl_R, mask_R, kl_coef=kl_coef))
    rewards_BR = shape(score_B, rollout.kl_BR, rollout.mask_BR)
    if config.whiten_rewards:
        rewards_BR = masked.whiten(rewards_BR, rollout.mask_BR, shift_mean=False)
    gae = jax.vmap(lambda r, v, m: advantages.gae(r, v, m, gamma=config.gamma, lam=config.lam))
    advantages_BR, returns_BR = gae(rewards_BR, rollout.values_BR, rollout.mask_BR)
    if config.whiten_advantages:
        advantages_BR = masked.whiten(advantages_BR, rollout.mask_BR)
    return rollout.replace(advantages_BR=advantages_BR, returns_BR=returns_BR)


def loss(params, batch, *, config, apply):
    """Clipped surrogate plus clipped value loss over one minibatch: (scalar, metrics).

    params is {"policy", "value"}; batch a Rollout with advantages.
    """
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(
        params["policy"], batch.tokens_BT, batch.attend_BT, R, temperature=config.temperature
    )
    values_BR = apply.scalar.values(params["value"], batch.tokens_BT, batch.attend_BT, R)
    policy_loss, policy_aux = losses.ppo_policy(
        logp_BR, batch.logp_BR, batch.advantages_BR, batch.mask_BR, clip=config.clip
    )
    value_loss, value_aux = losses.ppo_value(
        values_BR, batch.values_BR, batch.returns_BR, batch.mask_BR, clip=config.value_clip
    )
    return policy_loss + config.value_coef * value_loss, {
        "ppo/policy_loss": policy_loss,
        "ppo/value_loss": value_loss,
        "ppo/clip_fraction": policy_aux["clip_fraction"],
        "ppo/approx_kl": policy_aux["approx_kl"],
        "ppo/ratio": policy_aux["ratio"],
        "ppo/ratio_square": policy_aux["ratio_square"],
        "ppo/value_clip_fraction": value_aux["clip_fraction"],
    }


def update(state, rollout, *, config, apply, tx):
    """All epochs and minibatches on one rollout: (state, metrics [epochs, minibatches] each).

    One compiled scan; every epoch draws its own permutation. Reference and reward pass through untouched.
    """
    B = rollout.mask_BR.shape[0]
    shuffle_key = jax.random.fold_in(state.step_key, 1)

    def minibatch(carry, rows):
        params, opt = carry
        if config.widths > 1:
            rows = rows[padding.alike(rollout.prompt_mask_BP[rows], config.microbatches)]
        batch = jax.tree.map(lambda x: x[rows], rollout)

        def grads(part):
            def at_width(prompt_BP, prompt_mask_BP):
                narrow = part.replace(prompt_BP=prompt_BP, prompt_mask_BP=prompt_mask_BP)
                (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, narrow, config=config, apply=apply)
                return grads, aux

            return padding.cut(at_width, part.prompt_BP, part.prompt_mask_BP, config.widths)

        grads, aux = optim.accumulate(grads, batch, jnp.sum(batch.mask_BR, axis=1), config.microbatches)
        moved = {name: optim.update(tx, grads[name], opt[name], params[name]) for name in params}
        aux |= {f"ppo/{name}_grad_norm": optim.norm(grads[name]) for name in params}
        return ({name: moved[name][0] for name in params}, {name: moved[name][1] for name in params}), aux

    def epoch(carry, key):
        rows = jax.random.permutation(key, B).reshape(config.minibatches, -1)
        return jax.lax.scan(minibatch, carry, rows)

    start = ({"policy": state.policy, "value": state.value}, state.optimizer)
    (params, opt), aux = jax.lax.scan(epoch, start, jax.random.split(shuffle_key, config.epochs))
    state = state.replace(step=state.step + 1, policy=params["policy"], value=params["value"], optimizer=opt)
    return state, aux


def step(state, rollout, *, config, apply, tx):
    """Advantages, update and KL controller for a scored rollout with values: (state, metrics)."""
    rollout = estimate(rollout, state.kl_coef, config=config)
    numbers = metrics(rollout, kl_coef=state.kl_coef, config=config)
    state, aux = update(state, rollout, config=config, apply=apply, tx=tx)
    control = {"target": config.kl_target, "horizon": config.kl_horizon, "episodes": rollout.mask_BR.shape[0]}
    state = state.replace(kl_coef=kl.adapt(state.kl_coef, numbers["ppo/kl"], **control))
    aux["ppo/ess"] = jnp.square(aux["ppo/ratio"]) / aux.pop("ppo/ratio_square")
    if config.trace_epochs:
        numbers |= trace(aux)
    numbers |= {name: jnp.mean(value) for name, value in aux.items()}
    numbers |= {f"{name}_last": aux[name][-1, -1] for name in ("ppo/approx_kl", "ppo/ess")}
    return state, numbers


def trace(aux):
    """How far the policy has moved after each epoch of an update: means over the epochs so far, counted from 1.

    aux is that of `update`. Of one minibatch an epoch the first entries are 0: nothing has moved when it is measured.
    """
    numbers = {}
    for name in ("ppo/approx_kl", "ppo/clip_fraction"):
        mean_E = jnp.mean(aux[name], axis=1)
        running_E = jnp.cumsum(mean_E) / jnp.arange(1, len(mean_E) + 1)
        numbers |= {f"{name}_epoch_{epoch}": running for epoch, running in enumerate(running_E, start=1)}
    return numbers


def metrics(rollout, *, kl_coef, config):
    """What a rollout says, before the policy learns from it: Rollout.statistics, and what PPO adds to the score."""
    mask_BR = rollout.mask_BR
    score_B = final_score(
        rollout.score_B, rollout.eos_B, missing_eos=config.missing_eos, penalty=config.missing_eos_penalty
    )
    residual_BR = rollout.returns_BR - rollout.values_BR
    explained = 1 - masked.var(residual_BR, mask_BR) / jnp.maximum(masked.var(rollout.returns_BR, mask_BR), 1e-8)
    numbers = rollout.statistics(kl_coef) | {
        "score_final": jnp.mean(score_B),  # after the rule for a missing EOS
        "score_total": jnp.mean(score_B - kl_coef * masked.sum(rollout.kl_BR, mask_BR, axis=1)),
        "value": masked.mean(rollout.values_BR, mask_BR),
        "returns": masked.mean(rollout.returns_BR, mask_BR),
        "explained_variance": explained,
    }
    return {f"ppo/{name}": value for name, value in numbers.items()}
