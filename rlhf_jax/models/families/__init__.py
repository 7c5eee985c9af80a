"""The families of models, one file each: a new one is a file and a line of the table below."""

import dataclasses

from rlhf_jax.models.families.family import Family
from rlhf_jax.models.families.gpt2 import GPT2
from rlhf_jax.models.families.llama import Llama
from rlhf_jax.models.families.mistral import Mistral
from rlhf_jax.models.families.neox import NeoX
from rlhf_jax.models.families.qwen2 import Qwen2
from rlhf_jax.models.families.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {family.TYPE: family for family in (GPT2(), NeoX(), Llama(), Mistral(), Qwen2(), Qwen3())}
PRESETS = {name: config for family in FAMILIES.values() for name, config in family.PRESETS.items()}


def preset(name, **changes):
    """The named Config with some fields changed."""
    return dataclasses.replace(PRESETS[name], **changes)


def of(config) -> Family:
    """The family that has a Config or, if none has, the one that refuses the fewest of its fields."""
    return min(FAMILIES.values(), key=lambda family: len(list(family.refuses(config))))
