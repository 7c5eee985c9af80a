"""Data sets of the Hugging Face hub, through TFDS, without TensorFlow."""

import tensorflow_datasets as tfds

from rlhf_jax.errors import InputError


def read(name: str, split: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a split, with these columns as text. InputError says what is missing: a package, the network."""
    try:
        source = tfds.data_source(f"huggingface:{name}", split=split)
    except ImportError as error:
        raise InputError(f"data.source: the hub's {name} needs the package `datasets` ({error})") from None
    except Exception as error:  # the hub client's and TFDS's own, which have no common base
        told = " ".join(str(error).split())[:200]
        raise InputError(f"data.source: cannot read {name} from the hub ({type(error).__name__}: {told})") from error
    missing = [column for column in columns if len(source) and column not in source[0]]
    if missing:
        raise InputError(f"data.source: {name}: expected a column {missing[0]!r}, there is {', '.join(source[0])}")
    return [{column: _text(row[column]) for column in columns} for row in source]


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
