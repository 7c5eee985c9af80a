"""The typed config of a run: one frozen dataclass a section, checked before anything is written."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax import alarms as limits
from rlhf_jax import fields, hub, jsonfile
from rlhf_jax import hosts as processes
from rlhf_jax.algorithms import ALGORITHMS, POLICY, preference, supervised
from rlhf_jax.data import corpus, sources
from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.models import decoder
from rlhf_jax.models import lora as adapters
from rlhf_jax.report import trackers
from rlhf_jax.rewards import function
from rlhf_jax.tasks import TASKS
from rlhf_jax.training import checkpoint, sharding
from rlhf_jax.training import guard as guards

LEARNED = "learned"  # the reward that is a reward model
REWARD_MODELS = ("reward", "judge")  # stages without a policy
# Fields that say how much is done or kept. Those without effect are noted, not refused: one command line may serve
# several tasks and algorithms.
SIZES = {"steps", "batch", "epochs", "minibatches", "microbatches", "lanes", "widths", "eval_every", "save_every"}
SIZES |= {"made", "cache", *(f"world_{kind}" for kind in ("sft", "preferences", "prompts", "held_out"))}


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenizer."""

    # files: read from `path`; gpt2: the same, its older name; bpe, char: trained on the texts
    kind: str = fields.choice("files", "files", "gpt2", "bpe", "char")
    path: str = fields.path()  # of files: a folder with a tokenizer, or NAME or NAME@REVISION on the hub
    vocab_size: int = fields.number(800, least=1)  # tokens of bpe
    eos: str = ""  # of files: names of the tokens that end a completion, with commas; empty: those that the files name
    pad: str = ""  # of files: name of PAD, which is never EOS; empty: that of the files, or a new token
    # The chat template of rows that are conversations: a file in Jinja; empty: that of the tokenizer's files; none: the
    # contents of the messages, with an empty line between them.
    template: str = fields.path()

    def unused(self):
        """Fields without effect, and why."""
        if not self.of_files:
            yield "path", f"kind is {self.kind}, which is trained on the texts (files are read from a path)"
            for name in ("eos", "pad"):
                yield name, f"kind is {self.kind}, which has its own"
        if self.kind != "bpe":
            yield "vocab_size", f"kind is {self.kind}"

    @property
    def of_files(self):
        """Whether the tokenizer is read from files."""
        return self.kind in ("files", "gpt2")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How policies are compared, on held-out prompts."""

    prompts: int = fields.number(512, least=2)  # at most; all held-out prompts if there are fewer
    batch: int = fields.number(64, least=1, neutral=True)  # rows on the device at a time
    temperature: float = fields.number(0.01, least=0, most=100)  # of sampling; 0: the most likely tokens
    samples: int = fields.number(3, least=0, neutral=True)  # shown during training; samples.jsonl has all of them
    # Completions of each held-out prompt before and after reinforcement learning, at the training temperature, that
    # pass@1, 2, 4, ... are estimated from where answers are right or wrong. 1: no estimate.
    draws: int = fields.number(1, least=1)
    # The result of reinforcement learning: the last policy, or the best evaluated one within the limits of `alarms`.
    # Where prompts differ, half of the held-out ones choose it, and the final numbers are of the other half.
    result: str = fields.choice("last", "last", "best")
    # The number of an evaluation that ranks policies, more is better, as gold or judge; empty: gold where it is known,
    # else the hold-out judge, else the reward
    best_by: str = ""


@dataclasses.dataclass(frozen=True)
class Trace:
    """The arrays of a run, token by token, in WORKDIR/trace (docs/trace.md)."""

    # Iterations between recorded ones; the first and the last are recorded too. 0: nothing is recorded. Stages of
    # fine-tuning and of the reward model record the steps that they evaluate.
    every: int = fields.number(0, least=0, neutral=True)


@dataclasses.dataclass(frozen=True)
class Supervised(supervised.Config):
    """A stage of next-token training. A stage with 0 steps is left out."""

    from_: str = fields.path(neutral=True)  # another workdir whose finished stage is used; config and files must agree


@dataclasses.dataclass(frozen=True)
class Reward(preference.Config):
    """The reward of reinforcement learning, and the training of the reward model where it is learned."""

    # learned | gold: the embedded world's truth | sentiment: VADER's | rouge: ROUGE-L with the row's label | exact,
    # partial: the label itself, or the share of its characters | path/to/file.py:function (rewards/function.py)
    kind: str = fields.path(LEARNED)
    # another workdir whose finished reward model is used; config and files must agree
    from_: str = fields.path(neutral=True)
    # Train a second reward model, which only evaluates (stage `judge`). Half of the prompts' pairs train it, and the
    # other half the reward model, or DPO.
    holdout_judge: bool = False


def _with_algorithms(kind):
    """Gives the class a section for each algorithm, with its name, after the section `reward`."""
    found = {}
    for name, wanted in kind.__annotations__.items():
        found[name] = wanted
        if name == "reward":
            found |= {each: algorithm.Config for each, algorithm in ALGORITHMS.items()}
    for name, algorithm in ALGORITHMS.items():
        setattr(kind, name, algorithm.Config())
    kind.__annotations__ = found
    return kind


@dataclasses.dataclass(frozen=True)
@_with_algorithms
class Config:
    """A run: a task, a reward, an algorithm and a model. A section's defaults stand beside the code that reads it."""

    seed: int = fields.number(1, least=0, below=2**32, most=2**32)  # of weights, samples, and the order of rows
    seeds: int = fields.number(1, least=1)  # runs of the last stage, one after another; curves show the 95% band
    task: str = fields.choice("summarize", *TASKS)  # what is learned on; the section `data` is the task's
    algorithm: str = fields.choice("ppo", *ALGORITHMS)  # the section that the last stage reads
    text: Text = Text()
    data: Any = sources.Config()  # of the task: tasks.TASKS[task].Config
    model: decoder.Config = decoder.Config()
    lora: adapters.Config = adapters.Config()
    mesh: sharding.Config = sharding.Config()
    hosts: processes.Config = processes.Config()
    pretrain: Supervised = Supervised(steps=0)
    sft: Supervised = Supervised()
    reward: Reward = Reward()
    alarms: limits.Config = limits.OFF
    evaluation: Evaluation = Evaluation()
    keep: checkpoint.Config = checkpoint.Config()
    trace: Trace = Trace()
    guard: guards.Config = guards.Config()
    # Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, or several with commas (report/trackers.py).
    log: str = fields.neutral(trackers.DEFAULT)
    # What is done with the checks of each finished stage (docs/evaluate.md). warn: shown; stop: shown, and a failed one
    # ends the run before the next stage; off: not made.
    doctor: str = fields.choice("warn", "warn", "stop", "off", neutral=True)
    deterministic: bool = False  # on a GPU, the same seed gives the same run; some operations are slower

    def problems(self):
        """Checks that no field can make alone."""
        yield from trackers.problems(self.log)

    def unused(self):
        """Fields without effect, and why; a section stands for all of its fields."""
        for name in ALGORITHMS:
            if name != self.algorithm:
                yield name, f"algorithm is {self.algorithm}"
        for name in ("pretrain", "sft"):
            if not getattr(self, name).steps:
                for field in _names(self, name):
                    if field != f"{name}.steps":
                        yield field, f"{name}.steps is 0"
        if not self.sampled:
            for name in ("alarms", "evaluation.result", "evaluation.best_by"):
                yield name, f"algorithm is {self.algorithm}, which learns from pairs"
        if not (self.learned or self.judged):
            for field in _names(self, "reward"):
                if field != "reward.kind":
                    yield field, f"reward is {self.reward.kind}" if self.sampled else f"algorithm is {self.algorithm}"
        if not (self.pretrain.steps or self.sft.steps):
            yield "model.dropout", "pretrain.steps and sft.steps are 0"
        yield from TASKS[self.task].unused(self)

    @property
    def rl(self):
        """The section of the algorithm that was chosen."""
        return getattr(self, self.algorithm)

    @property
    def learned(self):
        """Whether the reward is a reward model."""
        return self.reward.kind == LEARNED and self.sampled

    @property
    def judged(self):
        """Whether a second reward model, which no policy learns from, evaluates the policies."""
        return self.reward.kind == LEARNED and self.reward.holdout_judge

    @property
    def named(self):
        """Whether the reward is a function with a name, which may also only measure."""
        return self.reward.kind != LEARNED

    @property
    def sampled(self):
        """Whether the last stage learns from its own samples, not from preference pairs."""
        return self.algorithm in POLICY


