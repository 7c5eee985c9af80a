"""Prompts of any form from files or the hub, optionally with labels and preference pairs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from rlhf_jax.data import batches, files, sources
from rlhf_jax.errors import InputError
from rlhf_jax.tasks.task import Encoded, Rows, Task, stamp

Config = sources.Config  # of the section `data`


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Completions of prompts; a row keeps all its columns for the reward."""

    config: sources.Config
    seed: int  # which prompts are held out

    name = "prompts"
    same_prompt = False
    questions = {"sft": "sft", "prompts": "prompts"}

    @property
    def response_length(self):
        return self.config.response_length

    @property
    def prompt_length(self):
        return self.config.prompt_length

    def files(self):
        config = self.config
        if config.source == "hub":
            return {}
        kinds = ("preferences",) if config.source == "world" else ("sft", "preferences", "prompts")
        named = {kind: getattr(config, kind) for kind in kinds}
        return {f"data.{kind}": path for kind, path in named.items() if path}

    def texts(self):
        if self.config.source == "world" or self.config.sft:
            return [f"{row['prompt']} {row['label']}" for row in self.rows("sft").train]
        return [row["prompt"] for row in self.rows("prompts").train]

    def rows(self, kind):
        if kind == "pretrain":
            raise InputError("pretrain.steps: expected 0, as only task = write has plain texts to pretrain on")
        return _rows(self.config, kind, self.seed, stamp(self.files()))

    def arrays(self, kind, tokenizer):
        config, source = self.config, f"data.{kind}"
        sides, notes = [], list(self.rows(kind).notes)
        lengths: dict[str, Any] = {"prompt_length": config.prompt_length, "cut": config.cut}
        lengths |= {"skip_bad": config.skip_bad, "notes": notes}
        encode: Callable
        if kind == "sft":
            encode = functools.partial(batches.encode_sft, response_length=config.response_length, **lengths)
        elif kind == "preferences":
            longest = config.pair_length or config.response_length
            encode = functools.partial(batches.encode_pairs, response_length=longest, **lengths)
        else:
            encode = functools.partial(batches.encode_prompts, **lengths)
        for side, rows in (("train", self.rows(kind).train), ("held out", self.rows(kind).held_out)):
            arrays, counts = encode(rows, tokenizer, source=f"{source}, {side}")
            counted = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count)
            notes.append(f"{source}, {side}: {counted}")
            sides.append(arrays)
        train, held_out = sides
        return Encoded(train, held_out, tuple(notes))

    def judge(self, rows, texts):
        return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Rows from a notebook, {kind: rows}, instead of files."""

    rows_by_kind: dict[str, list[dict]]
    prompt_length: int  # P, tokens
    response_length: int  # R, tokens, EOS included
    seed: int = 1  # which prompts are held out
    held_out: float = 0.1  # share of the prompts
    cut: str = "left"  # what happens to a longer prompt: one of batches.CUTS

    name = "prompts"
    same_prompt = False
    questions = {"sft": "sft", "prompts": "prompts"}

    def files(self):
        return {}

    def texts(self):
        return [row["prompt"] for row in self.rows_by_kind["prompts"]]

    def rows(self, kind):
        columns, ours = sources.COLUMNS[kind], sources.converter(kind, [])
        choices = columns, files.Also(sources.CHATS[kind])

        def convert(row):
            return ours(files.of_record(row, choices, extra=True))

        cells = ((f"rows[{i}]", row) for i, row in enumerate(self.rows_by_kind[kind]))
        rows: list[dict] = list(files.rows(cells, "rows", convert=convert, texts=columns))
        return Rows(*batches.split(rows, self.held_out, self.seed))

    def arrays(self, kind, tokenizer):
        lengths: dict[str, Any] = {"prompt_length": self.prompt_length, "cut": self.cut, "source": f"rows of {kind}"}
        if kind == "sft":
            lengths["response_length"] = self.response_length
        encoders: dict[str, Callable] = {"sft": batches.encode_sft, "prompts": batches.encode_prompts}
        train, held_out = (encoders[kind](side, tokenizer, **lengths)[0] for side in self.rows(kind)[:2])
        return Encoded(train, held_out)

    def judge(self, rows, texts):
        return {}


def make(config) -> Task:
    """The task of a whole config whose `task` is prompts."""
    if config.data.source == "world":
        raise InputError("data.source: expected files or hub where task is prompts, got 'world'")
    return Prompts(config.data, config.seed)


def unused(config):
    """Fields of a whole config of this task that have no effect, and why."""
    yield "evaluation.draws", f"task is {config.task}, whose completions are not right or wrong"
    data, reward = config.data, f"reward is {config.reward.kind}"
    if config.sampled and not config.learned:
        for name in ("data.preferences", "data.pair_length", "data.columns.chosen", "data.columns.rejected"):
            yield name, reward
        yield "data.world_preferences", reward
        if not (config.sft.steps or config.rl.ptx_coef) and config.text.of_files and data.prompts:
            for name in ("data.sft", "data.columns.label"):
                yield name, f"sft.steps is 0, {reward}, and the tokenizer is read from a path"


@functools.lru_cache(maxsize=8)
def _rows(config, kind, seed, _):
    (train, held_out), notes = sources.load(kind, config, seed)
    return Rows(train, held_out, tuple(notes))
