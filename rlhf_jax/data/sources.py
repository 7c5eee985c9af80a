"""Where the rows of a run come from: the embedded world, files, or data sets of the Hugging Face hub."""

import dataclasses
import functools
import itertools
import random
from pathlib import Path

from rlhf_jax.data import batches, cache, chats, comparisons, files, hub
from rlhf_jax.errors import InputError
from rlhf_jax.fields import choice, number, path

COLUMNS = {"sft": ("prompt", "label"), "preferences": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}
ANSWERS = ("label", "chosen", "rejected")  # texts that end with EOS, whose name must not be in them
# The columns of conversations without a prompt of their own (data/chats.py).
PAIRS = ("preferences", "pair_length", "world_preferences", "world_labels")  # fields that concern pairs alone
CHATS = {"sft": (chats.MESSAGES,), "preferences": ("chosen", "rejected"), "prompts": (chats.MESSAGES,)}


@dataclasses.dataclass(frozen=True)
class Columns:
    """What our columns are called in the files or on the hub."""

    prompt: str = "prompt"  # the column of the prompts
    label: str = "label"  # the column of the reference completions, for fine-tuning
    chosen: str = "chosen"  # the column of the better completions
    rejected: str = "rejected"  # the column of the worse completions

    def problems(self):
        """Columns of the same rows are different ones."""
        for columns in COLUMNS.values():
            for one, other in itertools.combinations(columns, 2):
                if getattr(self, one) == getattr(self, other):
                    yield other, f"another column than that of data.columns.{one}"


@dataclasses.dataclass(frozen=True)
class Config:
    """The data of a run and the sizes it is brought to."""

    # world: generated here; files: the paths below; hub: data sets, as OWNER/NAME/SUBSET@REVISION
    source: str = choice("world", "world", "files", "hub")
    sft: str = path()  # rows {"prompt", "label"}: JSONL, CSV or Parquet, by suffix
    # rows {"prompt", "chosen", "rejected"}, or OpenAI's comparisons; of the world, instead of its pairs (votes.jsonl)
    preferences: str = path()
    prompts: str = path()  # rows {"prompt"}; empty: the prompts of the SFT rows
    columns: Columns = Columns()
    split: str = "train"  # of the sets on the hub
    held_out_split: str = ""  # the one kept for evaluation; empty: a share of the prompts, as of files
    held_out: float = number(0.1, above=0, below=1)  # share of a file's prompts held out for evaluation
    skip_bad: bool = False  # leave out rows without text, or without a known character, and say how many
    world_seed: int = number(0, least=0, most=2**32 - 1)  # of the rows that are generated
    world_sft: int = number(16_000, least=1)  # rows to generate
    world_preferences: int = number(8_000, least=1)  # rows to generate
    world_prompts: int = number(8_000, least=1)  # rows to generate
    world_held_out: int = number(512, least=1)  # rows to generate, of each kind
    # What decides a generated pair: gold (the truth, with noise), or, to see what a bad reward model does, random or
    # longer (the text with more words)
    world_labels: str = choice("gold", "gold", "random", "longer")
    cache: str = path(neutral=True)  # folder for generated and converted data; empty: the user's cache folder
    prompt_length: int = number(512, least=1)  # P, tokens
    # A longer prompt loses its beginning (left), its end (right) or the end of its post (newline: a TL;DR query); or
    # its row is skipped and counted (skip), or it is an error.
    cut: str = choice("newline", *batches.CUTS)
    response_length: int = number(53, least=2)  # R, tokens, EOS included
    # R of preference pairs, whose responses may be longer, tokens, EOS included. 0: response_length.
    pair_length: int = number(0, least=2, or_zero=True)

    def problems(self):
        """Checks beyond ranges."""
        if not self.split:
            yield "split", "the name of one"

    def unused(self):
        """Fields without effect, and why."""
        why = f"source is {self.source}"
        if self.source == "world":
            for name in ("sft", "prompts"):
                yield name, f"{why} (--config=...:files or --config.data.source=files reads files)"
            for name in ("held_out",) if self.preferences else ("columns", "skip_bad", "held_out"):
                yield name, why
            if self.preferences:
                yield "world_preferences", "preferences is given"
                yield "world_labels", "preferences is given"
                yield "columns.label", why
        else:
            for name in ("seed", "sft", "preferences", "prompts", "held_out", "labels"):
                yield f"world_{name}", why
        if self.source != "hub":
            yield "split", why
            yield "held_out_split", why
        elif self.held_out_split:
            yield "held_out", "held_out_split is given"
        if self.source == "files":
            yield "cache", why


