"""What a stage of a run is worth: its texts, its reward model and its win rate, each with an interval."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import fields, judges, pretrained, tasks
from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.commands import generate
from rlhf_jax.data import batches, files, tldr
from rlhf_jax.errors import InputError
from rlhf_jax.evaluate import accuracy, calibration, controlled, copying, diversity, interval, perplexity, rouge
from rlhf_jax.evaluate.win_rate import win_rate
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent
from rlhf_jax.rewards import function, total

REFERENCE = "reference"  # the other side of a win rate: the labels of the rows
EXPORTED = "model"  # what the one stage of an exported folder is called
FOLDER = "evaluation"  # of a workdir: completions, answers of judges, results


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is evaluated, on what, and by whom."""

    stage: str = ""  # whose policy; empty: the last finished one
    against: str = ""  # a stage, another run, or `reference`; empty: the stage before reinforcement learning
    # learned, judge (the hold-out one), gold, sentiment, rouge, FILE.py:FUNCTION, the folder of a run or of an exported
    # reward model, or a command; empty: all that the run has
    judge: str = ""
    rows: int = fields.number(256, least=0)  # most held-out rows; 0: all
    temperature: float = fields.number(-1.0, least=-1, most=100)  # 0: the most likely token; -1: that of the run
    seed: int = fields.number(0, least=0, below=2**32, most=2**32)


def evaluate(workdir, settings: Settings, *, data=None, endpoint=None, reporter=None) -> dict:
    """Evaluates a stage of the run in `workdir`: a nested dict, which `show` prints, and workdir/evaluation/STAGE.json.

    workdir may be a folder that experiments/export_hf.py or transformers wrote; then `data` has its rows. data: a file
    of rows {"prompt"} and optionally {"label"} instead of the run's held-out ones; for an exported reward model, rows
    {"prompt", "chosen", "rejected"}. endpoint: (URL, model) of an OpenAI-compatible judge. Completions and the answers
    of judges that are programs are kept in workdir/evaluation: the same command goes on where it was interrupted.
    Raises InputError.
    """
    fields.check(settings)
    workdir = Path(workdir).expanduser()
    model = rlhf_jax.load(workdir, settings.stage)
    config, is_run = generate.config_of(workdir, model), pretrained.is_run(workdir)
    if not is_run and data is None:
        raise InputError("data: expected a file of rows where the model is no run, got none")
    stage = settings.stage or (finished(config, workdir)[-1] if is_run else EXPORTED)
    result: dict[str, Any] = {"stage": stage, "seed": settings.seed}
    if model.params is not None:
        run = opened(workdir, config, model, settings, data=data, reporter=reporter)
        ours = run.completions(workdir, stage)
        result |= {"rows": len(run.rows), "temperature": run.temperature, "text": run.texts(ours)}
        if against := settings.against or run.before(stage):
            result["win_rate"] = {"against": against} | run.win_rates(ours, run.other(against), endpoint)
    if model.reward is not None:
        pairs = _pairs(config, model, settings, None if is_run else data)
        result["reward_model"] = _reward_model(model, *pairs)
    (workdir / FOLDER).mkdir(exist_ok=True)
    metrics.summarize(workdir / FOLDER / f"{stage}.json", result)
    return result


def opened(workdir, config, model, settings: Settings, *, data=None, repeat: int = 1, reporter=None) -> "Run":
    """The run with the rows that its policies complete, each `repeat` times. Raises InputError for fewer than 2."""
    prompts = generate.prompts_of(config, model, _rows(config, settings, data), generate.Settings())
    if len(prompts) < 2:
        raise InputError(f"rows: expected at least 2 to evaluate on whose prompts fit, got {len(prompts)}")
    prompts = [prompt for prompt in prompts for _ in range(repeat)]
    rows, starts = [prompt.row for prompt in prompts], [prompt.ids for prompt in prompts]
    temperature = config.evaluation.temperature if settings.temperature < 0 else settings.temperature
    return Run(workdir, config, model, rows, starts, temperature, settings, reporter or Silent())


