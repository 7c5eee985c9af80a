"""Vanilla policy gradient (REINFORCE; Williams 1992) with a KL-shaped reward. Trains `policy`.

One step is: sample a Rollout from the policy, score it, `estimate` what each token was worth, take one gradient step.
With `epochs` > 1 the same rollout is used again, and tokens are weighted by pi_new / pi_old for the policy that has
moved: PPO without its clip, whose variance grows with every reuse.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rlhf_jax import rollout as rollouts
from rlhf_jax.fields import choice, number
from rlhf_jax.ops import advantages, kl, losses, masked
from rlhf_jax.training import optim
from rlhf_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Config(optim.Config):
    """Defaults are the article's happy tweets, but for reward-to-go and the baseline, which it does without."""

    lr: float = number(3e-4, above=0, most=10)
    schedule: str = choice("constant", *optim.SCHEDULES)
    steps: int = number(100, least=0)  # rollouts; 0: the stage is left out
    batch: int = number(32, least=1)  # episodes a rollout
    epochs: int = number(1, least=1)  # gradient steps a rollout; importance-weighted when more than 1
    importance: bool = True  # False: reused rollouts are not weighted (biased; to compare)
    microbatches: int = number(1, least=1, neutral=True)  # slices of a batch whose gradients are summed: less memory
    temperature: float = number(1.0, above=0, most=100)  # of sampling, and of every log-prob
    top_k: int = number(0, least=0)  # must stay 0: rollouts sample the distribution that the update differentiates
    top_p: float = number(1.0, least=0, most=1)  # must stay 1
    kl_coef: float = number(0.1, least=0)  # reward subtracted per nat of KL from the reference
    kl_target: float = number(0.0, least=0)  # nats a sequence that kl_coef is adapted to reach; 0: kl_coef is fixed
    kl_horizon: int = number(10_000, least=1)  # episodes over which kl_coef adapts; more: slower
    gamma: float = number(1.0, least=0, most=1)  # discount of rewards, per token
    # False: each token's return is the score minus its own KL penalty, as in the article.
    reward_to_go: bool = True
    # Subtracted from the returns. mean: the batch's mean return; leave_one_out: the mean return of the other rows.
    baseline: str = choice("leave_one_out", "none", "mean", "leave_one_out")
    whiten_advantages: bool = False
    eval_every: int = number(10, least=0)  # rollouts between evaluations; 0: only at the end
    save_every: int = number(50, least=0, neutral=True)  # rollouts between checkpoints; 0: only at the end

    def problems(self):
        """Checks that concern several fields."""
        yield from optim.problems(self, updates=self.steps * self.epochs)
        yield from rollouts.problems(self)


def init(policy, key, *, config, tx):
    """The state before the first rollout; the reference is the policy as it is now."""
    policy, reference = jax.tree.map(jnp.copy, (policy, policy))  # donated to the update, which needs its own
    return TrainState.create(
        key,
        policy=policy,
        reference=reference,
        optimizer={"policy": tx.init(policy)},
        kl_coef=jnp.float32(config.kl_coef),
    )


def baseline(returns_B, kind):
    """What to subtract from each episode: 0, the mean return, or the mean return of the others (Kool et al. 2019).

    Only the last keeps the gradient unbiased and removes what episodes have in common; a batch of one has no others.
    """
    if kind == "none":
        return jnp.zeros_like(returns_B)
    if kind == "mean":
        return jnp.full_like(returns_B, jnp.mean(returns_B))
    return (jnp.sum(returns_B) - returns_B) / jnp.maximum(returns_B.shape[0] - 1, 1)


