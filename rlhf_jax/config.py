"""The typed config of a run: one frozen dataclass a section, checked before anything is written."""

import dataclasses
import difflib
import functools
from pathlib import Path

from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.algorithms import preference, supervised
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.models import gpt2


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenizer."""

    kind: str = "gpt2"  # gpt2: from the files in `path`; bpe or char: made from the SFT rows
    path: str = ""
    vocab_size: int = 800  # of bpe


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the finished policies are compared, on held-out prompts."""

    prompts: int = 512  # at most; as many as are held out
    batch: int = 64  # rows on the device at a time
    temperature: float = 0.01
    samples: int = 3  # shown on the way; all go to samples.jsonl at the end


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Each section's defaults are beside the code that reads it."""

    seed: int = 1
    text: Text = Text()
    data: sources.Config = sources.Config()
    model: gpt2.Config = gpt2.Config()
    sft: supervised.Config = supervised.Config()
    reward: preference.Config = preference.Config()
    ppo: ppo_algorithm.Config = ppo_algorithm.Config()
    evaluation: Evaluation = Evaluation()


def parse(tree, kind=Config, path=""):
    """A nested dict (a ConfigDict's) as dataclasses. InputError names an unknown, missing or mistyped field."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            raise InputError(f"{path}{name}: no such field{f'; did you mean {near[0]}?' if near else ''}")
    values = {}
    for name, field in fields.items():
        if name not in tree:
            raise InputError(f"{path}{name}: missing, expected {field.type}")
        value = tree[name]
        if dataclasses.is_dataclass(field.type):
            values[name] = parse(value, field.type, f"{path}{name}.")
            continue
        if field.type is float and type(value) is int:
            value = float(value)
        if type(value) is not field.type:
            raise InputError(f"{path}{name}: expected {field.type.__name__}, got {value!r}")
        values[name] = value
    return kind(**values)


def check(config, *, devices=1):
    """Refuses impossible sizes and choices before anything is written: InputError names the field and says why."""
    data, model, ppo = config.data, config.model, config.ppo

    def expect(fine, field, expected):
        if not fine:
            got = functools.reduce(getattr, field.split("."), config)
            raise InputError(f"{field}: expected {expected}, got {got!r}")

    def one_of(field, *choices):
        expect(functools.reduce(getattr, field.split("."), config) in choices, field, " or ".join(choices))

    files = ("model.init", "text.path", "data.sft", "data.preferences", "data.prompts")
    paths = {field: functools.reduce(getattr, field.split("."), config) for field in files}
    if missing := [f"{field} = {path!r}" for field, path in paths.items() if path and not Path(path).exists()]:
        raise InputError(f"missing files: {', '.join(missing)}; give each as --config.FIELD=PATH")
    one_of("text.kind", "gpt2", "bpe", "char")
    one_of("data.source", "world", "files")
    one_of("model.dtype", "float32", "bfloat16")
    one_of("sft.loss_on", "all", "response")
    one_of("ppo.missing_eos", "replace", "subtract")
    one_of("ppo.value_init", "reward", "zero")
    for field in ("layers", "heads", "head_size", "width"):
        expect(getattr(model, field) > 0, f"model.{field}", "more than 0")
    expect(0 <= config.seed < 2**32, "seed", "0 to 2^32 - 1")
    for field in ("world_sft", "world_preferences", "world_prompts", "world_held_out"):
        expect(getattr(data, field) > 0, f"data.{field}", "at least 1 row")
    expect(0 <= model.dropout < 1, "model.dropout", "0 to less than 1")
    expect(0 < data.held_out < 1, "data.held_out", "a share between 0 and 1")
    expect(data.prompt_length > 0, "data.prompt_length", "more than 0")
    expect(data.response_length > 1, "data.response_length", "at least 2, EOS included")
    longest = data.prompt_length + data.response_length
    expect(model.context >= longest, "model.context", f"at least data.prompt_length + data.response_length = {longest}")
    expect(config.evaluation.prompts > 1, "evaluation.prompts", "at least 2, for an interval")
    expect(config.evaluation.batch > 0, "evaluation.batch", "more than 0")
    expect(config.evaluation.temperature >= 0, "evaluation.temperature", "0 or more")
    for name in ("sft", "reward", "ppo"):
        section = getattr(config, name)
        one_of(f"{name}.schedule", "linear", "cosine", "constant")
        for field in ("steps", "lr", "batch", "microbatches"):
            expect(getattr(section, field) > 0, f"{name}.{field}", "more than 0")
    for field in ("epochs", "minibatches", "temperature", "clip", "value_clip"):
        expect(getattr(ppo, field) > 0, f"ppo.{field}", "more than 0")
    for field in ("gamma", "lam"):
        expect(0 <= getattr(ppo, field) <= 1, f"ppo.{field}", "0 to 1")
    why = "a rollout draws from the distribution that the update differentiates; top-k and top-p are for evaluation"
    expect(ppo.top_k == 0, "ppo.top_k", f"0 in training ({why})")
    expect(ppo.top_p == 1, "ppo.top_p", f"1 in training ({why})")
    for name, slices in (
        ("sft", config.sft.microbatches),
        ("reward", config.reward.microbatches),
        ("ppo", ppo.minibatches * ppo.microbatches),
    ):
        parts = f"minibatches x microbatches x devices = {slices} x {devices}"
        expect(getattr(config, name).batch % (slices * devices) == 0, f"{name}.batch", f"a multiple of {parts}")
