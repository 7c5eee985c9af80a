"""PPO against a reward model, and what it gained over the fine-tuned policy."""

import functools

import jax.numpy as jnp
import numpy as np

from rlhf_jax import rollout
from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.evaluate import interval, rouge, win_rate
from rlhf_jax.report import metrics, plots
from rlhf_jax.stages import common
from rlhf_jax.training import guard, optim, sharding


def ppo(run):
    """PPO of the fine-tuned policy on prompts, against the reward model: its summary, which compares it with SFT."""
    began = common.began(run, "ppo")
    config, asked = run.config.ppo, run.asked("prompts")
    training = prepare(run, "ppo")
    before, texts_before = training.before
    _, _, (after, texts_after) = common.train(run, training)
    numbers = _compare(before, after)
    if "label" in asked[0]:
        labels = [row["label"] for row in asked]
        for suffix, texts in (("_sft", texts_before), ("", texts_after)):
            numbers |= {f"ppo/{name}{suffix}": value for name, value in rouge.rouge(labels, texts)}
    pairs = zip(
        asked, _samples(before, texts_before, config.kl_coef), _samples(after, texts_after, config.kl_coef), strict=True
    )
    samples = [{"prompt": row["prompt"], "sft": sft, "ppo": ppo} for row, sft, ppo in pairs]

    def draw(rows, folder):
        numbers["ppo/clip_fraction"] = metrics.series(rows, "ppo/clip_fraction")[1][-1]  # of the last update
        numbers.update(_first_update(rows, run.config.ppo))
        plots.ppo(rows, folder)
        truth = "gold" if "gold" in after else "score"
        rate = win_rate.win_rate(after[truth], before[truth])
        plots.before_after(
            before[truth], after[truth], folder / "before_after.png", name=f"{truth} score", win_rate=rate
        )

    summary = common.finish(run, "ppo", began, numbers, samples, draw)
    run.reporter.before_after(_table(before, after))
    return summary


def prepare(run, name):
    """What the stage trains."""
    config, apply = run.section(name), run.apply
    trunk = apply.policy.init(run.key("policy init"))
    policy = run.parameters("sft", "policy", trunk)
    reward = run.parameters("reward", "reward", apply.scalar.zero_head(trunk))
    value = reward if config.value_init == "reward" else apply.scalar.zero_head(policy)
    train_rows, _ = run.rows("prompts")
    asked = run.asked("prompts")
    tx = optim.adamw(config, config.steps * config.epochs * config.minibatches)
    state = ppo_algorithm.init(policy, value, reward, run.key(name), config=config, tx=tx)
    state = sharding.replicate(state, run.mesh)  # before the first measurement, which would be compiled twice otherwise
    sampling = run.sampling(config.temperature, lanes=config.lanes, widths=config.widths)

    @run.jit
    def collect(state, batch):
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = rollout.draw(apply, state.policy, *prompts, rollout.keys(state, config.batch), sampling)
        return rollout.judge(apply, state, *prompts, drawn, sampling)

    learn = functools.partial(ppo_algorithm.step, config=config, apply=apply, tx=tx)
    learn = run.jit(guard.guarded(learn, run.config.guard), donate_argnums=0)
    measure = _measurement(run)

    def step(state, batch):
        drawn = collect(state, batch)
        state, numbers = learn(state, drawn)
        # The device learns while the host reads what was written.
        texts = run.decode(drawn.response_BR, drawn.mask_BR)
        true = run.judge([train_rows[i] for i in np.asarray(batch["index_B"])], texts)
        return state, numbers | {f"ppo/{name}": np.mean(values) for name, values in true.items()}

    def evaluate(state):
        rows, texts = measure(state)
        samples = _samples(rows, texts, config.kl_coef)[: run.config.evaluation.samples]
        run.reporter.samples([{"prompt": row["prompt"]} | sample for row, sample in zip(asked, samples, strict=False)])
        return {f"ppo/eval_{name}": float(np.mean(values)) for name, values in rows.items()}, (rows, texts)

    return common.Training(
        name=name,
        state=state,
        step=step,
        evaluate=evaluate,
        best=("ppo/eval_gold" if "record" in asked[0] else "ppo/eval_score", max),
        result=("policy", "value"),
        before=measure(state),
    )


