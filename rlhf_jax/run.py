"""A run: a config and a workdir, and the data, tokenizer and model they stand for, each made when first asked for."""

import dataclasses
import fcntl
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import generate, hub, rollout, text
from rlhf_jax.data import batches, corpus, sources
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, hf
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent
from rlhf_jax.rewards import function, gold
from rlhf_jax.text import bpe, char, gpt2
from rlhf_jax.training import sharding
from rlhf_jax.training.checkpoint import Checkpoints

PURPOSES = ("sft", "reward", "ppo", "policy init", "reward head", "evaluation", "pretrain", "rl")
# Append only: the place is the key.
MAY_CHANGE = ("steps", "eval_every", "save_every")  # of a stage's own section, from one start to the next


class Run:
    """What the stages share. A stage's folder is its proof: config.json says what it was asked, result/ holds what
    it is for, checkpoints/ what it goes on from, and summary.json, written last, says that it is finished.

    Raises InputError, before anything is written, for an impossible config or a workdir of another config; once it
    writes, for a workdir that another process writes to. `stop` is a loop.Stop for all of the run, where there is one.
    """

    STAGES = {}  # in their order, with the sections of the config that a stage's result depends on
    KINDS = {}  # which arrays a stage trains on
    jit = staticmethod(jax.jit)  # replay.py takes another, to look at every operation

    def __init__(self, config, workdir, reporter=None, stop=None):
        self.config = config
        self.workdir = Path(workdir).absolute()
        self.reporter = reporter or Silent()
        self.stop = stop
        self._lock_file = None
        self.mesh = sharding.mesh()
        configs.check(config, devices=self.mesh.size)
        for stage in self.STAGES:
            self._check_folder(stage)

    def _asked(self, stage):
        """What config.json of the stage's folder holds."""
        asked = dataclasses.asdict(self.config)
        return {section: asked[section] for section in self.STAGES[stage]}

    def _check_folder(self, stage):
        path = self.workdir / stage / "config.json"
        if not path.exists():
            return
        try:
            there, here = _flat(json.loads(path.read_text())), _flat(self._asked(stage))
        except ValueError as error:
            raise InputError(f"workdir: {path}: expected the config of the stage ({error})") from error
        free = {f"{self.section_name(stage)}.{field}" for field in MAY_CHANGE}
        for name in sorted((there | here).keys() - free):
            if there.get(name) != here.get(name):
                raise InputError(
                    f"workdir: {path} was made with {name} = {there.get(name)!r}, not {here.get(name)!r}; "
                    "choose another --workdir"
                )

    def section_name(self, stage):
        """The name of the section of the config that is the stage's own."""
        return stage

    def section(self, stage):
        """The section of the config that is the stage's own."""
        return getattr(self.config, self.section_name(stage))

    def open(self, stage):
        """The stage's folder, with its config in it and the whole config beside it; no other process may write now."""
        folder = self.workdir / stage
        try:
            (folder / "plots").mkdir(parents=True, exist_ok=True)
            self._lock()
            metrics.summarize(self.workdir / "config.json", dataclasses.asdict(self.config))
            metrics.summarize(folder / "config.json", self._asked(stage))
        except OSError as error:
            raise InputError(f"workdir: cannot write {folder} ({error.strerror})") from error
        return folder

    def _lock(self):
        """Locks the workdir until the process ends, however it ends."""
        if self._lock_file:
            return
        path = self.workdir / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            told = f"{self.workdir} is in use by process {path.read_text() or 'unknown'}"
            raise InputError(f"workdir: {told}; choose another --workdir") from None
        self._lock_file = file  # stays open: closing it would give up the lock
        os.truncate(path, 0)
        os.write(file, str(os.getpid()).encode())

    def finished(self, stage):
        """True where all the steps that are asked for are done."""
        path = self.workdir / stage / "summary.json"
        return path.exists() and self.summary(stage).get(f"{stage}/steps") == self.section(stage).steps

    def summary(self, stage):
        """The finished stage's summary.json."""
        return json.loads((self.workdir / stage / "summary.json").read_text())

    def parameters(self, stage, field, like):
        """A parameter tree of the finished stage, shaped like `like`."""
        if not self.finished(stage):
            raise InputError(f"workdir: expected a finished {stage} stage in {self.workdir / stage}; run it first")
        with Checkpoints(self.workdir / stage / "result") as checkpoints:
            return checkpoints.restore({field: like}).tree[field]

    @functools.cached_property
    def tokenizer(self):
        """The workdir's tokenizer; made from the config, and kept, the first time."""
        folder = self.workdir / "text"
        if folder.exists() and any((self.workdir / stage / "config.json").exists() for stage in self.STAGES):
            return text.load(folder)  # of this config: the stages' were compared with it
        config = self.config.text
        if config.kind == "gpt2":
            if not config.path:
                raise InputError("text.path: expected a folder or a name on the hub, as gpt2, got none")
            try:
                tokenizer = gpt2.from_files(hub.folder(config.path, *gpt2.FILES))
            except InputError as error:
                raise InputError(f"text.path: {error}") from None
        else:
            try:
                texts = self.texts()
                tokenizer = bpe.train(texts, config.vocab_size) if config.kind == "bpe" else char.train(texts)
            except InputError as error:
                raise InputError(f"text.{error}") from None
        try:
            tokenizer.save(folder)
        except OSError as error:
            raise InputError(f"workdir: cannot write {folder} ({error.strerror})") from error
        return tokenizer

    @functools.cached_property
    def apply(self):
        """The model's functions."""
        config, ids = self.config.model, self.tokenizer.vocab_size
        if config.vocab_size and not ids <= config.vocab_size < ids + 256:
            expected = f"0 or, for this tokenizer, {ids} to {ids + 255}"
            raise InputError(f"model.vocab_size: expected {expected}, got {config.vocab_size}")
        config = dataclasses.replace(config, vocab_size=config.vocab_size or ids)
        return rollout.Apply(heads.LanguageModel(config), heads.ScalarModel(config))

    @functools.cache  # noqa: B019
    def weights(self):
        """The file or folder that model.init stands for, downloaded where it is a name on the hub; None: random."""
        init = self.config.model.init
        if not init:
            return None
        try:
            return Path(init) if Path(init).exists() else hub.folder(init, *hf.FILES)
        except InputError as error:
            raise InputError(f"model.init: {error}") from None

    def policy_init(self):
        """The policy before fine-tuning: random, or the Hugging Face weights of model.init."""
        model = self.apply.policy
        if self.weights() is None:
            return jax.jit(model.init)(self.key("policy init"))
        try:
            return hf.load(self.weights(), model.config)
        except InputError as error:
            raise InputError(f"model.init: {error}") from None

    def sampling(self, temperature, **changes):
        """How responses are drawn: a generate.Sampling, with `changes` of its other fields."""
        return generate.Sampling(
            max_tokens=self.config.data.response_length,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
            temperature=temperature,
            **changes,
        )

    def key(self, purpose):
        """The random key of one of PURPOSES."""
        return jax.random.fold_in(jax.random.key(self.config.seed), PURPOSES.index(purpose))

    def decode(self, response_BR, mask_BR):
        """Responses as texts, without the space they begin with."""
        return text.responses(self.tokenizer, response_BR, mask_BR)

    def over(self, arrays, function, rows=None):
        """function(batch) over the first `rows` rows (default: all), a device batch at a time: NumPy results by row.

        The last batch is filled up from the first rows, and what that adds is cut off: every batch has one shape.
        """
        total = rows or len(arrays["index_N"])
        size = min(self.config.evaluation.batch, total)
        size += -size % self.mesh.size
        parts = []
        for start in range(0, total, size):
            batch = batches.take(arrays, np.arange(start, start + size) % total)
            parts.append(sharding.gather(function(sharding.shard(batch, self.mesh))))
        return jax.tree.map(lambda *x: np.concatenate(x)[:total], *parts)


