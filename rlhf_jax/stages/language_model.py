"""Next-token training: pretraining on plain texts, and supervised fine-tuning."""

import functools

import numpy as np

from rlhf_jax.algorithms import supervised
from rlhf_jax.evaluate import perplexity
from rlhf_jax.report import plots
from rlhf_jax.stages import Evaluation, Setup, Stage, Step, Summary, measure
from rlhf_jax.training import optim, sharding

SHOWN = 16  # held-out rows whose tokens a trace records


def language_model(name: str, setup: Setup, config: supervised.Config, policy) -> Stage:
    """The stage `name`, "pretrain" or "sft": it trains `policy` on the rows of the kind with the same name."""
    apply = setup.apply
    held_out = setup.arrays(name).held_out
    starts, questions = setup.questions(name)
    tx = optim.adamw(config, config.steps)
    parts = {"config": config, "apply": apply, "tx": tx, "guard": setup.guard.action, "record": setup.record}
    learn = setup.jit(functools.partial(supervised.step, **parts), donate_argnums=0)
    logprobs = setup.jit(functools.partial(supervised.token_logprobs, config=config, apply=apply))
    sampling = setup.sampling(setup.evaluation.temperature)
    sample = setup.jit(functools.partial(measure.sample, apply=apply, sampling=sampling))
    key = setup.key("evaluation")

    def step(state, batch, record=False):
        state, numbers = learn(state, batch)
        update = numbers.pop("record", None)
        return Step(state, numbers, record={"batch": batch, "update": update} if record else None)

    def evaluate(state):
        logp_NT, mask_NT = setup.over(held_out, lambda batch: logprobs(state.policy, batch))
        nats_N, tokens_N = perplexity.nll(logp_NT, mask_NT)
        numbers = dict(perplexity.perplexity(nats_N, tokens_N))
        drawn = setup.over(starts, lambda batch: sample(state.policy, batch, key), len(questions))
        texts = setup.decode(drawn["response"], drawn["mask"])
        judged = measure.judge(setup.task, None, questions, texts, drawn["eos_rate"])
        rows = judged | {"eos_rate": drawn["eos_rate"], "length": drawn["mask"].sum(axis=1)}
        numbers |= {column: float(np.mean(values)) for column, values in rows.items()}
        shown = [{column: row[column] for column in ("prompt", "label") if column in row} for row in questions]
        samples = [row | {"completion": text} for row, text in zip(shown, texts, strict=True)]
        first = {name: array[:SHOWN] for name, array in held_out.items()} | {"logp_NT": logp_NT[:SHOWN]}
        held = {"nats_N": nats_N, "tokens_N": tokens_N}
        record = {"shown": first | {"mask_NT": mask_NT[:SHOWN]}, "held_out": held, "samples": samples[:SHOWN]}
        return Evaluation(numbers, samples, tuple(samples[: setup.evaluation.samples]), record)

    def summarize(state, evaluation):
        def plot(rows, folder, run):
            plots.supervised(rows, folder / f"{name}.png", name, title=setup.title(run, name))
            return {}

        return Summary({}, evaluation.details, plot)

    return Stage(
        name=name,
        config=config,
        state=sharding.place(supervised.init(policy, setup.key(name), tx=tx), setup.mesh),
        batch_at=setup.batch_at(name, config.batch, name, f"{name}.batch"),
        step=step,
        learn=learn,
        evaluate=evaluate,
        best=("loss", min),
        result=("policy",),
        summarize=summarize,
        headlines=("loss", "gold", "reward", "eos_rate"),
        guard=setup.guard,
    )
