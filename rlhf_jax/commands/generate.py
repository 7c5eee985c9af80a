"""Completes prompts with a finished run, to a JSONL file that an interrupted command continues."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import fields, jsonfile, pretrained, provenance
from rlhf_jax.data import batches, files, sources
from rlhf_jax.errors import InputError
from rlhf_jax.pretrained import Sample
from rlhf_jax.report.console import Silent
from rlhf_jax.training.workdir import flat

COLUMNS = ("sample", "completion", "ended", "prompt_cut", "score", "ids", "logprobs")  # of a result


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are sampled, and what is written with them."""

    stage: str = ""  # whose policy; empty: the last finished one
    n: int = fields.number(1, least=1)  # completions of each prompt
    max_tokens: int = fields.number(0, least=0)  # EOS included; 0: as many as in the run
    temperature: float = fields.number(1.0, least=0, most=100)  # 0: the most likely token
    top_k: int = fields.number(0, least=0)  # 0: all
    top_p: float = fields.number(1.0, above=0, most=1)  # 1: all
    seed: int = fields.number(0, least=0, below=2**32, most=2**32)
    scores: bool = False  # of the run's reward model
    logprobs: bool = False  # ids and log-probs of the tokens
    batch: int = fields.number(32, least=1, neutral=True)  # completions between two writes


def rows_of(prompt: str | None, prompts: str | None) -> list[dict]:
    """The rows to complete: one prompt, or those of a JSONL, JSON, CSV or Parquet file with all their columns.

    In a file, a prompt is a text or a conversation (data/chats.py).
    """
    if (prompt is None) == (prompts is None):
        raise InputError("prompt: expected either --prompt=TEXT or --prompts=FILE")
    if prompts is None:
        return [{"prompt": prompt}]
    try:
        path = os.path.expanduser(prompts)
        cells = files.cells(path, ("prompt",), files.Also(sources.CHATS["prompts"]), extra=True)
        return list(files.rows(cells, path, convert=sources.converter("prompts", []), texts=("prompt",)))
    except InputError as error:
        raise InputError(f"prompts: {error}") from None


