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
from rlhf_jax.fields import LARGEST, choice, number

KINDS = {"tweets": tweets, "stories": stories}


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns are called in a file or on the hub."""

    text: str = "text"  # the column of the texts
    sentiment: str = ""  # of tweets; empty: sentiment, label_text or label, the first that is there

    def problems(self):
        """A tweet and its sentiment are in two columns."""
        if self.sentiment == self.text:
            yield "sentiment", "another column than that of data.columns.text"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which texts, and what is cut from them."""

    kind: str = choice("tweets", *KINDS)  # what the texts are
    source: str = choice("made", "made", "file", "hub")  # made: generated here; file: `path`; hub: a data set
    # file: CSV, JSONL, JSON, Parquet, stories as plain text too; hub: OWNER/NAME/SUBSET@REVISION, or empty
    path: str = fields.path()
    columns: Columns = Columns()
    split: str = "train"  # of the set on the hub
    held_out_split: str = ""  # the one kept for evaluation; empty: a share of the texts, as of a file
    cache: str = fields.path(neutral=True)  # folder for downloads from the hub; empty: the user's cache folder
    made: int = number(12_000, least=2)  # texts to generate
    made_seed: int = number(0, least=0, most=2**32 - 1)  # of the texts that are generated
    # Leave out rows without text or a known character, or with an unknown sentiment, and say how many.
    skip_bad: bool = False
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
    """((train, held out), notes): rows {"text", ...} of the corpus. The notes say what was left out or changed.

    InputError names the field at fault.
    """
    kind = KINDS[config.kind]
    skipped: list[str] | None = [] if config.skip_bad else None
    found: list[str] = []  # names of special tokens, each at the end of a text
    held_out = None
    if config.source == "made":
        rows = kind.made(config.made, config.made_seed)
    else:
        try:
            rows = _read(kind, config, config.split, skipped, found)
            if config.source == "hub" and config.held_out_split:
                held_out = _read(kind, config, config.held_out_split, skipped, found)
        except InputError as error:
            raise InputError(f"data.path: {error}") from None
    try:
        sides = (rows, held_out) if held_out else batches.split(rows, config.held_out, seed, "text")
    except InputError as error:
        raise InputError(f"data.held_out: {error}") from None
    return sides, files.notes("data.path", skipped or [], found)


def _read(kind, config, split, skipped, found):
    """The rows of a file, or of a split of a data set; the published one, if none is named."""

    def convert(values):
        row = kind.row(values)
        return row | {"text": files.without_special(row["text"], found)}

    if config.source == "file":
        return files.rows(kind.cells(config.path, config.columns), config.path, skipped, convert=convert)
    name, folder = config.path or kind.HUB, Path(config.cache or cache.folder())
    cells = hub.cells(name, split, *kind.choices(config.columns), cache_folder=folder)
    return files.rows(cells, name, skipped, convert=convert)


def windows(rows, tokenizer, length, *, skip_bad=False, notes=None):
    """The texts as one stream, EOS before each and after the last, cut into rows of `length` tokens.

    A text that cannot be encoded is an error, or left out and noted, as in data/batches.py.
    """
    texts, _ = _encode(rows, tokenizer, skip_bad, notes)
    stream = np.array([id for ids in texts for id in (tokenizer.eos_id, *ids)] + [tokenizer.eos_id], np.int32)
    count = len(stream) // length
    if not count:
        raise InputError(f"data.length: expected at most {len(stream)}, the tokens of all texts, got {length}")
    tokens_NT = stream[: count * length].reshape(count, length)
    return _arrays(tokens_NT, np.ones_like(tokens_NT, bool))


def openings(rows, tokenizer, length, *, skip_bad=False, notes=None, column="text"):
    """EOS, then the beginning of a text, with EOS after it where it ends in time: a row a text.

    A text that cannot be encoded is an error, or left out and noted, as in data/batches.py.
    """
    texts, index_N = _encode(rows, tokenizer, skip_bad, notes, column)
    tokens_NT = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    for row_T, ids in zip(tokens_NT, texts, strict=True):
        ids = [tokenizer.eos_id, *ids, tokenizer.eos_id][:length]
        row_T[: len(ids)] = ids
    return _arrays(tokens_NT, tokens_NT != tokenizer.pad_id) | {"index_N": index_N}


def pairs(rows, tokenizer, length, *, skip_bad=False, notes=None):
    """Rows {"chosen", "rejected"} as two `openings` each, after one start; without pairs that are cut to the same."""
    sides = {
        name: openings(rows, tokenizer, length, skip_bad=skip_bad, notes=notes, column=name)
        for name in ("chosen", "rejected")
    }
    index_N = np.intersect1d(*(side["index_N"] for side in sides.values()))
    arrays: batches.Arrays = {}
    for name, side in sides.items():
        side = {part: array[np.isin(side["index_N"], index_N)] for part, array in side.items()}
        arrays |= {part: side[part] for part in ("prompt_NP", "prompt_mask_NP", "index_N")}
        arrays |= {f"{name}_NR": side["response_NR"], f"{name}_mask_NR": side["response_mask_NR"]}
    differ_N = batches.different(arrays["chosen_NR"], arrays["rejected_NR"], "data.length")
    if notes is not None and not differ_N.all():
        notes.append(f"preferences: {np.sum(~differ_N)} pairs skipped, whose first {length - 1} tokens are the same")
    return {name: array[differ_N] for name, array in arrays.items()}


def starts(count, tokenizer):
    """`count` prompts of EOS alone: what samples are drawn from."""
    index_N = np.arange(count, dtype=np.int32)
    prompt_NP = np.full((count, 1), tokenizer.eos_id, np.int32)
    return {"prompt_NP": prompt_NP, "prompt_mask_NP": np.ones_like(prompt_NP, bool), "index_N": index_N}


def _encode(rows, tokenizer, skip_bad, notes, column="text"):
    """(the ids of each text that can be encoded, their places in the rows)."""
    bad: batches.Bad | None = {} if skip_bad else None
    texts = list(batches.encode(rows, column, tokenizer, "data.path", bad))
    batches.note(bad, "data.path", notes)
    index_N = np.array([i for i, ids in enumerate(texts) if ids is not None], np.int32)
    if bad and not len(index_N):
        raise InputError(f"{bad[0]}; and no other of the {len(rows)} texts can be encoded")
    return [ids for ids in texts if ids is not None], index_N


def _arrays(tokens_NT, mask_NT):
    return {
        "prompt_NP": tokens_NT[:, :1],
        "prompt_mask_NP": mask_NT[:, :1],
        "response_NR": tokens_NT[:, 1:],
        "response_mask_NR": mask_NT[:, 1:],
        "index_N": np.arange(len(tokens_NT), dtype=np.int32),
    }
