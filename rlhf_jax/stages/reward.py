"""The reward model."""

import functools

import numpy as np

from rlhf_jax.algorithms import preference, supervised
from rlhf_jax.evaluate import accuracy
from rlhf_jax.report import plots
from rlhf_jax.stages import common
from rlhf_jax.training import guard, optim, sharding


def reward(run):
    """A reward model on (prompt, chosen, rejected) rows, from the fine-tuned policy: its summary."""
    began = common.began(run, "reward")
    _, numbers, (ci95, samples) = common.train(run, prepare(run, "reward"))

    def draw(rows, folder):
        plots.reward(rows, folder / "reward.png")

    return common.finish(run, "reward", began, numbers | {"reward/accuracy_ci95": ci95}, samples, draw)


def prepare(run, name):
    """What the stage trains."""
    config, apply = run.section(name), run.apply
    policy = run.parameters("sft", "policy", apply.policy.init(run.key("policy init")))
    _, held_out = run.arrays("preferences")
    _, references = run.arrays("sft")
    rows = run.rows("preferences")[1]
    tx = optim.adamw(config, config.steps)
    step = functools.partial(preference.step, config=config, apply=apply, tx=tx)
    scores = run.jit(functools.partial(preference.scores, apply=apply))

    @run.jit
    def score(reward, batch):
        tokens_BT, real_BT, _ = supervised.tokens(batch, "all")
        return apply.scalar.score(reward, tokens_BT, real_BT)

    def normalize(state):
        """Reference summaries score mean 0 and standard deviation 1 from here on."""
        scores_N = run.over(references, lambda batch: score(state.reward, batch))
        mean, std = float(np.mean(scores_N)), float(np.std(scores_N))
        numbers = {"reward/reference_mean": mean, "reward/reference_std": std}
        return state.replace(reward=apply.scalar.normalize(state.reward, mean, std)), numbers

    def evaluate(state):
        chosen_N, rejected_N = run.over(held_out, lambda batch: scores(state.reward, batch))
        rate, ci95 = accuracy.accuracy(chosen_N, rejected_N)
        samples = [
            {name: rows[i][name] for name in ("prompt", "chosen", "rejected")}
            | {"score_chosen": float(chosen), "score_rejected": float(rejected)}
            for i, chosen, rejected in zip(held_out["index_N"], chosen_N, rejected_N, strict=True)
        ]
        loss = float(np.mean(np.logaddexp(0, rejected_N - chosen_N)))
        return {"reward/eval_accuracy": rate, "reward/eval_loss": loss}, (ci95, samples)

    state = preference.init(apply.scalar.init(run.key("reward head"), policy), run.key(name), tx=tx)
    if config.normalize_before:
        state, _ = normalize(sharding.replicate(state, run.mesh))
    return common.Training(
        name=name,
        state=state,
        step=run.jit(guard.guarded(step, run.config.guard), donate_argnums=0),
        evaluate=evaluate,
        best=("reward/eval_accuracy", max),
        result=("reward",),
        complete=normalize,
    )
