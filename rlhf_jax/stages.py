"""Typed config -> a finished stage: fine-tuning, reward model, PPO, and the three in a row.

The functions that XLA compiles are named here, once a stage; what they call is pure. Evaluation is on held-out rows,
and a row's noise is its own (a key folded with its index): two policies meet the same prompts and the same noise.
"""

import functools
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import loop, metrics, optim, plots, rollout, sharding
from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.algorithms import preference, supervised
from rlhf_jax.checkpoint import Checkpoints
from rlhf_jax.console import number
from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import accuracy, interval, perplexity, rouge, win_rate
from rlhf_jax.generate import generate

HEADLINES = {  # what a stage says when it is done
    "sft": ("sft/loss", "sft/gold", "sft/eos_rate"),
    "reward": ("reward/loss", "reward/accuracy"),
    "ppo": ("ppo/score", "ppo/gold", "ppo/win_rate", "ppo/kl_exact", "ppo/eos_rate"),
}


def summarize(run):
    """The whole job, fine-tuning -> reward model -> PPO, without what is finished already: the run's summary."""
    began = time.monotonic()
    stages = {"sft": sft, "reward": reward, "ppo": ppo}
    todo = [name for name in stages if not run.finished(name)]
    for name in todo:  # what is wrong with the data is found now, not when its stage begins
        _check_batch(run, name)
    for name, stage in stages.items():
        if name in todo:
            stage(run)
        else:
            run.reporter.note(f"{name}: finished with this config, skipped")
    if not todo and (run.workdir / "summary.json").exists():
        return json.loads((run.workdir / "summary.json").read_text())
    rows = [metrics.read(run.workdir / name / "metrics.jsonl") for name in stages]
    plots.pipeline(*rows, run.workdir / "plots" / "pipeline.png", title=f"seed {run.config.seed}")
    shutil.copyfile(run.workdir / "ppo" / "samples.jsonl", run.workdir / "samples.jsonl")
    numbers = {}
    for name in stages:
        numbers |= {key: value for key, value in run.summary(name).items() if key.startswith(f"{name}/")}
    return _summary(run, run.workdir, began, numbers)


def sft(run):
    """Supervised fine-tuning of the policy on (prompt, label) rows: its summary."""
    began = time.monotonic()
    config, apply = run.config.sft, run.apply
    train, held_out = run.arrays("sft")
    asked = run.asked("sft")
    tx = optim.adamw(config, config.steps)
    state = supervised.init(run.policy_init(), run.key("sft"), tx=tx)
    step = jax.jit(functools.partial(supervised.step, config=config, apply=apply, tx=tx), donate_argnums=0)
    logprobs = jax.jit(functools.partial(supervised.token_logprobs, config=config, apply=apply))
    sampling = run.sampling(run.config.evaluation.temperature)

    @jax.jit
    def sample(policy, batch):
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = generate(apply.policy, policy, *prompts, _row_keys(run, batch), sampling)
        return {"response": drawn.response_BR, "mask": drawn.mask_BR, "eos_rate": drawn.done_B}

    def evaluate(state):
        nats_N, tokens_N = perplexity.nll(*run.over(held_out, lambda batch: logprobs(state.policy, batch)))
        numbers = {f"sft/eval_{name}": value for name, value in perplexity.perplexity(nats_N, tokens_N)}
        drawn = run.over(held_out, lambda batch: sample(state.policy, batch), len(asked))
        texts = run.decode(drawn["response"], drawn["mask"])
        rows = run.gold(asked, texts) | {"eos_rate": drawn["eos_rate"], "length": drawn["mask"].sum(axis=1)}
        numbers |= {f"sft/{name}": float(np.mean(values)) for name, values in rows.items()}
        return numbers, [
            {"prompt": row["prompt"], "label": row["label"], "completion": text}
            for row, text in zip(asked, texts, strict=True)
        ]

    def draw(rows, folder):
        plots.supervised(rows, folder / "sft.png")

    _, numbers, samples = _train(run, "sft", state, train, step_fn=step, evaluate=evaluate)
    return _finish(run, "sft", began, numbers, samples, draw)