def generate(workdir, rows: list[dict], settings: Settings, *, out=None, reporter=None) -> list[dict]:
    """Completes each row's prompt `settings.n` times; with `out`, appends the results to that file as they come.

    A result is the row and {"sample": 0 to n - 1, "completion", "ended": by EOS, "prompt_cut"}; with scores {"score"};
    with logprobs {"ids", "logprobs"}. A prompt that is too long is cut as in training (data.cut), which may leave its
    row out. `out` is a new file, or that of the same command on the same rows and weights, which goes on after its last
    result. Returns the new results. Raises InputError, before anything is written.
    """
    fields.check(settings)
    reporter, n, out = reporter or Silent(), settings.n, os.path.expanduser(out) if out else None
    model = rlhf_jax.load(workdir, settings.stage)
    if settings.scores and model.reward is None:
        raise InputError("scores: expected a run whose reward model is finished, there is none")
    if taken := next((column for row in rows for column in COLUMNS if column in row), None):
        raise InputError(f"prompts: expected rows without a column {taken!r}, which is one of the results")
    prompts = prompts_of(config_of(workdir, model), model, rows, settings)
    done = _open(out, made_of(workdir, settings, rows)) if out else 0
    size = max(settings.batch // n, 1)  # prompts at a time
    results: list[dict] = []
    reporter.stage("generate", len(prompts) * n, done)
    for first in range(done // n // size * size, len(prompts), size):
        part = [prompt for prompt in prompts[first : first + size] for _ in range(n)]
        if first * n + len(part) <= done:  # the file is complete
            break
        samples = model.sample(
            [prompt.ids for prompt in part[::n]], n=n, first=first, max_tokens=settings.max_tokens or None,
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, seed=settings.seed,
        )  # fmt: skip
        pairs = list(zip(part, samples, strict=True))
        made = [_result(prompt, i % n, sample, settings) for i, (prompt, sample) in enumerate(pairs)]
        if settings.scores:
            whole = [prompt.ids + sample.ids for prompt, sample in pairs]
            made = [row | {"score": score} for row, score in zip(made, model.score_tokens(whole).tolist(), strict=True)]
        new = made[max(done - first * n, 0) :]
        if out:
            _append(out, new)
        results += new
        reporter.update(first * n + len(made), {})
    reporter.finish(f"written to {out}" if out else "")
    return results


def config_of(source, model: pretrained.Pretrained) -> configs.Config:
    """The config of a run; of a model that transformers or experiments/export_hf.py wrote, one that reads as much."""
    if pretrained.is_run(Path(source).expanduser()):
        return configs.read(source)
    lengths: dict = {"prompt_length": model.context, "response_length": model.max_tokens}  # `prompts_of` leaves room
    data = sources.Config(source="files", cut="left", **lengths)
    return configs.Config(task="prompts", data=data, model=model.config)


class Prompt(NamedTuple):
    row: dict
    ids: list[int]
    cut: bool


def prompts_of(config, model, rows, settings) -> list[Prompt]:
    """The prompts as the policy reads them; rows whose prompt does not fit are left out."""
    tokenizer, length = model.tokenizer, settings.max_tokens or model.max_tokens
    if length >= model.context:
        raise InputError(f"max_tokens: expected at most {model.context - 1}, the context is {model.context}")
    write = config.task == "write"
    start = [tokenizer.eos_id] if write else []  # EOS stands before every plain text
    room = max(model.context - length - len(start), 1)
    limit, cut = (room, "left") if write else (min(config.data.prompt_length, room), config.data.cut)
    arrays, _ = batches.encode_prompts(rows, tokenizer, prompt_length=limit, cut=cut, source="prompts")
    whole = [len(ids or ()) for ids in batches.prompt_ids(rows, tokenizer, "prompts")]
    return [
        Prompt(rows[i], start + ids[mask].tolist() or [tokenizer.eos_id], whole[i] > limit)
        for i, ids, mask in zip(arrays["index_N"], arrays["prompt_NP"], arrays["prompt_mask_NP"], strict=True)
    ]


def _result(prompt: Prompt, j: int, sample: Sample, settings: Settings) -> dict:
    result = prompt.row | {"sample": j, "completion": sample.text, "ended": sample.ended, "prompt_cut": prompt.cut}
    if settings.logprobs:
        result |= {"ids": sample.ids, "logprobs": [round(logp, 6) for logp in sample.logp_R.tolist()]}
    return result


def made_of(workdir, settings, rows) -> dict:
    """What results depend on: settings, rows and weights."""
    folder = Path(workdir).expanduser()
    if pretrained.is_run(folder):
        config = configs.read(folder)
        names = configs.stages(config)
        summaries = [configs.place(config, folder, name) / name / "summary.json" for name in names]
        weights = _sha256(b"".join(path.read_bytes() for path in summaries if path.exists()))
    else:
        weights = provenance.digest(folder) or str(workdir)
    return {
        "settings": fields.significant(settings),
        "rows": _sha256(json.dumps(rows, sort_keys=True, default=str).encode()),
        "run": weights,
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _open(out, made_of: dict) -> int:
    """The number of results in the file, which is made if it is not there. What it was made of stands beside it."""
    path, beside = Path(out), Path(f"{out}.made_of.json")
    try:
        if not path.exists() or not path.stat().st_size:
            beside.write_text(json.dumps(made_of))
            path.touch()
            return 0
        if not beside.exists():
            raise InputError(f"out: {out}: expected a new file, or one that this command has begun")
        there, here = flat(jsonfile.read(beside)), flat(json.loads(json.dumps(made_of)))
        for name in sorted(here.keys() | there.keys()):
            if there.get(name) != here.get(name):
                what = {"rows": "other prompts", "run": "other weights"}.get(name, f"{name} = {there.get(name)!r}")
                raise InputError(f"out: {out} was begun with {what}; choose another file")
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the command was killed while it wrote
            os.truncate(path, len(whole))
        return whole.count(b"\n")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"out: {out}: {getattr(error, 'strerror', None) or error}") from None


def _append(out, results: list[dict]) -> None:
    with open(out, "ab") as file:
        file.write("".join(json.dumps(row, default=str) + "\n" for row in results).encode())
        file.flush()
        os.fsync(file.fileno())