class Summarization(Run):
    """Posts and their summaries: fine-tuning, a reward model from preferences, PPO."""

    CONFIG = configs.Config
    STAGES = {
        "sft": ("seed", "text", "data", "model", "evaluation", "sft"),
        "reward": ("seed", "text", "data", "model", "evaluation", "sft", "reward"),
        "ppo": ("seed", "text", "data", "model", "evaluation", "sft", "reward", "ppo"),
    }
    KINDS = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}

    def texts(self):
        """What a tokenizer is trained on."""
        return [f"{row['prompt']} {row['label']}" for row in self.rows("sft")[0]]

    @functools.cache  # noqa: B019 (a run lives as long as the program)
    def rows(self, kind):
        """(train, held-out) rows of a kind: sft, preferences or prompts."""
        sides, skipped = sources.load(kind, self.config.data, self.config.seed)
        if skipped:
            self.reporter.note(f"data.{kind}: {len(skipped)} rows skipped; the first: {skipped[0]}")
        return sides

    @functools.cache  # noqa: B019
    def arrays(self, kind):
        """(train, held-out) arrays, as data/batches.py makes them. What had to be cut or skipped is said."""
        data = self.config.data
        encode, lengths = {
            "sft": (batches.encode_sft, {"response_length": data.response_length}),
            "preferences": (batches.encode_pairs, {"response_length": data.pair_length or data.response_length}),
            "prompts": (batches.encode_prompts, {}),
        }[kind]
        sides = []
        for side, rows in zip(("train", "held out"), self.rows(kind), strict=True):
            source = f"data.{kind}, {side}"
            arrays, counts = encode(rows, self.tokenizer, prompt_length=data.prompt_length, source=source, **lengths)
            told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count)
            self.reporter.note(f"{source}: {told}")
            sides.append(arrays)
        return tuple(sides)

    def asked(self, kind):
        """The held-out rows that policies are compared on, in the order of the held-out arrays."""
        index_N = self.arrays(kind)[1]["index_N"]
        return [self.rows(kind)[1][i] for i in index_N[: self.config.evaluation.prompts]]

    def questions(self):
        """(arrays, rows) that the fine-tuned policy is sampled on."""
        return self.arrays("sft")[1], self.asked("sft")

    def judge(self, rows, texts):
        """{"gold": the true reward of each text}; nothing where the rows have no record, as those of files."""
        if "record" not in rows[0]:
            return {}
        return {"gold": np.array([gold.score(row["record"], text) for row, text in zip(rows, texts, strict=True)])}


