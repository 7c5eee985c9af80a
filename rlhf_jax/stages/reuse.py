"""What happens to a rollout as it is used again: the article's three updates from one policy on identical rollouts.

Each of run.config.seeds rollouts is drawn once from the fine-tuned policy, with one set of advantages. Every update
then takes 8 gradient steps on it; how far the policy has moved, and what it is worth on samples of its own, is
measured after 1, 2, 4 and 8.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import policy_gradient
from rlhf_jax.ops import importance, losses
from rlhf_jax.report import metrics, plots
from rlhf_jax.stages import common
from rlhf_jax.stages.verifiable import Learner, over_seeds
from rlhf_jax.training import optim

USES = (1, 2, 4, 8)
UPDATES = ("policy_gradient", "importance", "clipped")  # every use as if it were fresh; weighted; weighted and clipped


def surrogate(policy, batch, *, update, clip, temperature, apply):
    """The loss of one of UPDATES over a rollout with advantages, mean over tokens: (scalar, log-probs [B, R])."""
    R = batch.mask_BR.shape[1]
    logp_BR = apply.policy.logprobs(policy, batch.tokens_BT, batch.attend_BT, R, temperature=temperature)
    if update == "policy_gradient":
        return losses.policy_gradient(logp_BR, batch.advantages_BR, batch.mask_BR), logp_BR
    limit = clip if update == "clipped" else float("inf")
    return losses.ppo_policy(logp_BR, batch.logp_BR, batch.advantages_BR, batch.mask_BR, clip=limit)[0], logp_BR


def reuse(run):
    """Compares UPDATES after each of USES: {"update": {"uses": {name: mean over rollouts, name_ci95}}}."""
    began = time.monotonic()
    # The rollouts are those of the policy gradient, whatever algorithm the config has chosen.
    learner = Learner(run, "policy_gradient")
    config, apply = run.config.policy_gradient, run.apply
    policy = learner.reference
    before, _, _ = learner.measure(jax.tree.map(lambda x: x[None], policy))
    before = {name: float(value_K[0]) for name, value_K in before.items()}
    state = learner.begin(policy, before, before)
    train, _ = run.arrays("prompts")
    batch = {name.replace("_NP", "_BP").replace("_N", "_B"): array for name, array in train.items()}
    drawn = learner.draw(state, batch)
    compared, _ = learner.compare(state, batch, drawn)
    scored = compared.replace(score_B=jnp.asarray(learner.judge(learner.texts(drawn))["reward"]))
    rollout = jax.vmap(lambda scored, kl_coef: policy_gradient.estimate(scored, kl_coef, config=config))(
        scored, state.kl_coef
    )
    tx = optim.adamw(dataclasses.replace(config, schedule="constant"), max(USES))
    run.reporter.stage("reuse", len(UPDATES) * len(USES))
    results, done = {}, 0
    for update in UPDATES:
        loss = functools.partial(
            surrogate, update=update, clip=run.config.ppo.clip, temperature=config.temperature, apply=apply
        )

        @run.jit
        def use(policy_K, opt_K, rollout_K, loss=loss):
            def one(policy, opt, rollout):
                grads = jax.grad(lambda policy: loss(policy, rollout)[0])(policy)
                policy, opt = optim.update(tx, grads, opt, policy)
                logp_BR = loss(policy, rollout)[1]  # of the policy as it is now
                moved = importance.statistics(logp_BR, rollout.logp_BR, rollout.mask_BR)
                aux = losses.ppo_policy(
                    logp_BR, rollout.logp_BR, rollout.advantages_BR, rollout.mask_BR, clip=run.config.ppo.clip
                )[1]
                return policy, opt, moved | {name: aux[name] for name in ("approx_kl", "clip_fraction")}

            return jax.vmap(one)(policy_K, opt_K, rollout_K)

        policy_K, opt_K, results[update] = state.policy, jax.vmap(tx.init)(state.policy), {}
        for uses in range(1, max(USES) + 1):
            policy_K, opt_K, moved = use(policy_K, opt_K, rollout)
            if uses in USES:
                numbers, _, _ = learner.measure(policy_K)
                numbers["reward_gain"] = numbers["reward"] - before["reward"]
                told = jax.device_get(moved) | {name: numbers[name] for name in ("reward_gain", "kl_exact")}
                results[update][str(uses)] = {name: float(value) for name, value in over_seeds(told).items()}
                done += 1
                run.reporter.update(
                    done, {f"reuse/{name}": value for name, value in results[update][str(uses)].items()}
                )
    folder = run.workdir / "reuse"
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plots.reuse(results, folder / "plots" / "reuse.png")
    numbers = {"reuse": results, "rollouts": run.config.seeds}
    summary = common.write_summary(run, folder, time.monotonic() - began, numbers)
    metrics.summarize(folder / "config.json", dataclasses.asdict(run.config))
    run.reporter.finish()
    run.reporter.table(*_table(results))
    return summary


def _table(results):
    """(header, rows) of what is worth reading."""
    names = ("ratio_max", "ess_token", "ess", "clip_fraction", "approx_kl", "kl_exact", "reward_gain")
    rows = [
        (update, uses, *(numbers[name] for name in names))
        for update, by_uses in results.items()
        for uses, numbers in by_uses.items()
    ]
    return ("update", "uses", *names), rows
