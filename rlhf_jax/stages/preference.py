"""The reward model: trained on preference pairs, from the trunk of the policy before it."""

import functools

import numpy as np

from rlhf_jax.algorithms import preference, supervised
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import accuracy
from rlhf_jax.report import plots
from rlhf_jax.stages import Evaluation, Setup, Stage, Step, Summary
from rlhf_jax.training import optim, sharding

LEAST_STD = 1e-6  # of the references' scores: with less spread they cannot be normalized


def reward_model(name: str, setup: Setup, config: preference.Config, policy) -> Stage:
    """The stage that trains a new head on `policy` with (prompt, chosen, rejected). References: held-out SFT rows."""
    apply = setup.apply
    held_out, rows = setup.arrays("preferences").held_out, setup.task.rows("preferences").held_out
    references = setup.arrays("sft").held_out
    check_references(setup)
    tx = optim.adamw(config, config.steps)
    parts = {"config": config, "apply": apply, "tx": tx, "guard": setup.guard.action, "record": setup.record}
    learn = setup.jit(functools.partial(preference.step, **parts), donate_argnums=0)
    scores = setup.jit(functools.partial(preference.scores, apply=apply))

    @setup.jit
    def score(reward, batch):
        tokens_BT, real_BT, _ = supervised.tokens(batch, "all")
        return apply.scalar.score(reward, tokens_BT, real_BT)

    def normalize(state):
        """(the state in which references score mean 0 and standard deviation 1, mean and deviation before)."""
        scores_N = setup.over(references, lambda batch: score(state.reward, batch))
        mean, std = float(np.mean(scores_N)), float(np.std(scores_N))
        if np.isfinite(std) and std < LEAST_STD:
            raise InputError(
                f"data.sft: the {len(scores_N)} held-out references all score {mean:.4g}; expected a spread, to "
                "normalize the reward model by"
            )
        numbers = {"reference_mean": mean, "reference_std": std}
        return state.replace(reward=apply.scalar.normalize(state.reward, mean, std)), numbers

    def complete(state, evaluation):
        """Normalizes. `loss` is of the model before this, `loss_normalized` of the model after it."""
        state, numbers = normalize(state)
        margin_N = np.array([row["score_chosen"] - row["score_rejected"] for row in evaluation.details[1]])
        loss = float(np.mean(np.logaddexp(0, -margin_N / numbers["reference_std"])))
        return state, numbers | {"loss": evaluation.numbers["loss"], "loss_normalized": loss}

    def step(state, batch, record=False):
        state, numbers = learn(state, batch)
        update = numbers.pop("record", None)
        return Step(state, numbers, record={"batch": batch, "update": update} if record else None)

    def evaluate(state):
        chosen_N, rejected_N = setup.over(held_out, lambda batch: scores(state.reward, batch))
        rate, ci95 = accuracy.accuracy(chosen_N, rejected_N)
        samples = [
            {name: rows[i][name] for name in ("prompt", "chosen", "rejected")}
            | {"score_chosen": float(chosen), "score_rejected": float(rejected)}
            for i, chosen, rejected in zip(held_out["index_N"], chosen_N, rejected_N, strict=True)
        ]
        loss = float(np.mean(np.logaddexp(0, rejected_N - chosen_N)))
        lengths = {f"tokens_{side}_N": held_out[f"{side}_mask_NR"].sum(axis=1) for side in ("chosen", "rejected")}
        pairs = {"chosen_N": chosen_N, "rejected_N": rejected_N, **lengths}
        record = {"pairs": pairs, "samples": samples}
        return Evaluation({"accuracy": rate, "loss": loss}, (ci95, samples), record=record)

    def summarize(state, evaluation):
        ci95, samples = evaluation.details

        def plot(rows, folder, run):
            plots.reward(rows, folder / "reward.png", name, title=setup.title(run, name))
            return {}

        return Summary({"accuracy_ci95": ci95}, samples, plot)

    state = preference.init(apply.scalar.init(setup.key("reward head"), policy), setup.key("reward"), tx=tx)
    state = sharding.replicate(state, setup.mesh)
    if config.normalize_before:
        state, _ = normalize(state)
    return Stage(
        name=name,
        config=config,
        state=state,
        batch_at=setup.batch_at("preferences", config.batch, "reward", f"{name}.batch"),
        step=step,
        learn=learn,
        evaluate=evaluate,
        best=("accuracy", max),
        result=("reward",),
        summarize=summarize,
        headlines=("loss", "accuracy"),
        complete=complete,
        guard=setup.guard,
    )


def check_references(setup: Setup) -> None:
    """Refuses references that cannot have a spread, before anything is trained."""
    references = setup.arrays("sft").held_out
    rows_NT = np.concatenate([references["prompt_NP"], references["response_NR"]], axis=1)
    if len(np.unique(rows_NT, axis=0)) < 2:
        raise InputError(
            f"data.sft: expected at least 2 different held-out rows, to normalize the reward model by; "
            f"got 1 in {len(rows_NT)} rows"
        )