def finished(config, workdir) -> list[str]:
    """The finished stages that have a policy, in order."""
    names = [name for name in configs.stages(config) if name not in configs.REWARD_MODELS]
    return [name for name in names if (configs.place(config, workdir, name) / name / "summary.json").exists()]


def _rows(config, settings, data):
    if data is not None:
        try:
            rows = [dict(row) for row in files.read(data, ("prompt",), extra=True)]
        except InputError as error:
            raise InputError(f"data: {error}") from None
    elif config.task == "write":
        rows = [{"prompt": ""}] * config.evaluation.prompts
    else:
        task = tasks.load(config)
        rows = task.rows(task.questions["sft" if config.sft.steps else "prompts"]).held_out
    return rows[: settings.rows or None]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run, and the rows that its policies complete."""

    workdir: Path
    config: configs.Config
    model: pretrained.Pretrained
    rows: list[dict]
    starts: list[list[int]]  # the ids of each prompt
    temperature: float
    settings: Settings
    reporter: Any

    @property
    def labelled(self):
        """Whether every row has a reference text."""
        return self.config.task != "write" and all(isinstance(row.get("label"), str) for row in self.rows)

    def completions(self, workdir, stage) -> list[dict]:
        """{"completion", "ids", "ended"} of each row, by the policy of a stage of a run."""
        prompts = [{"prompt": row["prompt"]} for row in self.rows]
        how = generate.Settings(
            stage="" if stage == EXPORTED else stage,
            temperature=self.temperature,
            logprobs=True,
            seed=self.settings.seed,
        )
        made_of = generate.made_of(workdir, how, prompts)  # other weights get another file
        out = self.workdir / FOLDER / f"{stage}-{_digest(json.dumps(made_of))}.jsonl"
        out.parent.mkdir(exist_ok=True)
        generate.generate(workdir, prompts, how, out=out, reporter=self.reporter)
        made = [json.loads(line) for line in out.read_text().splitlines()]
        if len(made) < len(prompts):
            raise InputError(
                f"{workdir}: expected completions of {len(prompts)} prompts, got {len(made)}: some do not fit"
            )
        return made

    @functools.cached_property
    def scores(self) -> dict[str, Callable]:
        """{name: texts -> [N]}: what completions of the rows are scored by."""
        names = ["gold"] if self.config.task == "summarize" and self.config.data.source == "world" else []
        names += ["sentiment"] if self.config.task == "write" and not self.config.named else []
        names += [self.config.reward.kind] if self.config.named else []
        scores = {name: self.by(name) for name in dict.fromkeys(names)}
        place = configs.place(self.config, self.workdir, "judge")
        if (place / "judge" / "summary.json").exists():
            scores["judge"] = self.by_model(place, "judge")
        return scores | ({} if self.model.reward is None else {"learned": self.learned})

    def by(self, name) -> Callable:
        """The scores of a reward function, as a function of texts."""
        scored = function.load(name)
        return lambda texts: total(scored.scores(self.rows, texts))

    def learned(self, texts):
        """The reward model's score of each text, read at its EOS."""
        return self.model.score_tokens([a + b for a, b in zip(self.starts, self.ends(texts), strict=True)])

    def rewarded(self, completions):
        """What reinforcement learning maximizes [N] of sampled completions: the learned score, or that of no EOS."""
        ended_N, section = np.array([each["ended"] for each in completions]), self.config.rl
        how = {"missing_eos": section.missing_eos, "penalty": section.missing_eos_penalty}
        score_N = self.learned([each["completion"] for each in completions])
        return np.asarray(policy_algorithm.final_score(score_N, ended_N, **how), np.float64)

    def ends(self, texts):
        """The ids of completions, EOS included; a text that does not fit in the context is cut."""
        tokenizer, context = self.model.tokenizer, self.model.context
        bare = self.config.task == "write" or batches.is_chat(self.rows[0], tokenizer)  # no space stands before it
        pairs = zip(self.starts, texts, strict=True)

        def form(text):
            return text if bare else tldr.completion(text, tokenizer.space)

        return [[*tokenizer.encode(form(text))[: context - len(ids) - 1], tokenizer.eos_id] for ids, text in pairs]

    def texts(self, ours) -> dict[str, dict]:
        """Numbers of the completions, each {"value", "ci95"}; those of the whole set have no interval."""
        texts = [each["completion"] for each in ours]
        ended = sum(each["ended"] for each in ours)
        numbers = {name: _mean(score(texts), name) for name, score in self.scores.items()}
        numbers["eos_rate"] = {"value": ended / len(ours), "ci95": interval.wilson(ended, len(ours))}
        numbers["length"] = _mean([len(each["ids"]) for each in ours])
        numbers["distinct1"], numbers["distinct2"] = ({"value": diversity.distinct(texts, n)} for n in (1, 2))
        numbers["repeat_rate"] = {"value": diversity.repeat_rate(texts)}
        if self.config.task != "write":
            pairs = zip(self.rows, texts, strict=True)
            numbers["copied"] = _mean([copying.copied(row["prompt"], text) for row, text in pairs])
        if self.labelled:
            labels, scorer = [row["label"] for row in self.rows], rouge.scorer(rouge.NAMES)
            found = [scorer.score(label, text) for label, text in zip(labels, texts, strict=True)]
            numbers |= {name: _mean([pair[name].fmeasure for pair in found]) for name in rouge.NAMES}
            tokenizer, ends = self.model.tokenizer, self.ends(labels)
            if batches.is_chat(self.rows[0], tokenizer):  # as the template writes an answer
                answers = batches.answer_ids(self.rows, "label", tokenizer, "rows")
                both = zip(self.starts, answers, strict=True)
                ends = [(ids or [])[: self.model.context - len(start)] for start, ids in both]
            logp = self.model.logprob_tokens(self.starts, ends)
            nats_N, tokens_N = np.array([-each.sum() for each in logp]), np.array([each.size for each in logp])
            numbers |= {f"label_{name}": {"value": value} for name, value in perplexity.perplexity(nats_N, tokens_N)}
        return numbers

    def before(self, stage):
        """What a policy is compared with: that of the stage before it, else the references; "" where there are none."""
        names = [] if stage == EXPORTED else finished(self.config, self.workdir)
        place = names.index(stage) if names else 0
        return names[place - 1] if place else REFERENCE if self.labelled else ""

    def other(self, against) -> list[dict]:
        """The other side's completions."""
        if against == REFERENCE:
            if not self.labelled:
                raise InputError("against: expected rows with a label, to compare with the reference; there are none")
            return [{"completion": row["label"]} for row in self.rows]
        if pretrained.is_run(self.workdir) and against in configs.stages(self.config):
            return self.completions(self.workdir, against)
        folder = Path(against).expanduser()
        if not pretrained.is_run(folder):
            if (folder / "config.json").exists():
                return self.completions(folder, EXPORTED)
            expected = f"{', '.join(configs.stages(self.config))}, {REFERENCE}, or the folder of a run or a model"
            raise InputError(f"against: expected {expected}, got {against!r}")
        names = finished(configs.read(folder), folder)
        if not names:
            raise InputError(f"against: {folder}: expected a run with a finished policy; there is none yet")
        return self.completions(folder, names[-1])

    def win_rates(self, ours, theirs, endpoint) -> dict[str, dict]:
        """{judge: the share of rows that our texts win, as judged and at equal lengths}."""
        a, b = ([each["completion"] for each in side] for side in (ours, theirs))
        return {judge.name: self.win_rate(judge, a, b) for judge in self.appointed(endpoint)}

    def appointed(self, endpoint) -> list[judges.Judge]:
        """The judges of the settings."""
        name = self.settings.judge
        found: list[judges.Judge] = []
        scored = lambda name, score: judges.Scored(name, lambda rows, texts: score(texts))  # noqa: E731
        if endpoint:
            url, model = endpoint
            found.append(judges.Endpoint(url, model, self.answers(f"{url} {model}")))
        if name and (score := self.score_of(name)):
            found.append(scored(name, score))
        elif name:
            found.append(judges.Command(name, self.answers(name)))
        elif not endpoint:
            found += [scored(each, score) for each, score in self.scores.items()]
        return found

    def score_of(self, name) -> Callable | None:
        """The scores of a judge that gives a text a number, as a function of texts; None for a program."""
        if name in self.scores:
            return self.scores[name]
        if name in function.NAMED or name.rpartition(":")[0].endswith(".py"):
            return self.by(name)
        if name == "learned":
            raise InputError("judge: expected a run with a finished reward model where it is learned; there is none")
        folder = Path(name).expanduser()
        return self.by_model(folder) if folder.is_dir() else None

    def by_model(self, folder, stage="reward") -> Callable:
        """The scores of a reward model of a run, or of an exported one, as a function of texts."""
        model = rlhf_jax.load(folder, stage if pretrained.is_run(folder) else "")
        if model.reward is None:
            raise InputError(f"judge: {folder}: expected a reward model, got a policy")
        config = generate.config_of(folder, model)
        room = generate.Settings(max_tokens=min(self.model.max_tokens, model.context - 1))
        prompts = generate.prompts_of(config, model, self.rows, room)
        if len(prompts) < len(self.rows):
            kept = f"{len(prompts)} of {len(self.rows)}"
            raise InputError(f"judge: {folder}: expected a model whose context holds every prompt, it holds {kept}")
        starts = [prompt.ids for prompt in prompts]
        return dataclasses.replace(self, config=config, model=model, starts=starts).learned

    def answers(self, name) -> judges.Answers:
        """The kept answers of a judge."""
        return judges.Answers(self.workdir / FOLDER / f"judge-{_digest(name)}.jsonl")

    def win_rate(self, judge, ours, theirs) -> dict:
        """The share of rows that our texts win by one judge, as judged and at equal lengths."""
        wins_N = judge.wins(self.rows, ours, theirs)
        rate, ci95 = win_rate(wins_N, 1 - wins_N)
        words = [[len(text.split()) for text in side] for side in (ours, theirs)]
        equal, equal_ci95 = controlled.length_controlled(wins_N, *words, seed=self.settings.seed)
        numbers = {"value": rate, "ci95": ci95, "ties": float(np.mean(wins_N == 0.5))}
        numbers["length_controlled"] = {"value": equal, "ci95": equal_ci95}
        numbers["words"] = [float(np.mean(each)) for each in words]
        return numbers | ({"counts": judge.counts} if isinstance(judge, judges.Endpoint) else {})


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _mean(x_N, name=""):
    x_N = np.asarray(x_N, np.float64)
    if np.isnan(x_N).any():
        raise InputError(f"{name}: expected numbers, got NaN in row {int(np.isnan(x_N).argmax()) + 1}")
    return {"value": float(x_N.mean()), "ci95": interval.mean_ci95(x_N)}


