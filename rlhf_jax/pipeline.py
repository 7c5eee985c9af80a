"""Makes the values of a config and trains its stages in order. No combination of task and algorithm has code here."""

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import config as configs
from rlhf_jax import fields, hosts, hub, out_of_memory, provenance, rollout, tasks, text
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.commands import doctor, report
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import seeds
from rlhf_jax.models import heads, hf, lora
from rlhf_jax.report import metrics, plots
from rlhf_jax.report.console import Silent
from rlhf_jax.rewards import Reward, function, learned, rouge
from rlhf_jax.stages import Setup
from rlhf_jax.stages.language_model import language_model
from rlhf_jax.stages.preference import check_references, dpo, half, reward_model
from rlhf_jax.stages.rl import rl
from rlhf_jax.text import bpe, char, files
from rlhf_jax.training import sharding
from rlhf_jax.training.fit import fit, write_summary
from rlhf_jax.training.workdir import Workdir, flat
from rlhf_jax.viz import recorder

PADDING = 512  # a model must have fewer than this many ids beyond the tokenizer's; Qwen2.5 has 271
# of rows by stage
KINDS = {"pretrain": "pretrain", "sft": "sft", "reward": "preferences", "judge": "preferences"}


def run(config, workdir, reporter=None, stop=None, only=None, given=None) -> dict:
    """Trains all stages of a config, or `only` one, and skips finished ones. Returns the run's summary.

    Raises InputError, before anything is written, for an impossible config, data that cannot be read, or a workdir of
    another config. `stop` is a loop.Stop for the whole run. `given` names the fields that a user gave in addition to
    those of a config file (config.py: check_given).
    """
    config = fields.expanded(config)
    reporter = reporter or Silent()
    configs.check(config, devices=len(sharding.devices()))
    hosts.compare(_identity(config))
    notes = configs.check_given(config, given)
    steps = Stages(config, Workdir(workdir), reporter)
    if only and only not in steps.names:
        raise InputError(f"{only}: not a stage of this config, which has {', '.join(steps.names)}")
    for note in notes:
        reporter.note(note)
    summary = steps.one(only, stop) if only else steps.all(stop)
    for note in _results(Path(workdir), only or ""):
        reporter.note(note)
    return summary


def _identity(config):
    """What must be the same on all hosts: {"ppo.lr": 1e-5, "sha256 of data.sft = rows.jsonl": ..., "jax": ...}."""
    if not hosts.several():
        return {}
    values = flat(configs.tree(dataclasses.replace(config, hosts=hosts.Config())))
    files = {f"sha256 of {name}": digest for name, digest in provenance.fingerprints(config).items()}
    if config.named:
        files[f"sha256 of reward = {config.reward.kind}"] = function.fingerprint(config.reward.kind)
    return values | metrics.environment()["versions"] | files


def _results(workdir, only):
    """Lines that say where the results of a run, or of one stage of it, are, and what comes next."""
    folder = workdir / only
    plots = sorted({f"{path.parent.relative_to(folder)}/" for path in folder.rglob("plots/*.png")})
    files = [name for name in ("report.html", "summary.json", "samples.jsonl") if (folder / name).exists()]
    yield f"results in {folder}: {', '.join([*files, *plots])}"
    stage = f" --stage={only}" if only else ""
    yield f"next: python experiments/serve.py --workdir={workdir}"
    yield f"      python experiments/export_hf.py --workdir={workdir}{stage} --out=exported"


