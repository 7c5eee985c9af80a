"""Recomputes a trace from its own arrays, in NumPy float64 and without the trainer's code.

    python -m rlhf_jax.viz verify runs/demo

A claim says what an array of a file must be. One line an identity gives the largest error of all its claims; the first
claim that does not hold names file, array, index and both values.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.viz.trace import File, Trace

CLOSE = 1e-5  # of one formula on recorded numbers, relative to the largest number or 1
SCORED = 1e-4  # between two programs that score the same tokens
COARSE = 0.1  # the same in half precision

# In the order of the chain; formulas as the page shows them.
IDENTITIES = {
    "prompt": "left-padded; PAD where its mask is 0",
    "response": "mask 1 up to the last token, EOS or not; PAD after it",
    "target": "output at position t scores token t + 1; the first at the prompt's last token",
    "masked": "0 outside the response",
    "logprob": "log p = logit - logsumexp",
    "likeliest": "sorted; probabilities sum to at most 1; the chosen token has its own log p",
    "range": "log p <= 0, entropy >= 0, exact KL >= 0",
    "kl": "KL = log p - log p_ref; k2 = KL^2 / 2; k3 = exp(-KL) - 1 + KL; logged sums",
    "score": "score after the rule for a missing EOS; total = score - beta sum KL",
    "rewards": "r_t = -beta KL_t + [t is last] score",
    "gae": "delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lambda A_(t+1)",
    "returns": "return = advantage + value, or reward-to-go",
    "baseline": "advantage = return - baseline",
    "group": "advantage = (return - baseline) / scale, of the completions of one prompt",
    "whitening": "(A - mean) / sqrt(var + 1e-8) over the batch",
    "permutation": "each epoch uses each row once",
    "ratio": "ratio = exp(new log p - old log p)",
    "first ratio": "ratio = 1 in the first minibatch",
    "policy loss": "max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps'))",
    "pair loss": "DPO's loss of h = (log p - log p_ref) of the better completion minus that of the worse",
    "KL loss": "k2, k3 or the exact KL of the new policy, >= 0",
    "value loss": "max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)",
    "minibatch": "masked means are the minibatch's scalars",
    "clip fraction": "recounted",
    "approx KL": "mean of ratio - 1 - log ratio",
    "logged": "logged scalars are means over the minibatches",
    "cross-entropy": "loss = mean of -log p over the tokens that count",
    "preference": "loss = mean of -log sigmoid(chosen - rejected)",
    "evaluation": "logged numbers are means over the held-out rows",
    "gain": "gain = mean after - mean before",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """`actual`, an array of a file, must be `expected`."""

    identity: str
    array: str
    actual: Any
    expected: Any
    tolerance: float = CLOSE  # times the largest expected number, or 1


@dataclasses.dataclass
class Result:
    """What was found about one identity."""

    identity: str
    claims: int = 0
    numbers: int = 0
    error: float = 0.0  # the largest
    breach: str = ""  # the first: file, array, index and both values


def verify(folder) -> list[Result]:
    """Checks every file of the trace in a folder or workdir: a Result for each identity that has a claim.

    Raises InputError where there is no trace, or a damaged one.
    """
    trace = Trace(folder)
    if not trace.names():
        raise InputError(f"{trace.folder}: expected at least one file in the trace")
    return prove(map(trace.read, trace.names()), trace.manifest)


def prove(files: Iterable[File], manifest: dict) -> list[Result]:
    """A Result for each identity that has a claim in these files, in the order of IDENTITIES."""
    results: dict[str, Result] = {}
    for file in files:
        for claim in claims(file, manifest):
            _check(file, claim, results.setdefault(claim.identity, Result(claim.identity)))
    return [results[name] for name in IDENTITIES if name in results]


def _check(file, claim, result):
    actual, expected = (np.atleast_1d(np.asarray(x, np.float64)) for x in (claim.actual, claim.expected))
    result.claims += 1
    if actual.shape != expected.shape:
        shapes = f"expected the shape {list(expected.shape)}, got {list(actual.shape)}"
        result.breach = result.breach or f"{file.name}: {claim.array}: {claim.identity}: {shapes}"
        return
    if not actual.size:
        return
    error = np.abs(actual - expected)
    error[np.isnan(error)] = np.inf
    finite = np.abs(expected[np.isfinite(expected)])
    limit = claim.tolerance * max(1.0, finite.max() if finite.size else 1.0)
    result.numbers += actual.size
    result.error = max(result.error, float(error.max()))
    if not result.breach and error.max() > limit:
        index = np.unravel_index(int(error.argmax()), error.shape)
        where = f"[{', '.join(map(str, index))}]" if np.ndim(claim.actual) else ""
        values = f"recorded {actual[index]:.9g}, recomputed {expected[index]:.9g}"
        result.breach = f"{file.name}: {claim.array}{where}: {claim.identity}: {values}"


def claims(file: File, manifest: dict) -> Iterator[Claim]:
    """What must hold in a file."""
    algorithm = manifest["stages"][file.stage]["algorithm"]
    if file.kind == "iter" and algorithm == "supervised":
        yield from _supervised(file)
    elif file.kind == "iter" and algorithm == "preference":
        yield from _preference(file)
    elif file.kind == "iter" and algorithm == "dpo":
        yield from _dpo(file)
    elif file.kind == "iter":
        yield from _rollout(file, manifest)
        yield from _logits(file, manifest)
        yield from _estimates(file, algorithm)
        yield from _update(file, algorithm, manifest)
    elif file.kind == "eval":
        yield from _evaluation(file, algorithm, manifest)
    else:
        yield from _gains(file)


# A rollout


def _rollout(file, manifest):
    ids, pad, eos = (manifest["tokenizer"][name] for name in ("vocab_size", "pad_id", "eos_id"))
    ends = manifest["tokenizer"].get("eos_ids", [eos])
    prompt, prompt_mask = file["rollout.prompt_BP"], file["rollout.prompt_mask_BP"]
    P = prompt.shape[1]
    start = P - prompt_mask.sum(axis=1)
    yield Claim("prompt", "rollout.prompt_mask_BP", prompt_mask, np.arange(P) >= start[:, None])
    yield Claim("prompt", "rollout.prompt_BP", prompt[prompt_mask == 0], np.full((prompt_mask == 0).sum(), pad))
    response, mask, length = file["rollout.response_BR"], _mask(file), _mask(file).sum(axis=1)
    B, R = mask.shape
    yield Claim("response", "rollout.mask_BR", mask, np.arange(R) < length[:, None])
    yield Claim("response", "rollout.response_BR", response[~mask], np.full((~mask).sum(), pad))
    yield Claim("response", "rollout.response_BR", (response < ids) & (response >= 0), np.ones((B, R)))
    last = response[np.arange(B), np.maximum(length - 1, 0)]
    yield Claim("response", "rollout.eos_B", file["rollout.eos_B"], np.isin(last, ends))
    is_eos = np.isin(response, ends) & mask
    yield Claim("response", "rollout.response_BR", is_eos.sum(axis=1), file["rollout.eos_B"])
    for name, array in file.part("rollout").items():
        if name.endswith("_BR") and name not in ("response_BR", "mask_BR"):
            yield Claim("masked", f"rollout.{name}", array[~mask], np.zeros((~mask).sum()), 0.0)
    logp, reference = _f(file, "rollout.logp_BR"), _f(file, "rollout.logp_ref_BR")
    for name, array in (("logp_BR", logp), ("logp_ref_BR", reference)):
        yield Claim("range", f"rollout.{name}", np.maximum(array, 0), np.zeros_like(array))
    for name in ("kl_exact_BR", "entropy_BR"):
        array = _f(file, f"rollout.{name}")
        yield Claim("range", f"rollout.{name}", np.minimum(array, 0), np.zeros_like(array), 0.0)
    kl = np.where(mask, logp - reference, 0)
    sums = {"kl": kl, "kl_k2": kl**2 / 2, "kl_k3": np.where(mask, np.exp(-kl) - 1 + kl, 0)}
    sums["kl_exact"] = _f(file, "rollout.kl_exact_BR")
    for name, array in sums.items():
        yield _logged(file, "kl", name, array.sum(axis=1).mean())
    yield _logged(file, "kl", "entropy", _f(file, "rollout.entropy_BR").sum() / max(mask.sum(), 1))
    yield _logged(file, "response", "length", length.mean())
    yield _logged(file, "response", "eos_rate", file["rollout.eos_B"].mean())
    components = file.part("components")
    if components:
        total = sum(array.astype(np.float64) for array in components.values())
        yield Claim("score", "rollout.score_B", file["rollout.score_B"], total)
    final = _final(file)
    yield _logged(file, "score", "score_final", final.mean())
    penalized = {"reward": "kl", "off": None}.get(kind := _kl(file), f"kl_{kind}")
    total = final - _beta(file) * sums[penalized].sum(axis=1) if penalized else final
    yield _logged(file, "score", "score_total", total.mean())


def _logits(file, manifest):
    """The rows whose logits were recorded by a scoring pass of its own."""
    rows, mask = file["look.rows_B"], _mask(file)
    P, R = file["rollout.prompt_BP"].shape[1], mask.shape[1]
    yield Claim("target", "look.position_R", file["look.position_R"], P - 1 + np.arange(R))
    shown, response = mask[rows], file["rollout.response_BR"][rows]
    tolerance = COARSE if manifest["config"]["model"]["dtype"] != "float32" else SCORED
    for name, recorded in (("policy", "logp_BR"), ("reference", "logp_ref_BR")):
        logp = _f(file, f"look.{name}_logit_BR") - _f(file, f"look.{name}_logsumexp_BR")
        recorded = f"rollout.{recorded}"
        yield Claim("logprob", recorded, _f(file, recorded)[rows][shown], logp[shown], tolerance)
        top, ids = _f(file, f"look.{name}_top_logp_BR"), file[f"look.{name}_top_ids_BR"]
        array = f"look.{name}_top_logp_BR"
        yield Claim("likeliest", array, top, -np.sort(-top, axis=-1), 0.0)
        excess = np.maximum(np.exp(top).sum(axis=-1) - 1, 0)
        yield Claim("likeliest", array, excess, np.zeros_like(excess))
        chosen = (ids == response[..., None]) & shown[..., None]
        yield Claim("likeliest", array, top[chosen], np.broadcast_to(logp[..., None], top.shape)[chosen])


def _estimates(file, algorithm):
    """Rewards, advantages and returns."""
    config, mask, final = file.more["config"], _mask(file), _final(file)
    beta = _beta(file) if _kl(file) == "reward" else 0.0
    kl = np.where(mask, _f(file, "rollout.logp_BR") - _f(file, "rollout.logp_ref_BR"), 0)
    returns, advantages = _f(file, "rollout.returns_BR"), _f(file, "rollout.advantages_BR")
    raw = _f(file, "rollout.raw_advantages_BR")
    if "rollout.rewards_BR" in file.arrays:
        rewards = -beta * kl
        last = mask.sum(axis=1) - 1
        rewards[np.arange(len(mask))[last >= 0], last[last >= 0]] += final[last >= 0]
        if config.get("whiten_rewards"):
            rewards = np.where(mask, _whiten(rewards, mask) + _mean(rewards, mask), 0)
        yield Claim("rewards", "rollout.rewards_BR", file["rollout.rewards_BR"], rewards)
        rewards = _f(file, "rollout.rewards_BR")
    if algorithm == "ppo":
        values = _f(file, "rollout.values_BR")
        yield Claim("gae", "rollout.raw_advantages_BR", raw, _gae(rewards, values, mask, config))
        yield Claim("returns", "rollout.returns_BR", returns, np.where(mask, raw + values, 0))
    elif "scale" in config:
        totals = final - beta * kl.sum(axis=1)
        yield Claim("returns", "rollout.returns_BR", returns, np.where(mask, totals[:, None], 0))
        expected = _group(totals.reshape(-1, config["group"]), config["baseline"], config["scale"]).reshape(-1, 1)
        yield Claim("group", "rollout.raw_advantages_BR", raw, np.where(mask, expected, 0))
        equal = np.ptp(final.reshape(-1, config["group"]), axis=1) == 0
        yield _logged(file, "group", "groups_equal", equal.mean())
    elif algorithm in ("online_dpo", "best_of_n"):
        yield Claim("returns", "rollout.returns_BR", returns, np.where(mask, final[:, None], 0))
        expected = _better(final) if algorithm == "online_dpo" else _kept(file, mask, final, config)
        yield Claim("group", "rollout.raw_advantages_BR", raw, np.where(mask, expected[:, None], 0))
    elif algorithm in ("policy_gradient", "reinforce_pp"):
        if config["reward_to_go"]:
            expected = _gae(rewards, np.zeros_like(rewards), mask, config | {"lam": 1.0})
            total = final - beta * kl.sum(axis=1)
        else:
            expected = np.where(mask, final[:, None] - beta * kl, 0)
            total = expected.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
        yield Claim("returns", "rollout.returns_BR", returns, expected)
        others = (total.sum() - total) / max(len(total) - 1, 1)
        baseline = {"none": 0 * total, "mean": 0 * total + total.mean(), "leave_one_out": others}[config["baseline"]]
        yield Claim("baseline", "rollout.raw_advantages_BR", raw, np.where(mask, returns - baseline[:, None], 0))
    whitens = config["whiten_advantages"] and algorithm not in ("online_dpo", "best_of_n")  # which have no scale
    expected = _whiten(raw, mask) if whitens else raw
    yield Claim("whitening", "rollout.advantages_BR", advantages, expected, 1e-4)


def _update(file, algorithm, manifest):
    """Every epoch and minibatch, as the loss saw it: arrays [epochs, minibatches, rows, R]."""
    config, rows = file.more["config"], file["update.rows_B"]
    epochs = rows.shape[0]
    order = np.broadcast_to(np.arange(rows[0].size), (epochs, rows[0].size))
    yield Claim("permutation", "update.rows_B", np.sort(rows.reshape(epochs, -1), axis=1), order)
    mask = _mask(file)[rows]
    advantages, old = _f(file, "rollout.advantages_BR")[rows], _f(file, "rollout.logp_BR")[rows]
    logp = np.where(mask, _f(file, "update.logp_BR"), 0)
    ratio = np.where(mask, np.exp(logp - old), 1)
    yield Claim("ratio", "update.ratio_BR", file["update.ratio_BR"], ratio)
    tolerance = COARSE if manifest["config"]["model"]["dtype"] != "float32" else SCORED
    yield Claim("first ratio", "update.ratio_BR", file["update.ratio_BR"][0, 0], np.ones(ratio[0, 0].shape), tolerance)
    ratio = _f(file, "update.ratio_BR")

    def mean(array):
        return np.where(mask, array, 0).sum(axis=(2, 3)) / np.maximum(mask.sum(axis=(2, 3)), 1)

    weight = _row_weights(mask, config.get("reduction", "token"))[..., None]
    means = {"ratio": mean(ratio), "ratio_square": mean(ratio**2)}
    if "update.policy_loss_BR" in file.arrays:
        high = config.get("clip_high") or config["clip"]
        loss, clipped = _clipped(file, "update.ratio_BR", advantages, config["clip"], high)
        yield Claim("policy loss", "update.policy_loss_BR", file["update.policy_loss_BR"], loss)
        yield Claim("clip fraction", "minibatch.clip_fraction", file["minibatch.clip_fraction"], mean(clipped))
        means["policy_loss"] = mean(weight * _f(file, "update.policy_loss_BR"))
    elif algorithm == "online_dpo":
        pair = np.where(mask, _f(file, "update.pair_loss_BR"), 0)
        expected = _pair_losses(logp, _f(file, "rollout.logp_ref_BR")[rows], mask, advantages, config)
        yield Claim("pair loss", "update.pair_loss_BR", pair, np.where(mask, expected, 0))
        means["policy_loss"] = mean(weight * pair)
    elif algorithm in ("policy_gradient", "best_of_n"):
        weighted = config["epochs"] > 1 and config.get("importance", False)
        means["policy_loss"] = mean(weight * -advantages * (ratio if weighted else logp))
    if algorithm == "ppo":
        values, returns = _f(file, "update.values_BR"), _f(file, "rollout.returns_BR")[rows]
        before = _f(file, "rollout.values_BR")[rows]
        near = np.clip(values, before - config["value_clip"], before + config["value_clip"])
        square = np.maximum((values - returns) ** 2, (near - returns) ** 2)
        recorded = np.where(mask, file["update.value_square_BR"], 0)
        yield Claim("value loss", "update.value_square_BR", recorded, np.where(mask, square, 0))
        means["value_loss"] = mean(recorded) / 2
    for name in ("kl_loss", "entropy_bonus"):
        if f"update.{name}_BR" not in file.arrays:
            continue
        term = np.where(mask, _f(file, f"update.{name}_BR"), 0)
        yield Claim("range", f"update.{name}_BR", np.minimum(term, 0), np.zeros_like(term), 0.0)
        means[name] = mean(weight * term)
        if name == "kl_loss" and (estimate := {"k2": _k2, "k3": _k3}.get(_kl(file))):
            k1 = np.where(mask, logp - _f(file, "rollout.logp_ref_BR")[rows], 0)
            yield Claim("KL loss", f"update.{name}_BR", term, estimate(k1))
    for name, array in means.items():
        yield Claim("minibatch", f"minibatch.{name}", file[f"minibatch.{name}"], array)
    approximate = mean(ratio - 1 - np.where(mask, logp - old, 0))
    yield Claim("approx KL", "minibatch.approx_kl", file["minibatch.approx_kl"], approximate)
    for name, array in file.part("minibatch").items():
        if f"{file.stage}/{name}" in file.numbers:
            yield _logged(file, "logged", name, array.astype(np.float64).mean())


def _clipped(file, name, advantages, low, high):
    """(loss, whether the clipped term is the larger) of each token, compared in float32 as the trainer did."""
    ratio, advantages = file[name].astype(np.float32), advantages.astype(np.float32)
    near = np.clip(ratio, np.float32(1 - low), np.float32(1 + high))
    plain, clipped = -advantages * ratio, -advantages * near
    return np.maximum(plain, clipped), clipped > plain


# The other stages


def _supervised(file):
    logp, mask = _f(file, "update.logp_BT"), file["update.mask_BT"].astype(bool)
    mean = -np.where(mask, logp, 0).sum() / max(mask.sum(), 1)
    yield _logged(file, "cross-entropy", "loss", mean)
    yield Claim("range", "update.logp_BT", np.maximum(logp[mask], 0), np.zeros(mask.sum()))
    counted = file["batch.response_mask_BR"].sum()
    if file.more["config"]["loss_on"] == "all":
        counted += file["batch.prompt_mask_BP"].sum() - len(mask)  # nothing stands before a row's first token
    yield Claim("cross-entropy", "update.mask_BT", mask.sum(), counted)


def _preference(file):
    margin = _f(file, "update.chosen_B") - _f(file, "update.rejected_B")
    yield _logged(file, "preference", "loss", np.logaddexp(0, -margin).mean())
    yield _logged(file, "preference", "accuracy", ((margin > 0) + 0.5 * (margin == 0)).mean())
    yield _logged(file, "preference", "margin", margin.mean())


def _dpo(file):
    config, chosen, rejected = file.more["config"], _f(file, "update.chosen_B"), _f(file, "update.rejected_B")
    h = chosen - _f(file, "batch.chosen_ref_B") - rejected + _f(file, "batch.rejected_ref_B")
    yield _logged(file, "pair loss", "dpo_loss", _pair_loss(h, config).mean())
    yield _logged(file, "pair loss", "margin", config["beta"] * h.mean())
    yield _logged(file, "pair loss", "accuracy", ((h > 0) + 0.5 * (h == 0)).mean())
    yield _logged(file, "pair loss", "chosen_logp", chosen.mean())
    length = (_f(file, f"batch.{side}_mask_BR").sum(axis=1) for side in ("chosen", "rejected"))
    yield _logged(file, "pair loss", "length_difference", np.subtract(*length).mean())


def _evaluation(file, algorithm, manifest):
    tolerance = COARSE if manifest["config"]["model"]["dtype"] != "float32" else SCORED
    if algorithm == "supervised":
        nats, tokens = _f(file, "held_out.nats_N"), _f(file, "held_out.tokens_N")
        yield _logged(file, "cross-entropy", "eval_loss", nats.sum() / tokens.sum())
        logp, mask = _f(file, "shown.logp_NT"), file["shown.mask_NT"].astype(bool)
        shown = -np.where(mask, logp, 0).sum(axis=1)
        yield Claim("cross-entropy", "held_out.nats_N", nats[: len(shown)], shown)
        return
    if algorithm == "dpo":
        margin = _f(file, "pairs.chosen_N") - _f(file, "pairs.rejected_N")
        yield _logged(file, "preference", "eval_margin", margin.mean())
        yield _logged(file, "preference", "eval_accuracy", ((margin > 0) + 0.5 * (margin == 0)).mean())
        return
    if algorithm == "preference":
        margin = _f(file, "pairs.chosen_N") - _f(file, "pairs.rejected_N")
        yield _logged(file, "preference", "eval_loss", np.logaddexp(0, -margin).mean())
        yield _logged(file, "preference", "eval_accuracy", ((margin > 0) + 0.5 * (margin == 0)).mean())
        return
    for name, array in file.part("rows").items():
        if (logged := f"eval_{name.removesuffix('_N')}") and f"{file.stage}/{logged}" in file.numbers:
            yield _logged(file, "evaluation", logged, array.astype(np.float64).mean())
    mask = file["probes.mask_NR"].astype(bool)
    if manifest["config"]["evaluation"]["temperature"] == file.more["config"]["temperature"]:
        kl = np.where(mask, _f(file, "probes.logp_NR") - _f(file, "probes.logp_ref_NR"), 0).sum(axis=1)
        yield Claim("kl", "rows.kl_N", file["rows.kl_N"][: len(kl)], kl, SCORED)
    yield Claim("evaluation", "rows.length_N", file["rows.length_N"][: len(mask)], mask.sum(axis=1))
    if "crossed.logp_NR" in file.arrays:
        logp, mask = _f(file, "crossed.logp_NR"), file["crossed.mask_NR"].astype(bool)
        yield Claim("masked", "crossed.logp_NR", logp[~mask], np.zeros((~mask).sum()), 0.0)
        yield Claim("range", "crossed.logp_NR", np.maximum(logp, 0), np.zeros_like(logp))
        if not file.step:  # the first policy scores its own completions
            yield Claim("kl", "crossed.logp_NR", logp, _f(file, "crossed.logp_ref_NR"), tolerance)


def _gains(file):
    """Samples are {"prompt", "sft": {"score", ...}, ALGORITHM: {"score", ...}}, or {"score_sft", "score_rl", ...}."""
    if not file.samples:
        return
    first, summary = file.samples[0], file.more["summary"]
    nested = [name for name, value in first.items() if isinstance(value, dict)]
    for name in ("score", "gold", "reward"):
        if f"{file.stage}/{name}_gain" not in summary:
            continue
        if len(nested) == 2 and name in first[nested[0]]:
            pairs = [(row[nested[0]][name], row[nested[1]][name]) for row in file.samples]
        elif f"{name}_sft" in first:
            pairs = [(row[f"{name}_sft"], row[f"{name}_rl"]) for row in file.samples]
        else:
            continue
        before, after = np.array(pairs, np.float64).T
        yield Claim("gain", f"summary {name}_gain", summary[f"{file.stage}/{name}_gain"], (after - before).mean())


# Formulas


def _f(file, name):
    return file[name].astype(np.float64)


def _mask(file):
    return file["rollout.mask_BR"].astype(bool)


def _beta(file):
    return file.numbers[f"{file.stage}/kl_coef"]


def _logged(file, identity, name, expected):
    return Claim(identity, f"numbers {file.stage}/{name}", file.numbers[f"{file.stage}/{name}"], expected)


def _final(file):
    """The score after the rule for a response without EOS."""
    config, score, eos = file.more["config"], _f(file, "rollout.score_B"), file["rollout.eos_B"].astype(bool)
    penalty = config["missing_eos_penalty"]
    punished = np.full_like(score, -penalty) if config["missing_eos"] == "replace" else score - penalty
    return np.where(eos, score, punished)


def _kl(file):
    """Where the KL is penalized; a trace of an older version has it in the reward."""
    return file.more["config"].get("kl", "reward")


def _k2(k1):
    return k1**2 / 2


def _k3(k1):
    return np.expm1(-k1) + k1


def _group(totals, baseline, scale):
    """Advantages [prompts, completions]; 0 where all scores of the prompt are equal, except without a baseline."""
    count = totals.shape[1]
    mean = totals.mean(axis=1, keepdims=True)
    others = (totals.sum(axis=1, keepdims=True) - totals) / max(count - 1, 1)
    advantages = totals - {"none": 0, "mean": mean, "leave_one_out": others, "batch_mean": totals.mean()}[baseline]
    if scale == "none":
        return advantages
    std = totals.std(axis=1, ddof=1, keepdims=True) if scale == "group_std" else totals.std(ddof=1)
    equal = np.ptp(totals, axis=1, keepdims=True) == 0 if scale == "group_std" else np.ptp(totals) == 0
    return advantages / np.where(equal, 1, std)


def _better(final):
    """1 for the better completion of each pair, -1 for the worse, 0 for equal ones."""
    pairs = final.reshape(-1, 2)
    return np.sign(pairs - pairs[:, ::-1]).reshape(-1)


def _kept(file, mask, final, config):
    """The weights of the kept completion of each group, by `ended`: their mean over the tokens is 1."""
    group = config["group"]
    able = file["rollout.eos_B"].reshape(-1, group).astype(bool) | (not config.get("ended", True))
    best = np.arange(group) == np.where(able, final.reshape(-1, group), -np.inf).argmax(axis=1)[:, None]
    kept = (best & able).reshape(-1)
    return kept * mask.sum() / max(mask[kept].sum(), 1)


def _pair_loss(h, config):
    """The loss that DPO has for a difference h of log-ratios, in nats."""
    beta, smoothing = config["beta"], config["smoothing"]
    if config["loss"] in ("ipo", "hinge"):
        return (h - 1 / (2 * beta)) ** 2 if config["loss"] == "ipo" else np.maximum(1 - beta * h, 0)
    right, swapped = np.logaddexp(0, -beta * h), np.logaddexp(0, beta * h)
    if config["loss"] == "robust":
        return ((1 - smoothing) * right - smoothing * swapped) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * swapped


def _pair_losses(logp, reference, mask, advantages, config):
    """The loss of its pair at each token; 0 where the completions are equal. Arrays [..., rows, R]."""
    gain = np.where(mask, logp - reference, 0).sum(axis=-1)
    if config.get("total") == "mean" or (config.get("total") == "auto" and config["loss"] == "ipo"):
        gain = gain / np.maximum(mask.sum(axis=-1), 1)
    sign = advantages[..., 0]
    h = (gain * sign).reshape(*gain.shape[:-1], -1, 2).sum(axis=-1)
    loss = np.where(sign[..., ::2] == 0, 0, _pair_loss(h, config))
    return np.repeat(loss, 2, axis=-1)[..., None] * np.ones(mask.shape)


def _row_weights(mask, reduction):
    """Weights [..., rows] that make a mean over tokens that of the reduction; mask [..., rows, R]."""
    tokens = mask.sum(axis=-1)
    share = tokens.mean(axis=-1, keepdims=True)
    if reduction == "sequence":
        return share / np.maximum(tokens, 1)
    return np.ones(tokens.shape) if reduction == "token" else share / mask.shape[-1] + 0 * tokens


def _gae(rewards, values, mask, config):
    """Backwards over the response tokens; what is masked is skipped."""
    advantages, later, next_value = np.zeros_like(rewards), np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + config["gamma"] * next_value - values[:, t]
        later = np.where(mask[:, t], delta + config["gamma"] * config["lam"] * later, later)
        next_value = np.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = np.where(mask[:, t], later, 0)
    return advantages


def _mean(array, mask):
    return array[mask].mean() if mask.any() else 0.0


def _whiten(array, mask):
    centre = _mean(array, mask)
    return np.where(mask, (array - centre) / np.sqrt(_mean((array - centre) ** 2, mask) + 1e-8), 0)