def _pairs(config, model, settings, data):
    """(prompts, chosen, rejected): lists of ids, of the run's held-out pairs or of the file `data`."""
    if data is None:
        arrays = tasks.load(config).arrays("preferences", model.tokenizer).held_out
    else:
        try:
            rows = [dict(row) for row in files.read(data, ("prompt", "chosen", "rejected"))]
            lengths = {"prompt_length": model.context, "response_length": model.context}
            arrays, _ = batches.encode_pairs(rows, model.tokenizer, **lengths, cut="left", source=str(data))
        except InputError as error:
            raise InputError(f"data: {error}") from None
    most = settings.rows or None
    prompts, chosen, rejected = (
        [ids[mask].tolist() for ids, mask in zip(arrays[ids_name][:most], arrays[mask_name][:most], strict=True)]
        for ids_name, mask_name in (
            ("prompt_NP", "prompt_mask_NP"), ("chosen_NR", "chosen_mask_NR"), ("rejected_NR", "rejected_mask_NR"),
        )
    )  # fmt: skip
    if len(prompts) < 2:
        raise InputError(f"data.preferences: expected at least 2 held-out pairs, got {len(prompts)}")
    longest = [max(map(len, both)) for both in zip(chosen, rejected, strict=True)]
    prompts = [ids[max(len(ids) + most - model.context, 0) :] for ids, most in zip(prompts, longest, strict=True)]
    return prompts, chosen, rejected