WRITE: dict[str, Any] = {  # defaults of the task `write` where they differ from Config's
    "task": "write",
    "algorithm": "policy_gradient",
    "text": Text(kind="char"),
    "data": corpus.Config(),
    "pretrain": Supervised(),
    "reward": Reward(kind="sentiment"),
    "alarms": limits.Config(),
    "evaluation": Evaluation(temperature=1.0, result="best"),
}


def write(**sections) -> Config:
    """The config of a run whose task is `write`, with these sections instead of its defaults."""
    return Config(**(WRITE | sections))


def policies(**values) -> dict[str, Any]:
    """A section for each policy algorithm with these values: {name: section}. A value counts where a section has it.

    `group` counts where its range allows it: a pair stays a pair.
    """
    found = {}
    for name, algorithm in POLICY.items():
        known = {field.name: field.metadata for field in dataclasses.fields(algorithm.Config)}
        fitting = {key: value for key, value in values.items() if key in known}
        if "group" in fitting and fitting["group"] not in known["group"]["range"]:
            del fitting["group"]
        found[name] = algorithm.Config(**fitting)
    return found


def tree(config) -> dict:
    """The config as nested dicts: what a config file's get_config returns, and `parse` reads."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name.rstrip("_"): tree(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()
    }


def parse(values: Mapping, kind: type = Config, path: str = "") -> Any:
    """Nested dicts (a ConfigDict's) as dataclasses, with ~ in paths as the home folder.

    InputError names an unknown, missing or mistyped field.
    """
    known = {field.name.rstrip("_"): field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{path}{short(name)}: no such field{f'; did you mean {near[0]}?' if near else ''}")
    parsed: dict[str, Any] = {}
    for name, field in known.items():
        if name not in values:
            raise InputError(f"{path}{name}: missing, expected {getattr(field.type, '__name__', field.type)}")
        value = values[name]
        wanted: Any = field.type
        if kind is Config and name == "data":
            wanted = TASKS[values["task"]].Config if values.get("task") in TASKS else sources.Config
        if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
            if wanted is Reward and isinstance(value, str):
                parsed[field.name] = fields.expanded(Reward(kind=value))
                continue
            if not isinstance(value, Mapping):
                raise InputError(f"{path}{name}: expected a section of fields, got {short(repr(value))}")
            parsed[field.name] = parse(value, wanted, f"{path}{name}.")
            continue
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise InputError(f"{path}{name}: expected {wanted.__name__}, got {short(repr(value))}")
        parsed[field.name] = value
    return fields.expanded(kind(**parsed))


def stages(config) -> list[str]:
    """The names of the stages of a run, in their order."""
    before = [name for name in ("pretrain", "sft") if getattr(config, name).steps]
    models = [name for name, made in zip(REWARD_MODELS, (config.learned, config.judged), strict=True) if made]
    return [*before, *models, rl_name(config)]


def rl_name(config) -> str:
    """The name of the last stage: the algorithm's, so that a workdir can hold several; `rl` for the task `write`."""
    return "rl" if config.task == "write" else config.algorithm


def _names(config, section) -> list[str]:
    """The names of the fields of a section, as `getattr` finds them."""
    return [f"{section}.{field.name}" for field in dataclasses.fields(getattr(config, section))]


def section(config, stage) -> str:
    """The name of the stage's own section of the config."""
    return config.algorithm if stage == rl_name(config) else "reward" if stage in REWARD_MODELS else stage


def place(config, workdir, stage) -> Path:
    """The folder of the run that a stage is in: `workdir`, or that of the stage's `from`."""
    other = getattr(getattr(config, section(config, stage)), "from_", "")
    return Path(other or workdir).expanduser()


def sections(config, stage) -> list[str]:
    """The names of the sections and fields of the config that a stage's numbers depend on."""
    names = stages(config)
    before = names[: names.index(stage) + 1]
    found = ["seed", "task", "text", "data", "model", "lora", "evaluation"]
    found += dict.fromkeys(section(config, name) for name in before if name != rl_name(config))
    if stage == names[-1]:
        found += ["algorithm", config.algorithm, "alarms", "seeds"]
    return found


def read(workdir) -> Config:
    """The config of the run in a folder. InputError where there is none, or one of another version.

    Its mesh and its hosts are the default: the devices of this machine need not be those that trained the run.
    """
    path = Path(workdir).expanduser() / "config.json"
    again = "; the command that trains the run writes it again"
    try:
        values = jsonfile.read(path, "the config of a run", again)
    except InputError as error:
        raise InputError(f"workdir: {error}") from None
    try:
        config = parse(_completed(values))
        fields.check(config)
    except InputError as error:
        raise InputError(f"workdir: {path}: {error}{again}") from None
    return dataclasses.replace(config, mesh=sharding.Config(), hosts=processes.Config())


def _completed(values: Any, kind: type = Config) -> Any:
    """The values with the default of each field that they lack: it did not exist when the run was made."""
    if not isinstance(values, Mapping):
        return values
    whole = dict(values)
    for field in dataclasses.fields(kind):
        name, default = field.name.rstrip("_"), getattr(kind(), field.name)
        if kind is Config and name in ("seed", "task", "data", "model") and name not in whole:
            return values  # no config of a run
        if dataclasses.is_dataclass(default) and name in whole:
            task = whole["task"] if name == "data" else None
            section = TASKS[task].Config if isinstance(task, str) and task in TASKS else type(default)
            whole[name] = _completed(whole[name], section)
        elif name not in whole:
            whole[name] = tree(default) if dataclasses.is_dataclass(default) else default
    return whole


def check(config, *, devices: int = 1, files: bool = True) -> None:
    """Refuses impossible sizes and choices before anything is written: InputError names the field and the reason.

    files: whether the files that the config names must exist.
    """
    fields.check(config)
    TASKS[config.task].make(config)  # its own InputError names what it cannot be made of
    if files:
        _check_files(config)
    config.mesh.shape(devices)  # its own InputError names what the devices cannot be
    for problem in (_reward, _lengths, _mesh, _batches, _adapters):
        for name, expected in problem(config, devices):
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            raise InputError(f"{name}: expected {expected}, got {value!r}")


def check_given(config, given=None) -> list[str]:
    """Refuses a field that is given and has no effect with the values of the others: InputError says why.

    given: the names of the fields that a user gave as flags; the others are those of the config file, where fields
    without effect may stand. Without it, only fields that name a file or a place count. Returns notes for the user.
    """
    reasons = fields.unused(config)
    notes: dict[str, list[str]] = {}
    for name, field, value in fields.leaves(config):
        if name not in reasons or value == "" or not (field.metadata.get("path") if given is None else name in given):
            continue
        if name.split(".")[-1] not in SIZES:
            raise InputError(f"{name}: {value!r} has no effect, as {reasons[name]}")
        notes.setdefault(reasons[name], []).append(name)
    ignored = [f"without effect, as {reason}: {', '.join(names)}" for reason, names in notes.items()]
    return ignored + _warmups(config, given or ())


def _warmups(config, given):
    """Refuses a warm-up that is given and longer than its stage; a note where it is the config file's own."""
    longer = []
    for stage in stages(config):
        name = section(config, stage)
        part = getattr(config, name)
        updates = getattr(part, "updates", part.steps)  # optimizer steps
        if part.warmup > updates and f"{name}.warmup" in given:
            steps = f"{name}.steps{' x epochs x minibatches' if hasattr(part, 'epochs') else ''} = {updates}"
            raise InputError(f"{name}.warmup: expected at most {steps}, got {part.warmup}")
        if part.warmup > updates:
            longer.append(f"{name}.warmup = {part.warmup} (of {updates})")
    return [f"the learning rate is not reached, as the warm-up has more steps: {', '.join(longer)}"] * bool(longer)


def _check_files(config):
    named = {"model.init": config.model.init, "text.path": config.text.path}
    # A path that does not exist may be a name on the hub, unless it ends like a file.
    paths = {
        field: path
        for field, path in named.items()
        if not hub.is_name(path) or Path(path).suffix in (".safetensors", ".json")
    }
    local = getattr(config.data, "source", "") != "hub"  # a file that is named but not read is as likely a mistake
    names = [name for name in ("path", "sft", "preferences", "prompts") if local and hasattr(config.data, name)]
    paths |= {f"data.{name}": getattr(config.data, name) for name in names}
    if config.text.template != "none":
        paths["text.template"] = config.text.template
    if missing := [f"{field} = {path!r}" for field, path in paths.items() if path and not _exists(path)]:
        raise InputError(f"missing files: {listed(missing)}; give each as --config.FIELD=PATH")
    for field, path in (named | paths).items():
        if path and _exists(path) and not Path(path).is_file() and not Path(path).is_dir():
            raise InputError(f"{field}: {path}: expected a file or a folder, got a pipe or a device")


def _exists(path):
    try:
        return Path(path).exists()
    except OSError:  # too long for a path, or in a folder that may not be read
        return False


def _reward(config, _):
    """Problems with the choice of stages and reward, and with what the algorithm needs of the reward."""
    if config.pretrain.steps and config.task != "write":
        yield "pretrain.steps", "0, as only task = write has plain texts to pretrain on"
    if (config.learned or config.judged) and not config.reward.steps:
        yield "reward.steps", f"more than 0 where {'the reward' if config.learned else 'a hold-out judge'} is learned"
    if config.reward.kind == "gold" and getattr(config.data, "source", "") != "world":
        others = ", ".join(name for name in function.NAMED if name != "gold")
        expected = f"learned, {others} or path/to/file.py:function where no row has a record (data.source)"
        yield "reward.kind", expected
    elif config.named:
        reward = function.load(config.reward.kind)  # its own InputError names what is wrong
        if reward.takes_rows and config.task == "write":
            yield "reward.kind", "a function of texts alone where task is write, whose rows hold nothing"
    if config.alarms.over_optimization and not config.judged and getattr(config.data, "source", "") != "world":
        yield "alarms.over_optimization", "0 where there is neither gold (data.source) nor reward.holdout_judge"
    if config.algorithm == "ppo" and config.ppo.value_init == "reward" and not config.learned:
        yield "ppo.value_init", f"zero or auto where reward is {config.reward.kind}, as there is no reward model"


def _lengths(config, _):
    data, model = config.data, config.model
    if config.task == "write":
        if model.context < data.length:
            yield "model.context", f"at least data.length = {data.length}"
        if getattr(config.rl, "lanes", 0):
            yield f"{config.algorithm}.lanes", "0 (samples start from nothing, and all at once)"
        if getattr(config.rl, "widths", 1) != 1:
            yield f"{config.algorithm}.widths", "1 (samples start from nothing, there is no padding)"
        return
    for name in ("response_length", "pair_length"):
        longest = data.prompt_length + getattr(data, name)
        if model.context < longest:
            yield "model.context", f"at least data.prompt_length + data.{name} = {longest}"
    if getattr(config.rl, "widths", 1) > data.prompt_length:
        yield f"{config.algorithm}.widths", f"at most data.prompt_length = {data.prompt_length}"


def _adapters(config, _):
    if config.lora.rank and not config.model.init:
        yield "lora.rank", "0 where model.init is empty, as adapters stand on a pretrained base"
    if config.lora.rank > config.model.width:
        yield "lora.rank", f"at most model.width = {config.model.width}"


def _mesh(config, _):
    for name, heads in (("heads", config.model.heads), ("kv_heads", config.model.cached_heads)):
        if heads % config.mesh.tensor:
            yield "mesh.tensor", f"a divisor of model.{name} = {heads}"
    if config.model.fuses and config.mesh.tensor > 1:
        yield "mesh.tensor", "1 where model.fused is true"


def _batches(config, devices):
    data, fsdp, _ = config.mesh.shape(devices)
    shards = data * fsdp
    for stage in stages(config):
        name = section(config, stage)
        part = getattr(config, name)
        minibatches = getattr(part, "minibatches", 1)
        slices = minibatches * part.microbatches
        if part.batch % (slices * shards):
            parts = f"minibatches x microbatches x data x fsdp = {slices} x {data} x {fsdp}"
            yield f"{name}.batch", f"a multiple of {parts}"
    lanes, batch = getattr(config.rl, "lanes", 0), config.rl.batch
    if lanes and (batch % lanes or lanes % shards):
        multiple = f"a multiple of data x fsdp = {data} x {fsdp}"
        yield f"{config.algorithm}.lanes", f"0, or a divisor of {config.algorithm}.batch = {batch} and {multiple}"
    group = getattr(config.rl, "group", 1)  # a device reads a prompt once for its completions
    for name, rows in (("batch", batch), ("lanes", lanes)):
        if rows % (group * shards):
            yield f"{config.algorithm}.{name}", f"a multiple of group x data x fsdp = {group} x {data} x {fsdp}"