class Stages:
    """The stages of one config in one workdir: what each is made of, and which are finished, here or elsewhere."""

    def __init__(self, config, workdir, reporter, jit=jax.jit):
        self.config, self.workdir, self.reporter, self._jit = config, workdir, reporter, jit
        self.workdir.defaults = provenance.defaults(config)  # of fields that older records lack
        self.names = configs.stages(config)
        self._noted = set()  # kinds of rows whose notes were shown, and the notes
        self._begun = False  # whether the first lines were shown
        for name in self.names:  # a workdir of another config is refused before anything is read or written
            self.workdir.check(name, self.depends(name))
        for folder, depends in self._of_seeds():
            folder.check(self.names[-1], depends)

    # What a stage depends on, and where it is

    def depends(self, name) -> dict:
        """What the numbers of a stage depend on."""
        return provenance.depends(self.config, name)

    def steps(self, name) -> int:
        """The steps that the config has for a stage."""
        return getattr(self.config, configs.section(self.config, name)).steps

    def place(self, name) -> Workdir:
        """The workdir that holds a stage: this one, or the stage's `from`."""
        there = Workdir(configs.place(self.config, self.workdir.path, name), defaults=self.workdir.defaults)
        if there.path == self.workdir.path:
            return self.workdir
        field = f"{name}.from"
        if not there.finished(name, self.steps(name)):
            raise InputError(f"{field}: expected a finished stage of {self.steps(name)} steps in {there / name}")
        try:
            there.check(name, self.depends(name))
        except InputError as error:
            raise InputError(f"{field}: {str(error).removeprefix('workdir: ').split('; choose')[0]}") from None
        return there

    def finished(self, name) -> bool:
        """True where all the steps of a stage are done."""
        return self.place(name).finished(name, self.steps(name))

    def parameters(self, name, field, like):
        """A parameter tree of a finished stage."""
        return self.place(name).parameters(name, self.steps(name), field, like)

    # The values that stages are made of

    @functools.cached_property
    def task(self):
        """The task of the config."""
        return tasks.load(self.config)

    @functools.cached_property
    def setup(self) -> Setup:
        """What the stages have in common."""
        config = self.config
        with hosts.in_turn():
            tokenizer = self._tokenizer()
        model, ids = config.model, tokenizer.vocab_size
        if model.vocab_size and not ids <= model.vocab_size < ids + PADDING:
            expected = f"0 or, for this tokenizer, {ids} to {ids + PADDING - 1}"
            raise InputError(f"model.vocab_size: expected {expected}, got {model.vocab_size}")
        sized = dataclasses.replace(model, vocab_size=model.vocab_size or ids)
        base = self._base
        return Setup(
            seed=config.seed,
            task=self.task,
            tokenizer=tokenizer,
            apply=rollout.Apply(heads.LanguageModel(sized, ids=ids, base=base), heads.ScalarModel(sized, base)),
            evaluation=config.evaluation,
            guard=config.guard,
            mesh=self.mesh,
            jit=functools.partial(base.jit, jit=self._jit) if base else self._jit,
            record=config.trace.every > 0,
        )

    @functools.cached_property
    def mesh(self):
        """The devices, as the config lays them out."""
        return sharding.mesh(self.config.mesh)

    def _tokenizer(self) -> text.Tokenizer:
        """The config's tokenizer: the workdir's copy if that was made from the same config and files.

        A copy that is missing or damaged is made again. Once a stage has been trained with it, it must be the same.
        """
        config, folder = self.config, self.workdir / "text"
        made_of = {"text": fields.significant(config.text), "data": fields.significant(config.data)}
        made_of |= {"seed": config.seed, "task": config.task, "sha256": provenance.fingerprints(config)}
        there: dict = {}
        saved = None
        with contextlib.suppress(InputError):
            there = self.workdir.read_json("text/made_of.json")
        with contextlib.suppress(InputError):
            saved = text.load(folder)
        if saved and there.get("made_of") == json.loads(json.dumps(made_of)):
            if saved.fingerprint() != there.get("fingerprint"):
                raise InputError(f"workdir: {folder}: not the tokenizer that was saved there; remove the folder")
            return saved
        tokenizer = _make_tokenizer(config.text, self.task, self.reporter.note)
        if tokenizer.fingerprint() not in (there.get("fingerprint"), saved and saved.fingerprint()):
            for name in self.names:
                if self.workdir.started(name):
                    raise InputError(f"workdir: {folder}: the tokenizer of {name} is missing or different")
        self.workdir.save_tokenizer(tokenizer, made_of)
        return tokenizer

    def _policy_init(self):
        """The policy before training: random, adapters, or the Hugging Face weights of model.init."""
        if self._base:
            jax.block_until_ready(self._base.stored)  # an error in the weights is found before the stage begins
            return self._random()
        return self._pretrained() if self.config.model.init else self._random()

    @functools.cached_property
    def _base(self):
        """The frozen parameters that adapters stand on, on every device; None without adapters."""

        def read():
            return sharding.place(self._pretrained(), self.mesh)

        return lora.Base(self.config.lora, read) if self.config.lora.rank else None

    def _pretrained(self):
        """The Hugging Face weights of model.init."""
        weights = _weights(self.config.model.init)
        try:
            return hf.load(weights, self.setup.apply.policy.config)
        except InputError as error:
            raise InputError(f"model.init: {error}") from None

    def _policy(self, name):
        """The policy that a stage starts from: that of the last stage before it that has one."""
        before = [stage for stage in self.names[: self.names.index(name)] if stage in ("pretrain", "sft")]
        if not before:
            return self._policy_init()
        return self.parameters(before[-1], "policy", like=self._shapes)

    def _random(self):
        return sharding.place(jax.jit(self.setup.apply.policy.init)(self.setup.key("policy init")), self.mesh)

    @functools.cached_property
    def _shapes(self):
        """The shapes of a policy's parameters, and where they lie on the mesh."""
        return sharding.like(jax.eval_shape(self.setup.apply.policy.init, self.setup.key("policy init")), self.mesh)

    def make(self, name, seed=0):
        """The Stage of this name. `seed` is the index of the run where the last stage has several."""
        config, setup = self.config, self.setup
        if name in ("pretrain", "sft"):
            return language_model(name, setup, getattr(config, name), self._policy(name))
        policy = self._policy(name)
        if name in configs.REWARD_MODELS:
            return reward_model(name, setup, config.reward, policy, self._only(name))
        scalar, section = setup.apply.scalar, config.rl
        key = jax.random.fold_in(setup.key("rl"), seed)  # not split: a seed samples the same alone and among others
        sides = ("_before", "_after") if config.task == "write" else ("_sft", "")

        def model(stage):
            """The reward model of a stage: (its parameters, a reward)."""
            params = self.parameters(stage, "reward", scalar.zero_head(policy))
            how = {field: getattr(section, field) for field in ("lanes", "widths") if hasattr(section, field)}
            sampling = setup.sampling(section.temperature, **how)
            placed = sharding.place(params, setup.mesh) if stage == "judge" else params
            return params, learned.Learned(setup.apply, placed, sampling, setup.jit)

        judge = model("judge")[1] if config.judged else None
        reward: Reward
        if not config.sampled:
            measure = function.load(config.reward.kind) if config.named else None
            parts = {"judge": judge, "only": self._only(name), "key": key, "sides": sides}
            return dpo(name, setup, section, policy, measure, **parts)
        if config.learned:
            params, reward = model("reward")
        else:
            params, reward = None, function.load(config.reward.kind, self.reporter.waiting)
        algorithm, value = ALGORITHMS[config.algorithm], None
        if algorithm.NEEDS_VALUE:
            with_reward = config.learned and section.value_init in ("auto", "reward")
            value = params if with_reward else scalar.zero_head(policy)
        beside: tuple[dict, ...] = ()
        if "pretrain" in self.names:
            beside = tuple(
                {"pretrain": row.get("completion", "")} for row in self.place("pretrain").samples("pretrain")
            )
        return rl(
            name, setup, section, algorithm, reward, policy,
            value=value, watch=config.alarms, keep_best=config.evaluation.result == "best", judge=judge, key=key,
            sides=sides, beside=beside,
        )  # fmt: skip

    # Training

    def one(self, name, stop=None) -> dict:
        """Trains one stage: its summary."""
        self._open()
        self._begin([name])
        self._check_data(name)
        with out_of_memory.named(self.config, name):
            if name == self.names[-1] and self.config.seeds > 1:
                summary = self._seeds(name, stop)
            else:
                summary = self._fit(self.make(name), self.depends(name), self.workdir, stop)
        if self.config.doctor != "off":
            hosts.on_first(lambda: self._examine(name))
        return summary

    def _examine(self, name):
        for finding in doctor.of_stage(self.config, self.workdir.path, name):
            self.reporter.note(finding.line)

    def _stop_before(self, name):
        """Raises InputError where the doctor finds a stage before this one unfit, and the config says to stop."""

        def examine():
            for before in self.names[: self.names.index(name)]:
                for finding in doctor.of_stage(self.config, self.workdir.path, before):
                    if finding.verdict == doctor.FAIL:
                        raise InputError(f"{finding.line}; --config.doctor=warn goes on to {name}")

        if self.config.doctor == "stop":
            hosts.on_first(examine)

    def _open(self):
        """Locks the workdir and writes the whole config."""
        self.workdir.lock()
        self.workdir.write_json("config.json", configs.tree(self.config))

    def _begin(self, todo):
        """Shows, once, where the run is, on what, and of what size."""
        if self._begun:
            return
        self._begun = True
        self.reporter.note(f"workdir {self.workdir.path}; to train: {', '.join(todo) or 'nothing'}")
        if todo:
            devices, policy = sharding.devices(), self.setup.apply.policy
            parameters = "parameters of adapters" if self.config.lora.rank else "parameters"
            count = sum(leaf.size for leaf in jax.tree.leaves(self._shapes))
            size = f"{count:,} {parameters}, {policy.config.layers} layers of {policy.config.width}"
            tokens = f"{self.setup.tokenizer.vocab_size:,} tokens"
            self.reporter.note(f"{len(devices)} x {devices[0].device_kind}; a policy of {size}; {tokens}")
            if note := sharding.undivided(self._shapes, self.mesh):
                self.reporter.note(note)

    def all(self, stop=None) -> dict:
        """Trains every stage that is not finished: the run's summary."""
        todo = [name for name in self.names if not self.finished(name)]
        hosts.wait("to train")  # no host changes what another one has not seen yet
        if todo and todo[0] == self.names[0] and self.config.model.init:
            _weights(self.config.model.init)  # a failed download must be an error before hours of tokenization
        with hosts.in_turn():  # the first one may write a cache
            for name in todo:  # errors in the data are found now, not when the stage begins
                self.task.rows(self._kind(name))
        self._open()
        self._begin(todo)
        for name in todo:
            self._check_data(name)
        for name in self.names:
            if name in todo:
                self._stop_before(name)
                self.one(name, stop)
            else:
                place = self.place(name)
                where = "finished with this config" if place is self.workdir else f"taken from {place.path}"
                self.reporter.note(f"{name}: {where}, skipped")
        with contextlib.suppress(InputError):
            if not todo and (self.workdir / "text").exists():
                hosts.on_first(self._tokenizer)  # a damaged one is made again, and so is a summary
        return hosts.on_first(lambda: self._conclude(todo)) or self.workdir.read_json("summary.json")

    def _kind(self, name):
        """The kind of the rows that a stage trains on."""
        return KINDS.get(name, "prompts" if self.config.sampled else "preferences")

    def _check_data(self, name):
        """Encodes what a stage trains on, notes what was cut or skipped, and checks that it is enough."""
        kind = self._kind(name)
        if kind not in self._noted:
            self._noted.add(kind)
            self._about(kind, self.setup.arrays(kind).notes)
            for note in self.setup.arrays(kind).notes:
                if note not in self._noted:  # prompts can be those of the SFT rows
                    self._noted.add(note)
                    self.reporter.note(note)
        if name in configs.REWARD_MODELS:
            check_references(self.setup)
        if name == self.names[-1] and self.config.reward.kind == "rouge":
            for side in self.task.rows(kind)[:2]:
                rouge.check(side)
        section = configs.section(self.config, name)
        part = getattr(self.config, section)
        group = getattr(part, "group", 1)
        self.setup.batch_at(kind, part.batch, "rl", f"{section}.batch", group, only=self._only(name))

    def _about(self, kind, notes):
        """Keeps what the report says of the command and of a kind of rows."""
        there: dict = {}
        with contextlib.suppress(InputError):
            there = self.workdir.read_json(report.ABOUT)
        data = {**there.get("data", {}), kind: list(notes)}
        self.workdir.write_json(report.ABOUT, {"command": report.command_line(), "data": data})

    def _only(self, name):
        """The places of the pairs that a stage is trained on, where it shares them with the judge; else None: all."""
        shares = self.config.judged and self._kind(name) == "preferences"
        return half(self.setup, judge=name == "judge") if shares else None

    def _fit(self, stage, depends, workdir, stop):
        config = configs.tree(self.config)
        parts = {"keep": self.config.keep, "log": self.config.log, "reporter": self.reporter, "stop": stop}
        if self.config.trace.every:
            parts["recorder"] = recorder.Recorder(workdir, self.config, self.setup.tokenizer)
        return fit(stage, workdir, depends=depends, config=config, **parts).summary

    def _of_seeds(self):
        """(folder, what its numbers depend on) of each seed of the last stage, where there are several."""
        for i in range(self.config.seeds if self.config.seeds > 1 else 0):
            depends = self.depends(self.names[-1]) | {"seeds": 1, "index": i}
            name = f"{self.workdir.name} (seed {i})"
            yield Workdir(self.workdir / "seeds" / str(i), name, self.workdir.defaults), depends

    def _seeds(self, name, stop):
        """Trains the last stage for several seeds, each in seeds/<index>. The stage's own folder gets their means."""
        folders = [folder for folder, _ in self._of_seeds()]
        for i, (folder, depends) in enumerate(self._of_seeds()):
            if folder.finished(name, self.steps(name)):
                self.reporter.note(f"{name}: seed {i} is finished, skipped")
                continue
            self.reporter.note(f"{name}: seed {i + 1} of {len(folders)}")
            self._fit(self.make(name, i), depends, folder, stop)
        return hosts.on_first(lambda: self._mean(name, folders)) or self.workdir.summary(name)

    def _mean(self, name, folders):
        """Writes what the seeds of the last stage have in common: their means, and the result of the first one."""
        runs = [folder.rows(name) for folder in folders]
        if len(set(map(len, runs))) > 1:
            short = folders[min(range(len(runs)), key=lambda i: len(runs[i]))] / name
            raise InputError(
                f"workdir: {short / 'metrics.jsonl'}: expected {max(map(len, runs))} rows, as other seeds have, got "
                f"{min(map(len, runs))}; remove {short} to train this seed again"
            )
        rows = seeds.rows(runs)
        here = self.workdir.open(name, self.depends(name))
        shutil.copytree(folders[0] / name / "result", here / "result", dirs_exist_ok=True)
        self.workdir.write_lines(f"{name}/samples.jsonl", folders[0].samples(name))
        self.workdir.write_lines(f"{name}/metrics.jsonl", rows)
        plots.rl(rows, here / "plots", name, title=self.setup.title(f"{self.workdir.name}, {len(folders)} seeds", name))
        summaries = [folder.summary(name) for folder in folders]
        numbers = seeds.numbers(summaries, name)
        seconds = sum(summary["seconds"] for summary in summaries)
        return write_summary(self.workdir, f"{name}/summary.json", seconds, numbers, self.config.seed)

    def _conclude(self, todo):
        """Writes plot, samples and summary of the whole run, unless they are there and nothing was to do."""
        with contextlib.suppress(InputError):
            summary = self.workdir.read_json("summary.json") if not todo else {}
            if f"{self.names[-1]}/steps" in summary:  # of this algorithm, not of another one
                if not (self.workdir / report.NAMES[0]).exists():  # the run was killed before it
                    report.write(self.workdir.path)
                return summary
        places = {name: self.place(name) for name in self.names}
        rows = {name: place.rows(name) for name, place in places.items()}
        (self.workdir / "plots").mkdir(exist_ok=True)
        title = f"{self.workdir.name}: {self.config.task}, seed {self.config.seed}"
        plots.pipeline(rows, self.workdir / "plots" / "pipeline.png", title=title)
        last = self.names[-1]
        self.workdir.write_lines("samples.jsonl", places[last].samples(last))
        numbers: dict[str, Any] = {}
        seconds = 0
        for name, place in places.items():
            summary = place.summary(name)
            numbers |= {key: value for key, value in summary.items() if key.startswith(f"{name}/")}
            numbers[f"{name}/seconds"] = summary["seconds"]
            seconds += summary["seconds"]
        summary = write_summary(self.workdir, "summary.json", seconds, numbers, self.config.seed)
        report.write(self.workdir.path)
        if self.config.doctor != "off":
            self.reporter.note(f"doctor  {doctor.verdict(doctor.examine(self.workdir.path))}")
        return summary


def _make_tokenizer(config, task, note):
    """The tokenizer of a Text section: read from its path, or trained on the task's texts."""
    if config.of_files:
        if not config.path:
            raise InputError("text.path: expected a folder or a name on the hub, as gpt2, got none")
        wanted = {"eos": config.eos, "pad": config.pad, "template": config.template}
        try:
            return files.from_files(hub.folder(config.path, *files.FILES, also=files.ALSO), **wanted, note=note)
        except InputError as error:
            raise InputError(str(error) if str(error).startswith("text.") else f"text.path: {error}") from None
    try:
        texts = task.texts()
        tokenizer = bpe.train(texts, config.vocab_size) if config.kind == "bpe" else char.train(texts)
        return dataclasses.replace(tokenizer, template=files.chat_template(config.template))
    except InputError as error:
        named = str(error).startswith(("data", "reward"))
        raise InputError(str(error) if named else f"text.{error}") from None


def _weights(init):
    """The file or folder that model.init stands for, downloaded where it is a name on the hub."""
    try:
        return hf.find(init)
    except InputError as error:
        raise InputError(f"model.init: {error}") from None