def _reward_model(model, prompts, chosen, rejected):
    """How far the reward model can be trusted, on held-out preference pairs."""

    def score(starts, ends):
        return model.score_tokens([start + end for start, end in zip(starts, ends, strict=True)])

    chosen_N, rejected_N = score(prompts, chosen), score(prompts, rejected)
    margin_N = (chosen_N - rejected_N).astype(np.float64)
    longer_N = np.sign([len(a) - len(b) for a, b in zip(chosen, rejected, strict=True)])
    sure_N = np.abs(margin_N) > np.median(np.abs(margin_N))
    lengths = [len(ids) for ids in chosen + rejected]
    both = np.concatenate([chosen_N, rejected_N])
    spread = np.std(lengths) > 0 and np.std(both) > 0
    # The same texts after another post, and cut in the middle: a model that reads both must like them less.
    swapped_N = score(prompts[1:] + prompts[:1], chosen)
    halves = [[*ids[: max(len(ids) // 2, 1)], model.tokenizer.eos_id] for ids in chosen]
    numbers = {
        "pairs": {"value": len(prompts)},
        "accuracy": _rate(*accuracy.accuracy(chosen_N, rejected_N)),
        "accuracy_of_longer": _rate(*accuracy.accuracy(longer_N, 0 * longer_N)),
        "accuracy_of_shorter": _rate(*accuracy.accuracy(-longer_N, 0 * longer_N)),
        "accuracy_prefers_own_prompt": _rate(*win_rate(chosen_N, swapped_N)),
        "accuracy_prefers_whole": _rate(*win_rate(chosen_N, score(prompts, halves))),
        "brier": {"value": calibration.brier(margin_N)},
        "ece": {"value": calibration.ece(margin_N)},
        "temperature": {"value": calibration.temperature(margin_N)},
        "length_correlation": {"value": float(np.corrcoef(lengths, both)[0, 1]) if spread else 0.0},
    }
    for name, where_N in (
        ("accuracy_where_sure", sure_N), ("accuracy_where_unsure", ~sure_N),
        ("accuracy_where_chosen_is_longer", longer_N > 0), ("accuracy_where_chosen_is_shorter", longer_N < 0),
    ):  # fmt: skip
        if where_N.any():
            numbers[name] = _rate(*accuracy.accuracy(chosen_N[where_N], rejected_N[where_N]))
    return numbers


def _rate(rate, ci95):
    return {"value": rate, "ci95": ci95}


def show(result: dict, reporter) -> None:
    """Prints the result as tables."""
    header = ("", "value", "from", "to")
    for section, title in (("text", f"{result['stage']}, {result.get('rows')} rows"), ("reward_model", "reward model")):
        if section in result:
            rows = [(name, each["value"], *each.get("ci95", (None, None))) for name, each in result[section].items()]
            reporter.table((title, *header[1:]), rows)
    if "win_rate" in result:
        wins = dict(result["win_rate"])
        against, rows = wins.pop("against"), []
        for name, each in wins.items():
            rows.append((name, each["value"], *each["ci95"]))
            rows.append(
                (f"{name}, at equal lengths", each["length_controlled"]["value"], *each["length_controlled"]["ci95"])
            )
        reporter.table((f"wins over {against}, by", *header[1:]), rows)
