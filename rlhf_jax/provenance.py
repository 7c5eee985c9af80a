"""What the numbers of a stage depend on: fields of the config, and the contents of the files that it names."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

from rlhf_jax import config as configs
from rlhf_jax import fields, tasks
from rlhf_jax.data import sources
from rlhf_jax.rewards import function
from rlhf_jax.training.workdir import flat

LANGUAGE_MODELS = ("pretrain", "sft")  # the stages before any pair is read


def depends(config, stage) -> dict:
    """The record in a stage's config.json: sections of the config without neutral fields, and sha256 of files.

    A workdir whose record differs is refused (training/workdir.py: check).
    """
    everything = fields.significant(config)
    record = {part: everything[part] for part in configs.sections(config, stage)}
    if config.model.dropout:  # each slice has its own dropout noise
        for name in (name for name in ("pretrain", "sft") if name in record):
            record[name] |= {"microbatches": getattr(config, name).microbatches}
    if "reward" not in record and (stage == configs.rl_name(config) or config.task == "write"):
        record["reward"] = {"kind": config.reward.kind}
    files = fingerprints(config)
    if "reward" in record and config.named and (digest := function.fingerprint(config.reward.kind)):
        files[f"reward = {config.reward.kind}"] = digest
    if stage in LANGUAGE_MODELS:  # so that runs with other pairs share them
        record["data"] = {name: value for name, value in record["data"].items() if name not in sources.PAIRS}
        files = {name: digest for name, digest in files.items() if not name.startswith("data.preferences ")}
    return record | {"section": configs.section(config, stage), "sha256": files}


def defaults(config) -> dict:
    """{"ppo.lr": 1e-5, ...}: the default of every field of the sections of a config."""
    kinds: dict[str, Any] = {
        name: type(section) for name, section in vars(config).items() if dataclasses.is_dataclass(section)
    }
    return flat({name: fields.significant(kind()) for name, kind in kinds.items()})


def fingerprints(config) -> dict[str, str]:
    """{"data.sft = rows.jsonl": sha256} of the local files that a run reads: data, tokenizer and weights."""
    places = tasks.load(config).files() | {"model.init": config.model.init}
    places |= {"text.path": config.text.path, "text.template": config.text.template}
    digests = {f"{field} = {place}": digest(Path(place)) for field, place in places.items() if place}
    return {name: digest for name, digest in digests.items() if digest}


def digest(path):
    """sha256 (hex) of a file, or of the files of a folder; None where there is neither."""
    if not path.is_file() and not path.is_dir():
        return None
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return _digest_of(tuple((file, stat.st_mtime_ns, stat.st_size) for file, stat in zip(files, stats, strict=True)))


@functools.cache  # files of weights have gigabytes
def _digest_of(files):
    digest = hashlib.sha256()
    for file, *_ in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
