"""Next-token training: pretraining, and supervised fine-tuning."""

import functools

import numpy as np

from rlhf_jax.algorithms import supervised
from rlhf_jax.evaluate import perplexity
from rlhf_jax.generate import generate
from rlhf_jax.report import plots
from rlhf_jax.stages import common
from rlhf_jax.training import guard, optim


def pretrain(run):
    """Next-token training of the policy from random weights on all texts: its summary."""
    return _stage(run, "pretrain")


def sft(run):
    """Supervised fine-tuning of the policy, after pretraining where there was any: its summary."""
    return _stage(run, "sft")


def prepare(run, name):
    """What the stage trains."""
    config, apply = run.section(name), run.apply
    policy = run.policy_init()
    _, held_out = run.arrays(run.KINDS[name])
    starts, asked = run.questions()
    if name == "sft" and "pretrain" in run.STAGES:
        policy = run.parameters("pretrain", "policy", policy)
    tx = optim.adamw(config, config.steps)
    learn = functools.partial(supervised.step, config=config, apply=apply, tx=tx)
    learn = run.jit(guard.guarded(learn, run.config.guard), donate_argnums=0)
    logprobs = run.jit(functools.partial(supervised.token_logprobs, config=config, apply=apply))
    sampling = run.sampling(run.config.evaluation.temperature)

    @run.jit
    def sample(policy, batch):
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = generate(apply.policy, policy, *prompts, common.row_keys(run.key("evaluation"), batch), sampling)
        return {"response": drawn.response_BR, "mask": drawn.mask_BR, "eos_rate": drawn.done_B}

    def step(state, batch):
        state, numbers = learn(state, batch)
        return state, {f"{name}/{key.split('/')[1]}": value for key, value in numbers.items()}

    def evaluate(state):
        nats_N, tokens_N = perplexity.nll(*run.over(held_out, lambda batch: logprobs(state.policy, batch)))
        numbers = {f"{name}/eval_{key}": value for key, value in perplexity.perplexity(nats_N, tokens_N)}
        drawn = run.over(starts, lambda batch: sample(state.policy, batch), len(asked))
        texts = run.decode(drawn["response"], drawn["mask"])
        rows = run.judge(asked, texts) | {"eos_rate": drawn["eos_rate"], "length": drawn["mask"].sum(axis=1)}
        numbers |= {f"{name}/{key}": float(np.mean(values)) for key, values in rows.items()}
        shown = [{key: row[key] for key in ("prompt", "label") if key in row} for row in asked]
        return numbers, [row | {"completion": text} for row, text in zip(shown, texts, strict=True)]

    return common.Training(
        name=name,
        state=supervised.init(policy, run.key(name), tx=tx),
        step=step,
        evaluate=evaluate,
        best=(f"{name}/eval_loss", min),
        result=("policy",),
    )


def _stage(run, name):
    began = common.began(run, name)
    _, numbers, samples = common.train(run, prepare(run, name))

    def draw(rows, folder):
        plots.supervised(rows, folder / f"{name}.png", name)

    return common.finish(run, name, began, numbers, samples, draw)