class Writing(Run):
    """Texts and a reward that anyone can compute: pretraining, fine-tuning, reinforcement learning."""

    CONFIG = configs.Writing
    STAGES = {
        "pretrain": ("seed", "text", "data", "model", "evaluation", "reward", "pretrain"),
        "sft": ("seed", "text", "data", "model", "evaluation", "reward", "pretrain", "sft"),
    }
    STAGES["rl"] = (*STAGES["sft"], "seeds", "algorithm", "policy_gradient", "ppo", "alarms")
    KINDS = {"pretrain": "pretrain", "sft": "sft", "rl": "prompts"}

    def __init__(self, config, workdir, reporter=None, stop=None):
        super().__init__(config, workdir, reporter, stop)
        self.reward = function.load(config.reward)

    def section_name(self, stage):
        """The last stage's is that of its algorithm."""
        return self.config.algorithm if stage == "rl" else stage

    def texts(self):
        """What a tokenizer is trained on."""
        return [row["text"] for row in self.rows("pretrain")[0]]

    @functools.cache  # noqa: B019
    def rows(self, kind):
        """(train, held-out) rows of a kind: pretrain, all texts; sft, the happy ones among them."""
        data = self.config.data
        if kind == "pretrain":
            sides, skipped = corpus.load(data, self.config.seed)
            if skipped:
                self.reporter.note(f"data: {len(skipped)} rows skipped; the first: {skipped[0]}")
            return sides
        if data.kind == "tweets":
            sides = [[row for row in rows if row["sentiment"] == data.sentiment] for rows in self.rows("pretrain")]
            why = f"data.sentiment: expected texts labelled {data.sentiment!r}"
        else:
            sides = [self._happy(rows) for rows in self.rows("pretrain")]
            why = f"data.min_reward: expected texts with a reward above {data.min_reward}"
        if not all(sides):
            raise InputError(f"{why} on both sides of data.held_out, got {len(sides[0])} and {len(sides[1])}")
        return tuple(sides)

    def _happy(self, rows):
        rewards_N, _ = self.reward([row["text"] for row in rows])
        return [row for row, reward in zip(rows, rewards_N, strict=True) if reward > self.config.data.min_reward]

    @functools.cache  # noqa: B019
    def arrays(self, kind):
        """(train, held-out) arrays, as data/corpus.py makes them."""
        config = self.config
        if kind == "prompts":
            counts = (config.rl.batch, config.evaluation.prompts)
            return tuple(corpus.starts(count, self.tokenizer) for count in counts)
        make = {"pretrain": corpus.windows, "sft": corpus.openings}[kind]
        sides = tuple(make(rows, self.tokenizer, config.data.length) for rows in self.rows(kind))
        for side, rows, arrays in zip(("train", "held out"), self.rows(kind), sides, strict=True):
            self.reporter.note(f"{kind}, {side}: {len(rows)} texts, {len(arrays['index_N'])} rows")
        return sides

    def asked(self, kind):
        """The rows that policies are compared on: every sample starts from nothing."""
        return [{"prompt": ""} for _ in range(self.config.evaluation.prompts)]

    def questions(self):
        """(arrays, rows) that a policy is sampled on."""
        return self.arrays("prompts")[1], self.asked("prompts")

    def judge(self, rows, texts):
        """{"reward": [N]} of the texts, and its components where it has several."""
        rewards_N, parts = self.reward(texts)
        return {"reward": rewards_N} | {f"reward_{name}": values_N for name, values_N in parts.items()}


def _flat(tree, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
