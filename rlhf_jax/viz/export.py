"""The page and a trace as files: for any web host, and in UNIPO's JSON.

UNIPO (poloclub/unipo, docs/canonical_schema.json) shows one entry a model update. Here an entry is a pass over a
rollout that was recorded, with the rows that the trace shows.
"""

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.viz import trace
from rlhf_jax.viz.trace import Trace

DEMO = "demo"  # the trace in the package
MODEL_ONLY = ("playground.js", "playground.css")  # of the page: what needs a server


def static_folder() -> Path:
    """The folder of the page's files."""
    return Path(str(resources.files("rlhf_jax.viz") / "static"))


def demo_folder() -> Path:
    """The folder of the trace in the package, a run of the demo's own config."""
    return Path(str(resources.files("rlhf_jax.viz") / DEMO))


def static(source, out) -> Path:
    """Writes the page with the trace in `source` to a new or empty folder, for any web host: its index.html.

    Everything is in it but what needs a model. InputError where `source` has no trace, or `out` has files.
    """
    found, out = Trace(source), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"export: expected a new or an empty folder, got {out}")
    for name in found.names():
        found.read(name)  # a damaged file is an error here, not on the page
    shutil.copytree(static_folder(), out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*MODEL_ONLY))
    shutil.copytree(found.folder, out / trace.FOLDER)
    index = out / "index.html"
    index.write_text(index.read_text(encoding="utf-8").replace("<html ", "<html data-static ", 1), encoding="utf-8")
    return index


def unipo(source, out) -> Path:
    """Writes the recorded iterations of a run in UNIPO's documented schema to a new JSON file."""
    found, out = Trace(source), Path(out).expanduser()
    if out.exists():
        raise InputError(f"export: expected a new file, {out} exists")
    names = [name for name in found.names(kind="iter") if found.read(name).part("rollout")]
    if not names:
        raise InputError(f"{found.folder}: expected an iteration of reinforcement learning; {trace.HOW}")
    config, first = found.manifest["config"], found.read(names[0])
    section = first.more["config"]
    algorithm = found.manifest["stages"][first.stage]["algorithm"]
    hparams = {ours: section[ours] for ours in ("gamma", "kl_coef", "epochs", "minibatches", "temperature")}
    hparams |= {"learning_rate": section["lr"], "group_size": 1}
    hparams |= {"gae_lambda": section["lam"], "clip_eps": section["clip"]} if "clip" in section else {}
    header = {
        "task": config["task"],
        "dataset": config["data"].get("source", ""),
        "reward_strategy": config["reward"]["kind"],
        "algorithm": {"policy_gradient": "reinforce"}.get(algorithm, algorithm),
        "totalSteps": found.manifest["stages"][first.stage]["steps"],
        "model_name": config["model"]["init"] or "random weights",
        "reference_model_name": config["model"]["init"] or "the policy before reinforcement learning",
        "hparams": hparams,
    }
    entries: list[dict] = []
    for name in names:
        entries.extend(_entries(found.read(name), found.manifest, len(entries)))
    text = json.dumps({"header": header, "entries": entries}, allow_nan=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def _entries(file, manifest, first):
    """An entry for each pass over the rollout of an iteration."""
    rows, epochs = file["update.rows_B"], len(file["update.rows_B"])
    shown = file["look.rows_B"] if "look.rows_B" in file.arrays else np.arange(len(file["rollout.mask_BR"]))
    for epoch in range(epochs):
        order = rows[epoch].reshape(-1)
        place = np.argsort(order)  # the row of the rollout -> its place in the pass
        update = {
            key: file[f"update.{key}"][epoch].reshape(len(order), -1)
            for key in ("logp_BR", "policy_loss_BR")
            if f"update.{key}" in file.arrays
        }
        numbers = {key.split("/")[1]: value for key, value in file.numbers.items()}
        loss = float(file["minibatch.policy_loss"][epoch].mean())
        metrics = trace.plain(numbers | {"policy_loss": loss, "policy_objective": -loss, "reward": numbers["score"]})
        prompts = [_prompt(file, manifest, int(row), update, place, f"step{first + epoch}") for row in shown]
        yield {
            "step": first + epoch,
            "iteration": file.step,
            "is_first_step_after_rollout_phase": epoch == 0,
            "metrics": metrics,
            "prompts": prompts,
        }


def _prompt(file, manifest, row, update, place, step):
    """A prompt and its response, token by token."""
    mask = file["rollout.mask_BR"][row].astype(bool)
    ids = file["rollout.response_BR"][row][mask]
    prompt = file["rollout.prompt_BP"][row][file["rollout.prompt_mask_BP"][row].astype(bool)]

    def tokens(name):
        return [float(x) for x in file[name][row][mask]]

    names = {"old_log_probs": "logp_BR", "ref_log_probs": "logp_ref_BR", "values": "values_BR"}
    names |= {"advantages": "advantages_BR", "returns": "returns_BR", "rewards": "rewards_BR"}
    strings = [_text(file, manifest, int(i)) for i in ids]
    series = {"ids": [int(i) for i in ids], "strings": strings}
    series["log_probs"] = [float(x) for x in update["logp_BR"][place[row]][mask]]
    series |= {theirs: tokens(f"rollout.{ours}") for theirs, ours in names.items() if f"rollout.{ours}" in file.arrays}
    series["token_kl"] = [p - q for p, q in zip(series["old_log_probs"], series["ref_log_probs"], strict=True)]
    if "policy_loss_BR" in update:
        series["token_objective"] = [-float(x) for x in update["policy_loss_BR"][place[row]][mask]]
    response = {
        "id": f"{step}_sample{row}",
        "reward": float(file["rollout.score_B"][row]),
        "response_text": "".join(strings),
        "response_length": int(mask.sum()),
        "tokens": series,
    }
    return {"prompt": "".join(_text(file, manifest, int(i)) for i in prompt), "responses": [response]}


def _text(file, manifest, i):
    """The text of an id; what is no UTF-8 is U+FFFD, as the schema has texts alone."""
    if i in manifest["tokenizer"].get("eos_ids", [manifest["tokenizer"]["eos_id"]]):
        return "<|endoftext|>"
    return file.strings[i].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