def reward(run):
    """A reward model on (prompt, chosen, rejected) rows, from the fine-tuned policy: its summary."""
    began = time.monotonic()
    config, apply = run.config.reward, run.apply
    policy = run.parameters("sft", "policy", apply.policy.init(run.key("policy init")))
    train, held_out = run.arrays("preferences")
    _, references = run.arrays("sft")
    rows = run.rows("preferences")[1]
    tx = optim.adamw(config, config.steps)
    state = preference.init(apply.scalar.init(run.key("reward head"), policy), run.key("reward"), tx=tx)
    step = jax.jit(functools.partial(preference.step, config=config, apply=apply, tx=tx), donate_argnums=0)
    scores = jax.jit(functools.partial(preference.scores, apply=apply))

    @jax.jit
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

    def draw(rows, folder):
        plots.reward(rows, folder / "reward.png")

    _, numbers, (ci95, samples) = _train(
        run, "reward", state, train, step_fn=step, evaluate=evaluate, complete=normalize
    )
    numbers |= {"reward/accuracy_ci95": ci95}
    return _finish(run, "reward", began, numbers, samples, draw)


def ppo(run):
    """PPO of the fine-tuned policy on prompts, against the reward model: its summary, which compares it with SFT."""
    began = time.monotonic()
    config, apply = run.config.ppo, run.apply
    trunk = apply.policy.init(run.key("policy init"))
    policy = run.parameters("sft", "policy", trunk)
    reward = run.parameters("reward", "reward", apply.scalar.zero_head(trunk))
    value = reward if config.value_init == "reward" else apply.scalar.zero_head(policy)
    train, _ = run.arrays("prompts")
    train_rows, _ = run.rows("prompts")
    asked = run.asked("prompts")
    tx = optim.adamw(config, config.steps * config.epochs * config.minibatches)
    state = ppo_algorithm.init(policy, value, reward, run.key("ppo"), config=config, tx=tx)
    state = sharding.replicate(state, run.mesh)  # before the first measurement, which would be compiled twice otherwise
    sampling = run.sampling(config.temperature)

    @jax.jit
    def collect(state, batch):
        keys_B = jax.random.split(jax.random.fold_in(state.step_key, 0), config.batch)
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        drawn = rollout.sample(apply, state.policy, state.reference, *prompts, keys_B, sampling)
        return rollout.value(apply, state.value, rollout.score(apply, state.reward, drawn))

    learn = jax.jit(functools.partial(ppo_algorithm.step, config=config, apply=apply, tx=tx), donate_argnums=0)
    measure = _measurement(run)

    def step(state, batch):
        drawn = collect(state, batch)
        state, numbers = learn(state, drawn)
        # The device learns while the host reads what was written.
        texts = run.decode(drawn.response_BR, drawn.mask_BR)
        true = run.gold([train_rows[i] for i in np.asarray(batch["index_B"])], texts)
        return state, numbers | {f"ppo/{name}": np.mean(values) for name, values in true.items()}

    def evaluate(state):
        rows, texts = measure(state)
        samples = _samples(rows, texts, config.kl_coef)[: run.config.evaluation.samples]
        run.reporter.samples([{"prompt": row["prompt"]} | sample for row, sample in zip(asked, samples, strict=False)])
        return {f"ppo/eval_{name}": float(np.mean(values)) for name, values in rows.items()}, (rows, texts)

    before, texts_before = measure(state)
    _, _, (after, texts_after) = _train(run, "ppo", state, train, step_fn=step, evaluate=evaluate)
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
        plots.ppo(rows, folder)
        truth = "gold" if "gold" in after else "score"
        rate = win_rate.win_rate(after[truth], before[truth])
        plots.before_after(
            before[truth], after[truth], folder / "before_after.png", name=f"{truth} score", win_rate=rate
        )

    summary = _finish(run, "ppo", began, numbers, samples, draw)
    run.reporter.before_after(_table(before, after))
    return summary


