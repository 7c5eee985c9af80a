"""What happens to a rollout as it is used again: the article's three updates from one policy on identical rollouts.

Each of config.seeds rollouts is sampled once from the fine-tuned policy, with one set of advantages. Every update then
takes 8 gradient steps on it; how far the policy has moved, and what it is worth on samples of its own, is measured
after 1, 2, 4 and 8.
"""

import dataclasses
import functools
import time

import jax
import numpy as np
import optax

from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import seeds
from rlhf_jax.ops import importance, losses
from rlhf_jax.pipeline import Stages
from rlhf_jax.report import plots
from rlhf_jax.report.console import Silent
from rlhf_jax.training import optim
from rlhf_jax.training.fit import write_summary
from rlhf_jax.training.workdir import Workdir

USES = (1, 2, 4, 8)
UPDATES = ("policy_gradient", "importance", "clipped")  # every use as if it were fresh; weighted; weighted and clipped
NAME = "reuse"


def surrogate(policy, batch, *, update, clip, temperature, apply):
    """The loss of one of UPDATES over a rollout with advantages, mean over tokens: (scalar, log-probs [B, R])."""
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(policy, batch.tokens_BT, batch.attend_BT, R, temperature=temperature)
    if update == "policy_gradient":
        return losses.policy_gradient(logp_BR, batch.advantages_BR, batch.mask_BR), logp_BR
    limit = clip if update == "clipped" else float("inf")
    return losses.ppo_policy(logp_BR, batch.logp_BR, batch.advantages_BR, batch.mask_BR, clip=limit)[0], logp_BR


def reuse(config, workdir, reporter=None, only=None, given=None):
    """Compares UPDATES after each of USES: {"reuse": {update: {uses: {name: mean over rollouts, name_ci95}}}}."""
    began, reporter = time.monotonic(), reporter or Silent()
    # The rollouts are those of the policy gradient, whatever algorithm the config file has chosen.
    if "algorithm" in (given or ()) and config.algorithm != "policy_gradient":
        raise InputError(f"algorithm: expected policy_gradient, whose rollouts are used, got {config.algorithm}")
    config = dataclasses.replace(config, algorithm="policy_gradient")
    configs.check(config)
    for note in configs.check_given(config, given and given - {"ppo.clip"}):  # the clip of one of UPDATES
        reporter.note(note)
    stages = Stages(config, Workdir(workdir), reporter)
    stages.workdir.lock()
    stage = stages.make(stages.names[-1])
    policy, before = stage.state.policy, stage.evaluate(stage.state).details.numbers["reward"]
    rollouts = [_rollout(stages, i) for i in range(config.seeds)]
    reporter.stage(NAME, len(UPDATES) * len(USES))
    results, done = {}, 0
    tx = optim.adamw(dataclasses.replace(config.policy_gradient, schedule="constant"), max(USES))
    for update in UPDATES:
        use = _use(update, config, stages.setup.apply, tx)
        found: dict[int, list[dict]] = {uses: [] for uses in USES}
        for rollout in rollouts:
            moving, opt = policy, tx.init(policy)
            for uses in range(1, max(USES) + 1):
                moving, opt, moved = use(moving, opt, rollout)
                if uses in USES:
                    numbers = stage.evaluate(stage.state.replace(policy=moving)).details.numbers
                    gained = {"reward_gain": numbers["reward"] - before, "kl_exact": numbers["kl_exact"]}
                    found[uses].append({name: float(value) for name, value in (moved | gained).items()})
        results[update] = {str(uses): _mean(rows) for uses, rows in found.items()}
        for uses in USES:
            done += 1
            reporter.update(done, {f"{NAME}/{name}": value for name, value in results[update][str(uses)].items()})
    plots.reuse(results, stages.workdir / NAME / "plots" / "reuse.png")
    numbers = {NAME: results, "rollouts": config.seeds}
    stages.workdir.write_json(f"{NAME}/config.json", configs.tree(config))
    summary = write_summary(stages.workdir, f"{NAME}/summary.json", time.monotonic() - began, numbers, config.seed)
    reporter.finish()
    reporter.table(*_table(results))
    return summary


def _rollout(stages, seed):
    """The first rollout of a seed, with advantages."""
    stage = stages.make(stages.names[-1], seed)
    kl_coef = stage.state.kl_coef + 0  # a copy, as the step takes the state's arrays
    rollout = stage.step(stage.state, stage.batch_at(0)).rollout
    return policy_gradient.estimate(rollout, kl_coef, config=stages.config.policy_gradient)


def _use(update, config, apply, tx):
    """One gradient step of an update, compiled: (policy, optimizer, rollout) -> (policy, optimizer, how far it is)."""
    section, clip = config.policy_gradient, config.ppo.clip
    loss = functools.partial(surrogate, update=update, clip=clip, temperature=section.temperature, apply=apply)

    @jax.jit
    def use(policy, opt, rollout):
        grads = jax.grad(lambda policy: loss(policy, rollout)[0])(policy)
        changes, opt = tx.update(grads, opt, policy)
        policy = optax.apply_updates(policy, changes)
        logp_BR = loss(policy, rollout)[1]  # of the policy as it is now
        moved = importance.statistics(logp_BR, rollout.logp_BR, rollout.mask_BR)
        aux = losses.ppo_policy(logp_BR, rollout.logp_BR, rollout.advantages_BR, rollout.mask_BR, clip=clip)[1]
        return policy, opt, moved | {name: aux[name] for name in ("approx_kl", "clip_fraction")}

    return use


def _mean(rows):
    """{name: mean, name_ci95} of the rollouts."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    means = {name: float(values_K.mean()) for name, values_K in values.items()}
    if len(rows) > 1:
        means |= {f"{name}_ci95": seeds.half_width(values_K) for name, values_K in values.items()}
    return means


def _table(results):
    """(header, rows) of the numbers worth reading."""
    names = ("ratio_max", "ess_token", "ess", "clip_fraction", "approx_kl", "kl_exact", "reward_gain")
    rows = [
        (update, uses, *(numbers[name] for name in names))
        for update, by_uses in results.items()
        for uses, numbers in by_uses.items()
    ]
    return ("update", "uses", *names), rows
