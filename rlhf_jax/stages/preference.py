"""What learns from preference pairs: the reward model, from the trunk of the policy before it; and DPO, the policy."""

import functools

import numpy as np

from rlhf_jax import rewards
from rlhf_jax.algorithms import dpo as dpo_algorithm
from rlhf_jax.algorithms import preference, supervised
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import accuracy
from rlhf_jax.report import plots
from rlhf_jax.stages import Evaluation, Setup, Stage, Step, Summary, measure
from rlhf_jax.training import optim, sharding

LEAST_STD = 1e-6  # of the references' scores: with less spread they cannot be normalized


def half(setup: Setup, judge: bool) -> np.ndarray:
    """The places of the training pairs of the hold-out judge, or of the reward model: no prompt is in both."""
    rows, index_N = setup.task.rows("preferences").train, setup.arrays("preferences").train["index_N"]
    sides = batches.split([{"prompt": rows[i]["prompt"], "at": at} for at, i in enumerate(index_N)], 0.5, setup.seed)
    return np.array([row["at"] for row in sides[judge]])


def reward_model(name: str, setup: Setup, config: preference.Config, policy, only=None) -> Stage:
    """The stage that trains a new head on `policy` with (prompt, chosen, rejected). References: held-out SFT rows.

    name: "reward", or "judge" for a second model of the same kind. only: the places of its training pairs; None: all.
    """
    apply = setup.apply
    held_out, rows = setup.arrays("preferences").held_out, setup.task.rows("preferences").held_out
    references = setup.arrays("sft").held_out
    check_references(setup)
    tx = optim.adamw(config, config.steps)
    parts = {"config": config, "apply": apply, "tx": tx, "guard": setup.guard.action, "record": setup.record}
    learn = setup.jit(functools.partial(preference.step, **parts), donate_argnums=0)
    scores = setup.jit(functools.partial(preference.scores, apply=apply))
    score = setup.jit(functools.partial(_score, apply=apply))

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

    state = preference.init(apply.scalar.init(setup.key(f"{name} head"), policy), setup.key(name), tx=tx)
    state = sharding.place(state, setup.mesh)
    if config.normalize_before:
        state, _ = normalize(state)
    return Stage(
        name=name,
        config=config,
        state=state,
        batch_at=setup.batch_at("preferences", config.batch, name, "reward.batch", only=only),
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


def _score(reward, batch, *, apply):
    """The score of each row of fine-tuning [B]."""
    tokens_BT, real_BT, _ = supervised.tokens(batch, "all")
    return apply.scalar.score(reward, tokens_BT, real_BT)


def check_references(setup: Setup) -> None:
    """Refuses references that cannot have a spread, before anything is trained."""
    references = setup.arrays("sft").held_out
    rows_NT = np.concatenate([references["prompt_NP"], references["response_NR"]], axis=1)
    if len(np.unique(rows_NT, axis=0)) < 2:
        raise InputError(
            f"data.sft: expected at least 2 different held-out rows, to normalize the reward model by; "
            f"got 1 in {len(rows_NT)} rows"
        )


def dpo(
    name: str,
    setup: Setup,
    config: dpo_algorithm.Config,
    policy,
    reward: rewards.Reward | None = None,
    *,
    judge: rewards.Reward | None = None,
    only=None,
    key=None,
    sides: tuple[str, str] = ("_sft", ""),
) -> Stage:
    """The stage that trains `policy` on (prompt, chosen, rejected).

    reward, judge: a reward, and a reward model of other pairs, that only measure the policy; if any. only: the places
    of the training pairs; None: all.
    """
    apply = setup.apply
    encoded, rows = setup.arrays("preferences"), setup.task.rows("preferences").held_out
    tx = optim.adamw(config, config.steps)
    parts = {"config": config, "apply": apply}
    step_parts = {"tx": tx, "guard": setup.guard.action, "record": setup.record}
    learn = setup.jit(functools.partial(dpo_algorithm.step, **parts, **step_parts), donate_argnums=0)
    logprobs = setup.jit(functools.partial(dpo_algorithm.logprobs, **parts))

    def read(policy, arrays):
        """Log-probs ([N], [N]) of the chosen and of the rejected completions."""
        found = setup.over(arrays, lambda batch: logprobs(policy, batch))
        return found["chosen_B"], found["rejected_B"]

    def referred(arrays):
        chosen_N, rejected_N = read(policy, arrays)
        return {"chosen_ref_N": chosen_N, "rejected_ref_N": rejected_N}

    train_refs, held_out_refs = referred(encoded.train), referred(encoded.held_out)
    measured = measure.measurement(setup, config, reward, judge)

    def step(state, batch, record=False):
        state, numbers = learn(state, batch)
        update = numbers.pop("record", None)
        return Step(state, numbers, record={"batch": batch, "update": update} if record else None)

    def evaluation(state, found):
        both = zip(read(state.policy, encoded.held_out), held_out_refs.values(), strict=True)
        gains = [config.beta * (logp_N - ref_N) for logp_N, ref_N in both]  # implicit rewards
        rate, ci95 = accuracy.accuracy(*gains)
        numbers = found.numbers | {"accuracy": rate, "margin": float(np.mean(gains[0] - gains[1]))}
        shown = [
            {"prompt": row["prompt"], "completion": text}
            for row, text in zip(setup.questions("prompts")[1], found.texts, strict=True)
        ]
        pairs = [
            {key: rows[i][key] for key in ("prompt", "chosen", "rejected")}
            | {"score_chosen": float(chosen), "score_rejected": float(rejected)}
            for i, chosen, rejected in zip(encoded.held_out["index_N"], *gains, strict=True)
        ]
        record = {"pairs": {"chosen_N": gains[0], "rejected_N": gains[1]}, "samples": pairs}
        return Evaluation(numbers, (found, ci95), tuple(shown[: setup.evaluation.samples]), record)

    def summarize(state, evaluated):
        last, ci95 = evaluated.details
        metric = measure.metric_of(last, reward)
        numbers = measure.compare(before, last, sides, metric) | {"accuracy_ci95": ci95}
        numbers |= measure.passes(setup, config, state, sides)
        first, now = (measure.columns(found, metric) for found in (before, last))
        samples = measure.side_by_side(name, setup.questions("prompts")[1], first, now, (), metric, setup.task)

        def plot(rows, folder, run):
            plots.reward(rows, folder / "dpo.png", name, title=setup.title(run, name))
            return {}

        return Summary(numbers, samples, plot, measure.table(before, last, numbers, metric))

    state = dpo_algorithm.init(policy, setup.key("rl") if key is None else key, tx=tx)
    state = sharding.place(state, setup.mesh)
    before = measured(state)
    return Stage(
        name=name,
        config=config,
        state=state,
        batch_at=setup.batch_at("preferences", config.batch, "rl", f"{name}.batch", more=train_refs, only=only),
        step=step,
        learn=learn,
        evaluate=lambda state: evaluation(state, measured(state)),
        best=("accuracy", max),
        result=("policy",),
        summarize=summarize,
        headlines=("accuracy", "score", "reward", "judge", "gold", "win_rate", "kl_exact", "eos_rate"),
        first=evaluation(state, before),
        frozen=("reference",),
        guard=setup.guard,
    )