def _measurement(run):
    """A function of a PPO state: ({name: [N] numbers of each held-out prompt's completion}, its texts).

    KL, which is of the policy that was trained, is at the temperature of training; all else at that of evaluation.
    """
    apply, config = run.apply, run.config
    _, held_out = run.arrays("prompts")
    asked = run.asked("prompts")

    @functools.partial(jax.jit, static_argnums=2)
    def judge(state, batch, temperature):
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"])
        sampling = run.sampling(temperature)
        drawn = rollout.sample(apply, state.policy, state.reference, *prompts, _row_keys(run, batch), sampling)
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
        return rows | run.gold(asked, texts), texts

    return measure


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


def _row_keys(run, batch):
    """A key for each held-out row, the same in every evaluation and in any batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(run.key("evaluation"), batch["index_B"])


def _train(run, name, state, arrays, *, step_fn, evaluate, complete=lambda state: (state, {})):
    """The loop of one stage in its folder, from its last checkpoint if it has one: (state, numbers, details).

    numbers and details are evaluate's of the last state. complete(state) -> (state, numbers) is applied after the last
    step, before that evaluation and the last checkpoint.
    """
    config = getattr(run.config, name)
    _check_batch(run, name)
    folder = run.open(name)
    seed = int(jax.random.randint(run.key(name), (), 0, 2**31 - 1))
    feed = _Feed(batches.iterate(arrays, batch=config.batch, seed=seed), run.mesh)
    state = sharding.replicate(state, run.mesh)
    with Checkpoints(folder / "checkpoints") as checkpoints, loop.stop_signal() as stop:
        saved = checkpoints.latest
        if saved is not None:
            state, position = checkpoints.restore(state)
            feed.set_state(position)
            run.reporter.note(f"{name}: goes on after step {saved}")
        with metrics.Writer(folder, resume_step=saved) as log:
            run.reporter.stage(name, config.steps, start=saved or 0)
            parts = {"checkpoints": checkpoints, "log": log, "reporter": run.reporter, "stop": stop}
            state = loop.run(state, feed, config=config, step_fn=step_fn, evaluate=evaluate, **parts)
            if saved == config.steps:  # it was stopped between its last checkpoint and its summary
                numbers, details = evaluate(state)
                logged = metrics.read(folder / "metrics.jsonl")[-1]
                return state, {name: logged[name] for name in logged if "/" in name} | numbers, details
            state, told = complete(state)
            numbers, details = evaluate(state)
            numbers |= told
            loop.record(config.steps, numbers, log, run.reporter)
            checkpoints.save(config.steps, state, feed.get_state())
            if stop():
                raise loop.Stopped(f"stopped after the last step of {name}; the same command goes on from there")
            return state, numbers, details


def _check_batch(run, name):
    """InputError where a stage's batch is more than the rows that it has to train on."""
    kind = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[name]
    rows, batch = len(run.arrays(kind)[0]["index_N"]), getattr(run.config, name).batch
    if batch > rows:
        raise InputError(f"{name}.batch: expected at most {rows}, the training rows of data.{kind}, got {batch}")


class _Feed:
    """Batches on the devices, from an iterator whose position can be saved."""

    def __init__(self, iterator, mesh):
        self._iterator, self._mesh = iterator, mesh

    def __next__(self):
        return sharding.shard(next(self._iterator), self._mesh)

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, position):
        self._iterator.set_state(position)


def _finish(run, name, began, numbers, samples, draw):
    """Plots, samples and, last, the summary of a stage: it is finished. Held-out numbers lose their `eval_`."""
    folder = run.workdir / name
    draw(metrics.read(folder / "metrics.jsonl"), folder / "plots")
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)
    summary = _summary(run, folder, began, {key.replace("eval_", ""): value for key, value in numbers.items()})
    told = (f"{key.split('/')[1]} {number(summary[key])}" for key in HEADLINES[name] if key in summary)
    run.reporter.finish("held out: " + "  ".join(told))
    return summary


def _summary(run, folder, began, numbers):
    """Writes and returns summary.json: the numbers, and what they depend on."""
    seconds = round(time.monotonic() - began, 1)
    summary = {**metrics.environment(), "seed": run.config.seed, "seconds": seconds, **numbers}
    metrics.summarize(folder / "summary.json", summary)
    return summary