def load(kind, config, seed):
    """((train rows, held-out rows), notes) of a kind of COLUMNS. The world's rows have a hidden `record`.

    Pairs of a file, such as votes, replace the world's training pairs; its own held-out pairs evaluate.

    Rows of prompts keep all columns of their file, for rewards that read them. The notes say what was left out or
    changed. Raises InputError naming the field of the config, and the file and row, that is wrong.
    """
    if config.source == "world":
        from rlhf_jax.data import world  # imports TFDS: a third of a second

        sizes = {"train": getattr(config, f"world_{kind}"), "validation": config.world_held_out}
        folder = config.cache or cache.folder()
        load_split = functools.partial(world.load, kind, seed=config.world_seed, data_dir=folder, **sizes)
        own = kind == "preferences" and config.preferences  # pairs of a file, such as votes
        try:
            made = [load_split(split=split) for split in world.SPLITS[1 if own else 0 :]]
        except InputError as error:
            raise InputError(str(error).replace("data_dir:", "data.cache:")) from None
        if kind == "preferences" and not own and config.world_labels != "gold":
            made = [list(labelled(rows, config.world_labels, config.world_seed)) for rows in made]
        if not own:
            return tuple(made), []
    extra = kind == "prompts"
    kind = "sft" if extra and not config.prompts else kind
    if not getattr(config, kind):
        wanted, value = ("data set", "NAME") if config.source == "hub" else (f"{', '.join(files.READERS)} file", "FILE")
        raise InputError(f"data.{kind}: expected a {wanted} (--config.data.{kind}={value}), got none")
    skipped: list[str] | None = [] if config.skip_bad else None
    found: list[str] = []  # names of special tokens, each at the end of a text
    read = functools.partial(_read, kind, config, skipped=skipped, found=found, extra=extra)
    try:
        rows = read(config.split)
        if config.source == "world":
            sides = rows, *made
        elif config.source == "hub" and config.held_out_split:
            sides = rows, read(config.held_out_split)
        else:
            sides = batches.split(rows, config.held_out, seed)
    except InputError as error:
        raise InputError(f"data.{kind}: {error}") from None
    return sides, files.notes(f"data.{kind}", skipped or [], found)


def labelled(rows, how, seed):
    """Yields pairs whose sides are decided anew: `random`, or the `longer` text is the better one."""
    rng = random.Random(f"{seed}/{how}")
    for row in rows:
        more = len(row["rejected"].split()) - len(row["chosen"].split())
        swap = rng.random() < 0.5 if how == "random" else more > 0
        yield row | ({"chosen": row["rejected"], "rejected": row["chosen"]} if swap else {})


def _read(kind, config, split, *, skipped, found, extra):
    """The rows of a file, or of a split of a data set; with `extra` they keep their other columns."""
    place = getattr(config, kind)
    theirs = {name: getattr(config.columns, name) for name in COLUMNS[kind]}
    choices = [tuple(theirs.values())] + [comparisons.COLUMNS] * (kind == "preferences")
    choices += [files.Also(theirs.get(name, name) for name in CHATS[kind])]
    if config.source == "hub":
        cells = hub.cells(place, split, *choices, cache_folder=Path(config.cache or cache.folder()), extra=extra)
    else:
        cells = files.cells(place, *choices, extra=extra)

    def named(values):
        if tuple(values) == comparisons.COLUMNS:
            return comparisons.pair(values)
        ours = {name: values[column] for name, column in theirs.items() if column in values}
        if kind == "prompts" and config.columns.label in values:
            ours["label"] = values[config.columns.label]  # for rewards that compare with it
        return {name: value for name, value in values.items() if name not in theirs.values()} | ours

    convert = converter(kind, found)
    rows = files.rows(cells, place, skipped, convert=lambda values: convert(named(values)), texts=COLUMNS[kind])
    for one, other in itertools.combinations(COLUMNS[kind], 2):
        if all(row[one].strip() == row[other].strip() for row in rows):
            same = f"the same text in all {len(rows)} rows"
            raise InputError(f"{place}: expected {one} and {other} that differ, got {same}")
    return rows


def converter(kind, found):
    """A function of the values of a row, by our columns, that makes conversations (data/chats.py) and checks answers.

    Names of special tokens at the end of an answer are taken off, and added to `found`. Raises InputError for a row
    that is a conversation among texts, or a text among conversations.
    """
    kinds: list[bool] = []  # whether the rows so far are conversations

    def convert(values):
        ours = chats.row(values, COLUMNS[kind])
        kinds.append(chats.KEY in ours)
        if kinds[-1] != kinds[0]:
            got, expected = ("text", "conversation")[:: 1 if kinds[0] else -1]
            raise InputError(f"expected a {expected}, as in the first row, got a {got}")
        return ours | {name: files.without_special(ours[name], found) for name in COLUMNS[kind] if name in ANSWERS}

    return convert
