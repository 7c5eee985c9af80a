"""The typed config of a run: one frozen dataclass a section, checked before anything is written."""

import dataclasses
import difflib
import functools
from pathlib import Path

from rlhf_jax import alarms as collapse
from rlhf_jax import hub
from rlhf_jax.algorithms import policy_gradient as pg_algorithm
from rlhf_jax.algorithms import ppo as ppo_algorithm
from rlhf_jax.algorithms import preference, supervised
from rlhf_jax.data import corpus, sources
from rlhf_jax.errors import InputError
from rlhf_jax.fields import choice, number
from rlhf_jax.models import gpt2
from rlhf_jax.training import checkpoint
from rlhf_jax.training import guard as guards


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenizer."""

    kind: str = choice("gpt2", "gpt2", "bpe", "char")  # gpt2: byte-level BPE in `path`; bpe, char: from the texts
    path: str = ""  # a folder with tokenizer.json or the like, or NAME or NAME@REVISION on the hub: gpt2
    vocab_size: int = number(800, least=1)  # tokens, of bpe


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How policies are evaluated on held-out prompts, during training and at the end."""

    prompts: int = number(512, least=2)  # at most, where fewer are held out; an interval needs 2
    batch: int = number(64, least=1, neutral=True)  # rows on the devices at once
    temperature: float = number(0.01, least=0, most=100)  # of sampling; 0: the most likely token
    samples: int = number(3, least=0, neutral=True)  # printed at each evaluation; samples.jsonl has all at the end


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of the main job, summarization. Each section's defaults are beside the code that reads it."""

    seed: int = 1
    text: Text = Text()
    data: sources.Config = sources.Config()
    model: gpt2.Config = gpt2.Config()
    sft: supervised.Config = supervised.Config()
    reward: preference.Config = preference.Config()
    ppo: ppo_algorithm.Config = ppo_algorithm.Config()
    evaluation: Evaluation = Evaluation()
    keep: checkpoint.Config = checkpoint.Config()
    guard: guards.Config = guards.Config()
    deterministic: bool = False  # on a GPU: the same seed gives the same run, some operations are slower


@dataclasses.dataclass(frozen=True)
class Writing:
    """A run on plain texts and a reward that anyone can compute: pretraining, fine-tuning, reinforcement learning."""

    seed: int = 1
    seeds: int = 1  # runs of the last stage, all at once
    algorithm: str = "policy_gradient"  # or ppo: the section that the last stage reads
    reward: str = "sentiment"  # or path/to/file.py:function, of a list of texts; see rewards/function.py
    text: Text = Text(kind="char")
    data: corpus.Config = corpus.Config()
    model: gpt2.Config = gpt2.Config()
    pretrain: supervised.Config = supervised.Config()
    sft: supervised.Config = supervised.Config()
    policy_gradient: pg_algorithm.Config = pg_algorithm.Config()
    ppo: ppo_algorithm.Config = ppo_algorithm.Config()
    alarms: collapse.Config = collapse.Config()
    evaluation: Evaluation = Evaluation()
    keep: checkpoint.Config = checkpoint.Config()
    guard: guards.Config = guards.Config()
    deterministic: bool = False  # on a GPU: the same seed gives the same run, some operations are slower

    @property
    def rl(self):
        """The section of the algorithm that was chosen."""
        return getattr(self, self.algorithm)


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


def check(config, *, devices=1, files=True):
    """Refuses impossible sizes and choices before anything is written: InputError names the field and says why.

    files: those that it names must be there.
    """
    _Checks(config, devices).run(files)


