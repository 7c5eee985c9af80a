"""Plain texts to learn to write from: all of them to pretrain on, the happy ones to fine-tune on.

A row of tokens is `length` long and starts with one token to read, so that the loss and the sampler see it as a prompt
of one token and a response: EOS, which stands before every text, or in pretraining whatever a window begins with.
"""

import dataclasses
from pathlib import Path

import numpy as np

from rlhf_jax import fields
from rlhf_jax.data import batches, cache, files, hub, stories, tweets
from rlhf_jax.errors import InputError
from rlhf_jax.fields import LARGEST, choice, neutral, number

KINDS = {"tweets": tweets, "stories": stories}


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns are called in a file or on the hub."""

    text: str = "text"  # the column of the texts
    sentiment: str = ""  # of tweets; empty: sentiment, label_text or label, the first that is there


@dataclasses.dataclass(frozen=True)
class Config:
    """Which texts, and what is cut from them."""

    kind: str = choice("tweets", *KINDS)  # what the texts are
    source: str = choice("made", "made", "file", "hub")  # made: generated here; file: `path`; hub: a data set
    # file: CSV, JSONL, Parquet, stories as plain text too; hub: OWNER/NAME/SUBSET@REVISION, or empty
    path: str = fields.path()
    columns: Columns = Columns()
    split: str = "train"  # of the set on the hub
    held_out_split: str = ""  # the one kept for evaluation; empty: a share of the texts, as of a file
    cache: str = neutral("")  # folder for downloads from the hub; empty: the user's cache folder
    made: int = number(12_000, least=2)  # texts to generate
    made_seed: int = number(0, least=0, most=2**32 - 1)  # of the texts that are generated
    skip_bad: bool = False  # leave out rows without text or with an unknown sentiment, and say how many
    sentiment: str = choice("positive", *tweets.SENTIMENTS)  # fine-tuning uses the tweets with this label
    min_reward: float = number(0.05, least=-LARGEST)  # fine-tuning uses the stories with a reward above this
    held_out: float = number(0.1, above=0, below=1)  # share of the texts held out for evaluation
    length: int = number(32, least=3)  # tokens a row, including the one it starts with

    def problems(self):
        """Checks that concern several fields."""
        if not self.split:
            yield "split", "the name of one"
        if self.source == "file" and not self.path:
            yield "path", "a file where source is file"
        if self.source == "made" and self.path:
            yield "path", "none where source is made"

    def unused(self):
        """Fields without effect, and why."""
        why = f"source is {self.source}"
        if self.source == "made":
            yield "columns", why
            yield "skip_bad", why
        else:
            yield "made", why
            yield "made_seed", why
        if self.source != "hub":
            for name in ("split", "held_out_split", "cache"):
                yield name, why
        elif self.held_out_split:
            yield "held_out", "held_out_split is given"
        if self.kind == "tweets":
            yield "min_reward", "kind is tweets, which have labels (sentiment)"
        else:
            yield "sentiment", "kind is stories, which have no labels (min_reward)"
            yield "columns.sentiment", "kind is stories, which have no labels"

    @property
    def response_length(self):
        """R: tokens of a sample, EOS included; one place of a row is the start's."""
        return self.length - 1


def load(config, seed):
    """((train, held out), what was skipped): rows {"text", ...} of the corpus. InputError names the field at fault."""
    kind = KINDS[config.kind]
    skipped: list[str] | None = [] if config.skip_bad else None
    if config.source == "made":
        rows = kind.made(config.made, config.made_seed)
    else:
        try:
            rows = _read(kind, config, config.split, skipped)
            if config.source == "hub" and config.held_out_split:
                return (rows, _read(kind, config, config.held_out_split, skipped)), skipped or []
        except InputError as error:
            raise InputError(f"data.path: {error}") from None
    try:
        return batches.split(rows, config.held_out, seed, "text"), skipped or []
    except InputError as error:
        raise InputError(f"data.held_out: {error}") from None


def _read(kind, config, split, skipped):
    """The rows of a file, or of a split of a data set; the published one, if none is named."""
    if config.source == "file":
        return files.rows(kind.cells(config.path, config.columns), config.path, skipped, convert=kind.row)
    name, folder = config.path or kind.HUB, Path(config.cache or cache.folder())
    cells = hub.cells(name, split, *kind.choices(config.columns), cache_folder=folder)
    return files.rows(cells, name, skipped, convert=kind.row)


def windows(rows, tokenizer, length):
    """The texts as one stream, EOS before each and after the last, cut into rows of `length` tokens."""
    texts = tokenizer.encode_batch([row["text"] for row in rows])
    stream = np.array([id for ids in texts for id in (tokenizer.eos_id, *ids)] + [tokenizer.eos_id], np.int32)
    count = len(stream) // length
    if not count:
        raise InputError(f"data.length: expected at most {len(stream)}, the tokens of all texts, got {length}")
    tokens_NT = stream[: count * length].reshape(count, length)
    return _arrays(tokens_NT, np.ones_like(tokens_NT, bool))


def openings(rows, tokenizer, length):
    """EOS, then the beginning of a text, with EOS after it where it ends in time: a row a text."""
    tokens_NT = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    for row_T, ids in zip(tokens_NT, tokenizer.encode_batch([row["text"] for row in rows]), strict=True):
        ids = [tokenizer.eos_id, *ids, tokenizer.eos_id][:length]
        row_T[: len(ids)] = ids
    return _arrays(tokens_NT, tokens_NT != tokenizer.pad_id)


SIDES = ("chosen", "rejected")


def pairs(rows, tokenizer, length):
    """Rows {"chosen", "rejected"} as two `openings` each, after one start."""
    sides = {
        name: openings([{"text": row[name]} for row in rows], tokenizer, length) for name in ("chosen", "rejected")
    }
    arrays = {name: sides["chosen"][name] for name in ("prompt_NP", "prompt_mask_NP", "index_N")}
    for name, side in sides.items():
        arrays |= {f"{name}_NR": side["response_NR"], f"{name}_mask_NR": side["response_mask_NR"]}
    return arrays


def starts(count, tokenizer):
    """`count` prompts of EOS alone: what samples are drawn from."""
    index_N = np.arange(count, dtype=np.int32)
    prompt_NP = np.full((count, 1), tokenizer.eos_id, np.int32)
    return {"prompt_NP": prompt_NP, "prompt_mask_NP": np.ones_like(prompt_NP, bool), "index_N": index_N}


def _arrays(tokens_NT, mask_NT):
    return {
        "prompt_NP": tokens_NT[:, :1],
        "prompt_mask_NP": mask_NT[:, :1],
        "response_NR": tokens_NT[:, 1:],
        "response_mask_NR": mask_NT[:, 1:],
        "index_N": np.arange(len(tokens_NT), dtype=np.int32),
    }