def estimate(rollout, kl_coef, *, config):
    """The rollout with returns and advantages: from here on they are constants.

    reward-to-go:  G_t = sum_{k >= t} gamma^(k - t) r_k,  r_k = -kl_coef KL_k + [k is last] score
    without:       G_t = score - kl_coef KL_t
    advantage:     A_t = G_t - baseline,  the baseline a mean over episodes of score - kl_coef sum_t KL_t
    """
    mask_BR = rollout.mask_BR
    penalty_BR = kl_coef * rollout.kl_BR
    if config.reward_to_go:
        shape = jax.vmap(lambda score, kl_R, mask_R: advantages.shape_rewards(score, kl_R, mask_R, kl_coef=kl_coef))
        to_go = jax.vmap(lambda r, m: advantages.discounted_returns(r, m, gamma=config.gamma))
        returns_BR = to_go(shape(rollout.score_B, rollout.kl_BR, mask_BR), mask_BR)
        total_B = rollout.score_B - masked.sum(penalty_BR, mask_BR, axis=1)
    else:
        returns_BR = jnp.where(mask_BR, rollout.score_B[:, None] - penalty_BR, 0)
        total_B = masked.mean(returns_BR, mask_BR, axis=1)
    advantages_BR = jnp.where(mask_BR, returns_BR - baseline(total_B, config.baseline)[:, None], 0)
    if config.whiten_advantages:
        advantages_BR = masked.whiten(advantages_BR, mask_BR)
    return rollout.replace(advantages_BR=advantages_BR, returns_BR=returns_BR)


def loss(policy, batch, *, config, apply):
    """-A log pi, or -A pi / pi_old where rollouts are reused, mean over tokens: (scalar, metrics)."""
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(policy, batch.tokens_BT, batch.attend_BT, R, temperature=config.temperature)
    weighted, aux = losses.ppo_policy(logp_BR, batch.logp_BR, batch.advantages_BR, batch.mask_BR, clip=math.inf)
    plain = losses.policy_gradient(logp_BR, batch.advantages_BR, batch.mask_BR)
    value = weighted if config.epochs > 1 and config.importance else plain
    return value, {
        "pg/policy_loss": value,
        "pg/approx_kl": aux["approx_kl"],
        "pg/ratio": aux["ratio"],
        "pg/ratio_square": aux["ratio_square"],
    }


def update(state, rollout, *, config, apply, tx):
    """All gradient steps on one rollout: (state, metrics [epochs] each)."""

    def epoch(carry, _):
        policy, opt_state = carry

        def grads(part):
            (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(policy, part, config=config, apply=apply)
            return grads, aux

        grads, aux = optim.accumulate(grads, rollout, jnp.sum(rollout.mask_BR, axis=1), config.microbatches)
        return optim.update(tx, grads, opt_state, policy), aux | {"pg/policy_grad_norm": optim.norm(grads)}

    start = (state.policy, state.optimizer["policy"])
    (policy, opt_state), aux = jax.lax.scan(epoch, start, length=config.epochs)
    return state.replace(step=state.step + 1, policy=policy, optimizer={"policy": opt_state}), aux


def step(state, rollout, *, config, apply, tx):
    """Returns, update and KL controller for a scored rollout: (state, metrics)."""
    rollout = estimate(rollout, state.kl_coef, config=config)
    numbers = metrics(rollout, kl_coef=state.kl_coef)
    state, aux = update(state, rollout, config=config, apply=apply, tx=tx)
    control = {"target": config.kl_target, "horizon": config.kl_horizon, "episodes": rollout.mask_BR.shape[0]}
    state = state.replace(kl_coef=kl.adapt(state.kl_coef, numbers["pg/kl"], **control))
    aux["pg/ess"] = jnp.square(aux["pg/ratio"]) / aux.pop("pg/ratio_square")
    numbers |= {name: jnp.mean(value) for name, value in aux.items()}
    numbers |= {f"{name}_last": aux[name][-1] for name in ("pg/approx_kl", "pg/ess")}
    return state, numbers


def metrics(rollout, *, kl_coef):
    """What a rollout says, before the policy learns from it; see Rollout.statistics."""
    numbers = rollout.statistics(kl_coef)
    numbers["returns"] = masked.mean(rollout.returns_BR, rollout.mask_BR)
    numbers["advantage_std"] = jnp.sqrt(masked.var(rollout.advantages_BR, rollout.mask_BR))
    return {f"pg/{name}": value for name, value in numbers.items()}
