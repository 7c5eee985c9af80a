"""config.json of transformers <-> our Config, by family (families/). What we would compute differently is refused.

A padded vocabulary (model.vocab_size above the tokenizer's) keeps its padded rows: config.json has the number of rows
of the embedding, the exported model is the same function, and the tokenizer uses the first ids.
"""

import dataclasses
import math
from pathlib import Path

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, listed
from rlhf_jax.models import families
from rlhf_jax.models.families.family import LAYOUT, Fields, refuse

FILE = "config.json"
PADDING = 256  # a model must have fewer than this many ids beyond those of the checkpoint it starts from
# Fields that must be the checkpoint's.
SAME = ["layers", "heads", "head_size", "width", *LAYOUT, "rotary_base", "rotary_context", "rotary_slow"]
SAME += ["rotary_fast", "exact_gelu", "tied", "norm_eps"]


def read(folder):
    """The Config in a folder's config.json. InputError names the file, each wrong field, and what was expected.

    Dropout is not read: it belongs to the training, not to the model.
    """
    path = Path(folder, FILE)
    fields = Fields(jsonfile.read(path, "the config.json of transformers"))
    kind = fields.one_of("model_type", *families.FAMILIES)
    if fields.record.get("quantization_config") is not None:
        expected = "expected none: only weights in float32, float16 or bfloat16 are read"
        raise InputError(f"{path}: quantization_config: {expected}")
    config = families.FAMILIES[kind].read(fields) if not fields.problems else None
    if fields.problems:
        raise InputError(f"{path}: {listed(fields.problems, '; ')}")
    return config


def compare(folder, config):
    """Raises InputError, naming each field that must change, if the checkpoint in `folder` does not fit config."""
    theirs = read(folder)
    ours, expected = _shortest(config), _shortest(theirs)
    wrong = {name: repr(getattr(expected, name)) for name in SAME if not _same(ours, expected, name)}
    if config.context > theirs.context or (config.context < theirs.context and not theirs.rotary_share):
        wrong["context"] = f"{theirs.context}{' or less' if theirs.rotary_share else ''}"
    if not theirs.vocab_size <= config.vocab_size < theirs.vocab_size + PADDING:
        wrong["vocab_size"] = f"{theirs.vocab_size} to {theirs.vocab_size + PADDING - 1}"
    if wrong:
        changes = (f"model.{name} = {expected} (not {getattr(config, name)!r})" for name, expected in wrong.items())
        raise InputError(f"{Path(folder, FILE)}: expected {listed(changes)}")


def language_model(config, *, eos_id, pad_id):
    """config.json of a language model, as a dict. Raises InputError if transformers has no such architecture."""
    return _record(config, "language_model", eos_id, pad_id)


def scalar_model(config, *, eos_id, pad_id):
    """config.json of a reward model, as a dict. transformers reads the score at the last token that is not pad_id."""
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}  # one label; transformers' default is two
    return _record(config, "scalar_model", eos_id, pad_id) | labels


def _shortest(config):
    """The Config with 0 for sizes that 0 stands for."""
    kv_heads = 0 if config.kv_heads == config.heads else config.kv_heads
    size = 0 if config.feed_forward_size == 4 * config.width else config.feed_forward_size
    return dataclasses.replace(config, kv_heads=kv_heads, feed_forward_size=size)


def _same(config, other, name):
    """Whether a field of both is the same: files may hold float32 roundings of numbers such as 1e-5."""
    value, expected = getattr(config, name), getattr(other, name)
    return math.isclose(value, expected, rel_tol=1e-6) if isinstance(value, float) else value == expected


def _record(config, what, eos_id, pad_id):
    family = families.of(config)
    for name, token in (("eos_id", eos_id), ("pad_id", pad_id)):
        if not 0 <= token < config.vocab_size:
            raise InputError(f"{name}: expected one of the {config.vocab_size} ids of the model, got {token}")
    refuse(family, config)
    return family.write(config) | {
        "model_type": family.TYPE,
        "architectures": [family.architectures[what]],
        "tie_word_embeddings": config.tied,
        "dtype": "float32",
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