def _measurement(run):
    """A function of a PPO state: ({name: [N] numbers of each held-out prompt's completion}, its texts).

    KL, which is of the policy that was trained, is at the temperature of training; all else at that of evaluation.
    """
    apply, config = run.apply, run.config
    _, held_out = run.arrays("prompts")
    asked = run.asked("prompts")

    @functools.partial(run.jit, static_argnums=2)
    def judge(state, batch, temperature):
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        sampling = run.sampling(temperature)
        keys_B = common.row_keys(run.key("evaluation"), batch)
        drawn = rollout.sample(apply, state.policy, state.reference, *prompts, keys_B, sampling)
        return {
            "response": drawn.response_BR,
            "mask": drawn.mask_BR,
            "score": rollout.score(apply, state.reward, drawn).score_B,
            "kl": jnp.sum(drawn.kl_BR, axis=1),
            "kl_exact": jnp.sum(drawn.kl_exact_BR, axis=1),
            "eos_rate": drawn.eos_B,
            "length": drawn.length_B,
        }

    def at(state, temperature):
        return run.over(held_out, lambda batch: judge(state, batch, temperature), len(asked))

    def measure(state):
        rows = at(state, config.evaluation.temperature)
        if config.evaluation.temperature != config.ppo.temperature:
            trained = at(state, config.ppo.temperature)
            rows |= {name: trained[name] for name in ("kl", "kl_exact")}
        texts = run.decode(rows.pop("response"), rows.pop("mask"))
        return rows | run.judge(asked, texts), texts

    return measure


def _first_update(rows, config):
    """{name: [its running mean after each epoch]} of the first update, where it was traced."""
    if not config.trace_epochs:
        return {}
    epochs = range(1, config.epochs + 1)
    names = ("ppo/approx_kl", "ppo/clip_fraction")
    return {f"{name}_first_update": [rows[0][f"{name}_epoch_{epoch}"] for epoch in epochs] for name in names}


def _compare(before, after):
    """PPO's numbers, SFT's beside them, and what the difference is worth: on gold, where there is gold."""
    numbers = {}
    for name in after:
        numbers |= {f"ppo/{name}": float(np.mean(after[name])), f"ppo/{name}_sft": float(np.mean(before[name]))}
    for name in ("score", "gold"):
        if name in after:
            gain, ci95 = interval.paired_gain(after[name], before[name])
            numbers |= {
                f"ppo/{name}_gain": gain,
                f"ppo/{name}_ci95": ci95,
                f"ppo/{name}_sft_sd": float(np.std(before[name])),
            }
    if "gold" in after:
        rate, ci95 = win_rate.win_rate(after["gold"], before["gold"])
        numbers |= {"ppo/win_rate": rate, "ppo/win_rate_ci95": ci95}
    return numbers


def _table(before, after):
    """Rows of the final table: (name, before, after, change, its 95% interval)."""
    rows = []
    for name in (name for name in ("gold", "score", "kl", "kl_exact", "eos_rate", "length") if name in after):
        change, ci95 = interval.paired_gain(after[name], before[name])
        rows.append((name, float(np.mean(before[name])), float(np.mean(after[name])), change, ci95))
    return rows


def _samples(rows, texts, kl_coef):
    """Completions with their numbers; `total` is what PPO maximizes."""
    rows = {name: rows[name] for name in ("score", "kl", "gold") if name in rows}
    rows["total"] = rows["score"] - kl_coef * rows["kl"]
    return [{"completion": text} | {name: float(rows[name][i]) for name in rows} for i, text in enumerate(texts)]
