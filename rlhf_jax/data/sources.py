"""Where the rows of a run come from: the embedded world, or files."""

import dataclasses
import functools
import os
from pathlib import Path

from rlhf_jax.data import batches, files, world
from rlhf_jax.errors import InputError

COLUMNS = {"sft": ("prompt", "label"), "preferences": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}


@dataclasses.dataclass(frozen=True)
class Config:
    """The data of a run and the sizes it is brought to."""

    source: str = "world"  # world: generated here; files: the paths below
    sft: str = ""  # rows {"prompt", "label"}: JSONL, CSV or Parquet, by suffix
    preferences: str = ""  # rows {"prompt", "chosen", "rejected"}
    prompts: str = ""  # rows {"prompt"}; empty: the prompts of the SFT rows
    held_out: float = 0.1  # share of the prompts of a file that is kept for evaluation
    world_seed: int = 0
    world_sft: int = 16_000  # rows to generate
    world_preferences: int = 8_000
    world_prompts: int = 8_000
    world_held_out: int = 512
    cache: str = ""  # where generated rows are kept; empty: the user's cache folder
    prompt_length: int = 512  # P, tokens
    response_length: int = 53  # R, tokens, EOS included


def load(kind, config, seed):
    """(train rows, held-out rows) of a kind of COLUMNS. Rows of the world have their hidden `record` too.

    Raises InputError naming the field of the config, and the file and row, that is wrong.
    """
    if config.source == "world":
        sizes = {"train": getattr(config, f"world_{kind}"), "validation": config.world_held_out}
        folder = config.cache or _cache_folder()
        load_split = functools.partial(world.load, kind, seed=config.world_seed, data_dir=folder, **sizes)
        try:
            return tuple(load_split(split=split) for split in world.SPLITS)
        except InputError as error:
            raise InputError(str(error).replace("data_dir:", "data.cache:")) from None
    if kind == "prompts" and not config.prompts:
        return load("sft", config, seed)
    path = getattr(config, kind)
    if not path:
        raise InputError(f"data.{kind}: expected a .jsonl, .csv or .parquet file (--config.data.{kind}=FILE), got none")
    try:
        return batches.split(files.read(path, COLUMNS[kind]), config.held_out, seed)
    except InputError as error:
        raise InputError(f"data.{kind}: {error}") from None


def _cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rlhf_jax", "data")
