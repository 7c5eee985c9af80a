"""Where the rows of a run come from: the embedded world, files, or data sets of the Hugging Face hub."""

import dataclasses
import functools
from pathlib import Path

from rlhf_jax.data import batches, cache, comparisons, files, hub
from rlhf_jax.errors import InputError

COLUMNS = {"sft": ("prompt", "label"), "preferences": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}


@dataclasses.dataclass(frozen=True)
class Columns:
    """What our columns are called in the files or on the hub."""

    prompt: str = "prompt"
    label: str = "label"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclasses.dataclass(frozen=True)
class Config:
    """The data of a run and the sizes it is brought to."""

    # world: generated here; files: the paths below; hub: data sets, as OWNER/NAME/SUBSET@REVISION
    source: str = "world"
    sft: str = ""  # rows {"prompt", "label"}: JSONL, CSV or Parquet, by suffix
    preferences: str = ""  # rows {"prompt", "chosen", "rejected"}, or OpenAI's comparisons
    prompts: str = ""  # rows {"prompt"}; empty: the prompts of the SFT rows
    columns: Columns = Columns()
    split: str = "train"  # of the sets on the hub
    held_out_split: str = ""  # the one kept for evaluation; empty: a share of the prompts, as of files
    held_out: float = 0.1  # share of the prompts of a file that is kept for evaluation
    skip_bad: bool = False  # leave out rows without text, and say how many
    world_seed: int = 0
    world_sft: int = 16_000  # rows to generate
    world_preferences: int = 8_000
    world_prompts: int = 8_000
    world_held_out: int = 512
    cache: str = ""  # where what is generated or converted is kept; empty: the user's cache folder
    prompt_length: int = 512  # P, tokens
    response_length: int = 53  # R, tokens, EOS included
    pair_length: int = 0  # R of preference pairs, whose responses may be longer; 0: response_length


def load(kind, config, seed):
    """((train rows, held-out rows), what was skipped) of a kind of COLUMNS. The world's rows have a hidden `record`.

    Raises InputError naming the field of the config, and the file and row, that is wrong.
    """
    if config.source == "world":
        from rlhf_jax.data import world  # imports TFDS: a third of a second

        sizes = {"train": getattr(config, f"world_{kind}"), "validation": config.world_held_out}
        folder = config.cache or cache.folder()
        load_split = functools.partial(world.load, kind, seed=config.world_seed, data_dir=folder, **sizes)
        try:
            return tuple(load_split(split=split) for split in world.SPLITS), []
        except InputError as error:
            raise InputError(str(error).replace("data_dir:", "data.cache:")) from None
    if kind == "prompts" and not config.prompts:
        return load("sft", config, seed)
    if not getattr(config, kind):
        wanted, value = ("data set", "NAME") if config.source == "hub" else (".jsonl, .csv or .parquet file", "FILE")
        raise InputError(f"data.{kind}: expected a {wanted} (--config.data.{kind}={value}), got none")
    skipped = [] if config.skip_bad else None
    try:
        rows = _read(kind, config, config.split, skipped)
        if config.source == "hub" and config.held_out_split:
            return (rows, _read(kind, config, config.held_out_split, skipped)), skipped or []
        return batches.split(rows, config.held_out, seed), skipped or []
    except InputError as error:
        raise InputError(f"data.{kind}: {error}") from None


def _read(kind, config, split, skipped):
    """The rows of a file, or of a split of a data set."""
    place = getattr(config, kind)
    theirs = {name: getattr(config.columns, name) for name in COLUMNS[kind]}
    choices = [tuple(theirs.values())] + [comparisons.COLUMNS] * (kind == "preferences")
    if config.source == "hub":
        cells = hub.cells(place, split, *choices, cache_folder=Path(config.cache or cache.folder()))
    else:
        cells = files.cells(place, *choices)

    def convert(values):
        if tuple(values) == comparisons.COLUMNS:
            return comparisons.pair(values)
        return {name: values[column] for name, column in theirs.items()}

    return files.rows(cells, place, skipped, convert=convert)
