"""Writes the trace of a run while it trains: arrays that the compiled updates hand out, never a second computation.

The one exception is `rollout.look`, a scoring pass of some rows that records logits and the likeliest tokens.
"""

import dataclasses
from pathlib import Path

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import hosts
from rlhf_jax.report import metrics
from rlhf_jax.training import sharding
from rlhf_jax.training.loop import due
from rlhf_jax.viz import trace

RULE = (
    "Every row of the batch is recorded. Logits and likeliest tokens are recorded for the rows in look.rows_B: the "
    "first rows of the batch, whose prompts are random, then the best and the worst by score of the other rows."
)
IDS = ("prompt_", "response_", "chosen_", "rejected_")  # names of arrays of ids begin so; those of masks go on


class Recorder:
    """The trace of one run in WORKDIR/trace; training/fit.py calls it. A resumed run writes the same files again."""

    def __init__(self, workdir, config, tokenizer):
        self._folder = Path(workdir / trace.FOLDER)
        self._workdir, self._config, self._tokenizer = workdir, config, tokenizer
        self._manifest()  # one that cannot be used is an error now, not after the first steps

    def due(self, stage, step) -> bool:
        """Whether a step, from 1, is recorded: the first, the last, and each that is due in between."""
        every = self._config.trace.every if stage.name == configs.rl_name(self._config) else stage.config.eval_every
        return step in (1, stage.config.steps) or due(every, step)

    def step(self, stage, step, record, numbers) -> None:
        """Writes the arrays of a training step, {part: {name: array}}, and its logged numbers."""
        more = {"rule": RULE} if "look" in record else {}
        self._write(stage, "iter", step, record, numbers, more)

    def evaluation(self, stage, step, evaluation) -> None:
        """Writes the arrays and texts of an evaluation of the state after `step` steps."""
        record = dict(evaluation.record or {})
        samples = record.pop("samples", [])
        numbers = {f"{stage.name}/eval_{name}": value for name, value in evaluation.numbers.items()}
        self._write(stage, "eval", step, record, numbers, {}, list(samples))

    def finish(self, stage, numbers, samples) -> None:
        """Writes the numbers of a finished stage's summary, its curves and all its samples."""
        rows = metrics.read(self._workdir / stage.name / "metrics.jsonl")
        names = sorted({name for row in rows for name in row} - {"time"})
        curves = {"curves": {name: [row.get(name) for row in rows] for name in names}}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, int | float | list | tuple)}
        self._write(stage, "end", stage.config.steps, {}, {}, {"summary": numbers} | curves, list(samples))

    def _write(self, stage, kind, step, record, numbers, more, samples=()):
        record = sharding.gather(record)
        if not hosts.first():
            return
        arrays = {f"{part}.{name}": array for part, arrays in record.items() for name, array in arrays.items()}
        numbers = {name: float(value) for name, value in numbers.items()}
        name = f"{stage.name}_{kind}{f'_{step:06}' if kind != 'end' else ''}.json.gz"
        more = {"config": dataclasses.asdict(stage.config)} | more
        strings = self._strings(arrays)
        file = trace.File(name, stage.name, kind, step, numbers, arrays, strings, list(samples), trace.plain(more))
        data = trace.encode(file)
        manifest = self._manifest()
        manifest["files"][name] = trace.about(file, data)
        manifest["stages"].setdefault(stage.name, {"algorithm": self._algorithm(stage), "steps": stage.config.steps})
        if kind == "end":
            manifest["stages"][stage.name]["summary"] = trace.plain(more["summary"])
        trace.write(self._folder, {name: data}, manifest)

    def _algorithm(self, stage):
        """What a stage learns with, as the verifier knows it."""
        if stage.name == configs.rl_name(self._config):
            return self._config.algorithm
        return "preference" if stage.name in ("reward", "judge") else "supervised"

    def _strings(self, arrays):
        ids = [array for name, array in arrays.items() if _is_ids(name) and array.dtype.kind in "iu"]  # no scores
        found = {int(i) for array in ids for i in np.unique(array)}
        return {i: text_of(self._tokenizer, i) for i in sorted(found)}

    def _manifest(self):
        """The manifest so far, or a new one."""
        path = self._folder / trace.MANIFEST
        if path.exists():
            return trace.Trace(self._folder).manifest | {"config": configs.tree(self._config)}
        tokenizer = self._tokenizer
        return {
            "schema": trace.SCHEMA,
            "made_by": "rlhf_jax",
            "config": configs.tree(self._config),
            "seed": self._config.seed,
            **metrics.environment(),
            "tokenizer": {
                "kind": self._config.text.kind,
                "sha256": tokenizer.fingerprint(),
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "eos_ids": list(tokenizer.eos_ids),
                "pad_id": tokenizer.pad_id,
            },
            "stages": {},
            "files": {},
        }


def _is_ids(name):
    name = name.split(".")[1]
    return (name.startswith(IDS) and "mask" not in name and "logp" not in name) or "top_ids" in name


def text_of(tokenizer, i: int) -> str:
    """The text of one id; a byte that is not part of UTF-8 is a lone surrogate, as Python's surrogateescape has it."""
    return tokenizer.token_bytes(i).decode("utf-8", "surrogateescape")