class _Checks:
    """The checks of one config, by what they are about."""

    def __init__(self, config, devices):
        self.config, self.devices = config, devices

    def run(self, files):
        """All that concern this kind of config."""
        if files:
            self.files()
        self.common()
        if isinstance(self.config, Writing):
            self.writing()
        else:
            self.summarization()

    def get(self, field):
        return functools.reduce(getattr, field.split("."), self.config)

    def expect(self, fine, field, expected):
        if not fine:
            raise InputError(f"{field}: expected {expected}, got {self.get(field)!r}")

    def one_of(self, field, *choices):
        self.expect(self.get(field) in choices, field, " or ".join(choices))

    def files(self):
        writing = isinstance(self.config, Writing)
        files = ("data.path",) if writing else ("data.sft", "data.preferences", "data.prompts")
        paths = {field: self.get(field) for field in ("model.init", "text.path", *files)}
        # What is not here may be on the hub, but for what has the name of a file.
        for field in ("model.init", "text.path"):
            if hub.is_name(paths[field]) and Path(paths[field]).suffix not in (".safetensors", ".json"):
                del paths[field]
        if self.config.data.source == "hub":
            paths = {field: path for field, path in paths.items() if field not in files}
        if missing := [f"{field} = {path!r}" for field, path in paths.items() if path and not Path(path).exists()]:
            raise InputError(f"missing files: {', '.join(missing)}; give each as --config.FIELD=PATH")

    def common(self):
        config, model = self.config, self.config.model
        self.one_of("text.kind", "gpt2", "bpe", "char")
        self.one_of("model.dtype", "float32", "bfloat16")
        for field in ("layers", "heads", "head_size", "width"):
            self.expect(getattr(model, field) > 0, f"model.{field}", "more than 0")
        share = model.rotary_share
        fine = share == 0 or (0 < share <= 1 and int(model.head_size * share) in range(2, model.head_size + 1, 2))
        self.expect(fine, "model.rotary_share", "0, or a share of model.head_size that is an even number of entries")
        for field in ("rotary_base", "norm_eps"):
            self.expect(getattr(model, field) > 0, f"model.{field}", "more than 0")
        self.expect(0 <= config.seed < 2**32, "seed", "0 to 2^32 - 1")
        self.expect(0 <= model.dropout < 1, "model.dropout", "0 to less than 1")
        self.expect(0 < config.data.held_out < 1, "data.held_out", "a share between 0 and 1")
        self.expect(config.evaluation.prompts > 1, "evaluation.prompts", "at least 2, for an interval")
        self.expect(config.evaluation.batch > 0, "evaluation.batch", "more than 0")
        self.expect(config.evaluation.temperature >= 0, "evaluation.temperature", "0 or more")
        self.expect(config.keep.last > 0, "keep.last", "at least 1 checkpoint, to go on from")
        self.expect(config.keep.best >= 0, "keep.best", "0 or more checkpoints")
        self.one_of("guard.action", "stop", "skip")
        self.expect(config.guard.limit >= 0, "guard.limit", "0 or more updates")
        self.ppo()

    def summarization(self):
        data, model = self.config.data, self.config.model
        self.one_of("data.source", "world", "files", "hub")
        self.expect(bool(data.split), "data.split", "the name of one")
        for field in ("world_sft", "world_preferences", "world_prompts", "world_held_out"):
            self.expect(getattr(data, field) > 0, f"data.{field}", "at least 1 row")
        self.expect(data.prompt_length > 0, "data.prompt_length", "more than 0")
        self.expect(data.response_length > 1, "data.response_length", "at least 2, EOS included")
        self.expect(data.pair_length == 0 or data.pair_length > 1, "data.pair_length", "0, or at least 2, EOS included")
        for name in ("response_length", "pair_length"):
            longest = data.prompt_length + getattr(data, name)
            expected = f"at least data.prompt_length + data.{name} = {longest}"
            self.expect(model.context >= longest, "model.context", expected)
        for name in ("sft", "reward", "ppo"):
            self.stage(name)
        lanes, batch = self.config.ppo.lanes, self.config.ppo.batch
        fine = lanes >= 0 and (not lanes or (batch % lanes == 0 and lanes % self.devices == 0))
        expected = f"0, or a divisor of ppo.batch = {batch} and a multiple of the devices = {self.devices}"
        self.expect(fine, "ppo.lanes", expected)
        widest = self.config.data.prompt_length
        self.expect(0 < self.config.ppo.widths <= widest, "ppo.widths", f"1 to data.prompt_length = {widest}")

    def writing(self):
        config, data = self.config, self.config.data
        self.one_of("algorithm", "policy_gradient", "ppo")
        self.one_of("data.kind", *corpus.KINDS)
        self.one_of("data.source", "made", "file", "hub")
        self.one_of("data.sentiment", *corpus.tweets.SENTIMENTS)
        self.expect(bool(data.split), "data.split", "the name of one")
        self.expect(data.source != "file" or data.path, "data.path", "a file where data.source is file")
        self.expect(data.source != "made" or not data.path, "data.path", "none where data.source is made")
        self.expect(data.made > 1, "data.made", "at least 2 texts")
        self.expect(data.length > 2, "data.length", "at least 3 tokens")
        self.expect(config.model.context >= data.length, "model.context", f"at least data.length = {data.length}")
        self.expect(config.seeds > 0, "seeds", "at least 1")
        self.one_of("policy_gradient.baseline", "none", "mean", "leave_one_out")
        for field in ("distinct2", "repeat_rate", "entropy", "length"):
            self.expect(0 <= getattr(config.alarms, field) <= 1, f"alarms.{field}", "0 to 1")
        self.expect(config.alarms.patience > 0, "alarms.patience", "at least 1 iteration")
        self.expect(config.ppo.lanes == 0, "ppo.lanes", "0 (samples start from nothing, and all at once)")
        self.expect(config.ppo.widths == 1, "ppo.widths", "1 (samples start from nothing, there is no padding)")
        self.update("policy_gradient")
        for name in ("pretrain", "sft", "policy_gradient", "ppo"):
            self.stage(name)

    def stage(self, name):
        """A section with an optimizer and a batch."""
        section = self.get(name)
        self.one_of(f"{name}.schedule", "linear", "cosine", "constant")
        for field in ("steps", "lr", "batch", "microbatches"):
            self.expect(getattr(section, field) > 0, f"{name}.{field}", "more than 0")
        if isinstance(section, supervised.Config):
            self.one_of(f"{name}.loss_on", "all", "response")
        minibatches = getattr(section, "minibatches", 1)
        self.expect(minibatches > 0, f"{name}.minibatches", "more than 0")
        slices = minibatches * section.microbatches
        parts = f"minibatches x microbatches x devices = {slices} x {self.devices}"
        self.expect(section.batch % (slices * self.devices) == 0, f"{name}.batch", f"a multiple of {parts}")

    def update(self, name):
        """A section of reinforcement learning."""
        section = self.get(name)
        for field in ("epochs", "temperature"):
            self.expect(getattr(section, field) > 0, f"{name}.{field}", "more than 0")
        self.expect(0 <= section.gamma <= 1, f"{name}.gamma", "0 to 1")
        why = "a rollout draws from the distribution that the update differentiates; top-k and top-p are for evaluation"
        self.expect(section.top_k == 0, f"{name}.top_k", f"0 in training ({why})")
        self.expect(section.top_p == 1, f"{name}.top_p", f"1 in training ({why})")

    def ppo(self):
        self.update("ppo")
        self.one_of("ppo.missing_eos", "replace", "subtract")
        self.one_of("ppo.value_init", "reward", "zero")
        for field in ("clip", "value_clip"):
            self.expect(getattr(self.config.ppo, field) > 0, f"ppo.{field}", "more than 0")
        self.expect(0 <= self.config.ppo.lam <= 1, "ppo.lam", "0 to 1")
