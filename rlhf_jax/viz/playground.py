"""A finished run to play with: its policies write side by side, its reward scores what they write, people vote.

The policies are the last two finished ones: what reinforcement learning started from, and what it made of it.
"""

import contextlib
import dataclasses
import functools
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import fields, pretrained, tasks
from rlhf_jax.data import batches, chats, sources, tldr
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import function, sentiment
from rlhf_jax.text import files as text_files
from rlhf_jax.training.workdir import Workdir

VOTES = "votes.jsonl"  # in the workdir: rows that --config.data.preferences reads
KEPT = 64  # last pairs of completions that can be voted on
EXAMPLES = 24  # prompts of the run that the page offers

NAMES = {"pretrain": "pretrained", "sft": "fine-tuned"}  # of stages; the others are reinforcement learning


@dataclasses.dataclass(frozen=True)
class Settings:
    """How completions are sampled."""

    temperature: float = fields.number(1.0, least=0, most=100)  # 0: the most likely token
    top_k: int = fields.number(0, least=0)  # 0: all
    top_p: float = fields.number(1.0, above=0, most=1)  # 1: all
    max_tokens: int = fields.number(0, least=0)  # EOS included; 0: as many as in the run. At most what the context has
    seed: int = fields.number(0, least=0, below=2**32, most=2**32)


def settings(values: dict) -> Settings:
    """The Settings of a JSON object; absent fields have their defaults. InputError names the field at fault."""
    try:
        parsed = configs.parse(configs.tree(Settings()) | values, Settings)
    except OverflowError:
        raise InputError("settings: expected numbers below 1e308") from None
    fields.check(parsed)
    return parsed


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the policies read it."""

    text: str
    ids: list[int]
    note: str = ""  # what was cut, in words


class Run:
    """The policies, the reward and the votes of the run in a folder. Parameters are read on first use.

    Raises InputError for a folder without the config of a run. A run without a finished policy has `missing`, a
    message that says so, and everything else raises it.
    """

    def __init__(self, folder):
        self.workdir = Workdir(folder)
        self.config = configs.read(self.workdir.path)
        self._lock = threading.RLock()
        self._policies: dict[str, Any] = {}  # parameters by stage
        self._pairs: OrderedDict[str, dict] = OrderedDict()  # what can be voted on
        places = {name: configs.place(self.config, folder, name) / name for name in configs.stages(self.config)}
        finished = [name for name, place in places.items() if (place / "summary.json").exists()]
        self.stages = [name for name in finished if name not in configs.REWARD_MODELS]  # that have a policy
        self.sides = tuple(self.stages[-2:])
        self.has_reward_model = "reward" in finished

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.workdir.path.name

    @property
    def missing(self) -> str:
        """What to do where no policy is finished; empty where one is."""
        if self.stages:
            return ""
        script = {"summarize": "ppo_summarize", "prompts": "rl"}.get(self.config.task) or f"pg_{self.config.data.kind}"
        command = f"python experiments/{script}.py --config=configs/{script}.py --workdir={self.workdir.path}"
        return f"{self.workdir.path}: no stage with a policy is finished; train it with: {command}"

    # What the page shows before anything is written

    def info(self) -> dict[str, Any]:
        """What the page must know of the run, in JSON."""
        config = self.config
        return {
            "name": self.name,
            "task": config.task,
            "missing": self.missing,
            "sides": [{"stage": stage, "name": NAMES.get(stage, "RLHF")} for stage in self.sides],
            "stages": self.stages,
            "reward": self.reward_name,
            "prompt_length": getattr(config.data, "prompt_length", 1),
            "response_length": config.data.response_length,
            "context": config.model.context,
            "temperature": config.rl.temperature,
            "votes": self.votes,
        }

    @property
    def reward_name(self) -> str:
        """The reward that scores completions: "learned", "sentiment", a file and function, or none (empty)."""
        return self.config.reward.kind if self.config.named or self.has_reward_model else ""

    @property
    def votes(self) -> int:
        """Votes in the workdir."""
        path = self.workdir / VOTES
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def examples(self) -> list[str]:
        """Some prompts of the run's own evaluation, which it was not trained on."""
        if self.config.task == "write" or not self.stages:
            return []
        try:
            rows = self.workdir.samples(self.stages[-1])
        except InputError:
            return []
        return list(dict.fromkeys(row["prompt"] for row in rows if row.get("prompt")))[:EXAMPLES]

    # The parameters

    @functools.cached_property
    def model(self) -> pretrained.Pretrained:
        """The first side, with the reward model."""
        with self._lock:
            return self._load(self.sides[0] if self.sides else "")

    def policy(self, stage: str) -> Any:
        """The parameters of a stage's policy."""
        if stage == self.sides[0]:
            return self.model.params
        with self._lock:
            if stage not in self._policies:
                self._policies[stage] = self._load(stage).params
            return self._policies[stage]

    def _load(self, stage):
        if self.missing:
            raise InputError(self.missing)
        return pretrained.load(self.workdir.path, stage)

    # Prompts

    def prompt(self, text: str, *, recipe: bool, max_tokens: int = 0) -> Prompt:
        """A text as a prompt. `recipe`: brought to the run's length as in training (data.cut).

        Otherwise it may have all of the context but for max_tokens (0: the run's), and a longer one loses the end of
        its post, where it is a TL;DR query, or its beginning. A beginning to write on may have half of the context.
        """
        tokenizer, data = self.model.tokenizer, self.config.data
        if self.config.task == "write":
            ids = tokenizer.encode(text)
            kept = ids[max(len(ids) - self.model.context // 2, 0) :]
            return self._cut(text, [tokenizer.eos_id, *kept], kept, len(ids) - len(kept))  # EOS begins every text
        rows = [{"prompt": text} | ({chats.KEY: [_message("user", text)]} if self.chat else {})]
        (whole,) = batches.prompt_ids(rows, tokenizer, "prompt")
        ids = whole or [tokenizer.eos_id]
        if recipe:
            arrays, counts = batches.encode_prompts(
                rows, tokenizer, prompt_length=data.prompt_length, cut=data.cut, source="prompt"
            )
            if counts["cut_prompts"]:
                kept = arrays["prompt_NP"][0][arrays["prompt_mask_NP"][0]].tolist()
                return self._cut(text, kept, kept, len(ids) - len(kept))
            return Prompt(text, ids)
        limit, begin = self.model.context - self.length(max_tokens), [] if self.chat else tokenizer.begin
        if len(ids) <= limit:
            return Prompt(text, ids)
        kept = ids[len(ids) - limit + len(begin) :]
        if not self.chat:
            with contextlib.suppress(InputError):  # not a TL;DR query
                kept = tldr.fit(text, tokenizer, limit - len(begin))[0]
        return self._cut(text, begin + kept, kept, len(ids) - len(begin) - len(kept))

    def _cut(self, text, ids, kept, lost):
        if not lost:
            return Prompt(text, ids)
        note = f"the prompt has {lost + len(kept)} tokens and was cut to {len(kept)}"
        return Prompt(text if self.chat else self.model.tokenizer.decode(kept), ids, note)

    @functools.cached_property
    def chat(self) -> bool:
        """Whether the run's rows are conversations: then a text is the user's message, and votes are such rows."""
        if self.config.task == "write" or self.model.tokenizer.template in ("", text_files.NONE):
            return False
        try:
            return chats.KEY in tasks.load(self.config).rows("prompts").train[0]
        except InputError:  # their files are no longer there
            return False

    def length(self, max_tokens: int) -> int:
        """The tokens that a completion may have: those requested, at most half the context; 0: the run's."""
        most = max(self.model.context // 2, self.model.max_tokens)
        return min(max_tokens or self.model.max_tokens, most)

    # Writing

    def compare(
        self, prompt: Prompt, how: Settings, *, forced: Sequence[int] = (), reference: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Yields {"event": "token", ...} for each place, then {"event": "end", ...}: both sides, with the same noise.

        A token has its log-prob under each side, the exact KL (last side || first side) before it, and the `candidates`
        that each side finds most likely. The end has texts, scores, sums of KL, and ROUGE where there is a reference.
        """
        began = time.monotonic()
        ids: list[list[int]] = [[] for _ in self.sides]
        logps: list[list[np.ndarray]] = [[] for _ in self.sides]
        for i, token in enumerate(self.tokens(prompt, how, self.sides, self.room(prompt, how), forced=forced)):
            for b in np.flatnonzero(token.mask_B):
                ids[b].append(int(token.token_B[b]))
                logps[b].append(token.logp_MB[:, b])
            rows = [
                self._row(token, b) | {"forced": i < len(forced)} if token.mask_B[b] else None for b in range(len(ids))
            ]
            yield {"event": "token", "place": i, "rows": rows}
        seconds = time.monotonic() - began
        ends = [self._end(prompt, row, logp, reference) for row, logp in zip(ids, logps, strict=True)]
        for end, score in zip(ends, self.scores([prompt.ids + row for row in ids], prompt, ends), strict=True):
            end |= score
        yield {"event": "end", "rows": ends, "seconds": round(seconds, 3)}

    def _row(self, token, b):
        """What the page shows of row b of a Token."""
        best = zip(token.best_MBC[:, b].tolist(), token.best_logp_MBC[:, b].tolist(), strict=True)
        named = [[self.label(id) | {"logp": round(logp, 5)} for id, logp in zip(*pair, strict=True)] for pair in best]
        logp_M = [round(logp, 5) for logp in token.logp_MB[:, b].tolist()]
        kl = round(float(token.kl_B[b]), 5)
        return self.label(int(token.token_B[b])) | {"logp": logp_M, "kl": kl, "best": named}

    def room(self, prompt: Prompt, how: Settings) -> int:
        """The most tokens of a completion of the prompt."""
        return min(self.length(how.max_tokens), self.model.context - len(prompt.ids))

    def tokens(self, prompt, how, stages, max_tokens, *, n=1, first=0, forced=()):
        """The Tokens of n completions by each of the stages: Pretrained.stream."""
        model, *others = (self.policy(stage) for stage in stages)
        return self.model.with_policy(model).stream(
            prompt.ids, beside=others, n=n, first=first, forced=forced, max_tokens=max_tokens,
            temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, seed=how.seed,
        )  # fmt: skip

    def warm(self) -> Iterator[dict[str, Any]]:
        """Compiles what the first texts need, by writing two tokens."""
        text = next(iter(self.examples()), "")
        yield from self.compare(self.prompt(text, recipe=False), Settings(max_tokens=2))

    def label(self, id: int) -> dict[str, Any]:
        """{"id", "text"} of a token; bytes that are no whole character are written as \\xNN, and EOS says so."""
        if id in self.model.tokenizer.eos_ids:
            return {"id": id, "text": "", "special": "EOS"}
        part = self.model.tokenizer.token_bytes(id)
        if not part:
            return {"id": id, "text": "", "special": "PAD"}
        return {"id": id, "text": part.decode("utf-8", "backslashreplace")}

    def _end(self, prompt, ids, logps, reference):
        """The end of a row of ids with their log-probs [M] under each side."""
        eos_ids = self.model.tokenizer.eos_ids
        text = self.model.tokenizer.decode(ids).strip()
        end: dict[str, Any] = {"text": text, "tokens": len(ids), "ended": bool(ids) and ids[-1] in eos_ids}
        if len(self.sides) == 2:
            end["log_ratio"] = round(float(np.sum([logp_M[-1] - logp_M[0] for logp_M in logps])), 5)
        if reference:
            from rlhf_jax.evaluate.rouge import rouge

            end["rouge"] = {name: round(value, 4) for name, value in rouge([reference], [text])}
        return end

    def scores(self, rows: list[list[int]], prompt: Prompt, ends: list[dict]) -> list[dict[str, Any]]:
        """{"score"?, "parts"?, "words"?, "no_score"?} of each completion: rows of ids, and `ends` with its text.

        The reward model reads the last token. A reward of this package or of a file gets the text; a row has no column
        but the prompt, so a reward that needs others gives no score, and the reason.
        """
        found: list[dict[str, Any]] = [{} for _ in rows]
        texts = [end["text"] for end in ends]
        if not self.config.named and self.has_reward_model:
            for row, score in zip(found, self.model.score_tokens(rows).tolist(), strict=True):
                row["score"] = round(score, 5)
        elif self.config.named:
            try:
                reward = function.load(self.config.reward.kind)
                parts = reward.scores([{"prompt": prompt.text}] * len(texts), texts)
            except InputError as error:
                return [{"no_score": str(error)} for _ in rows]
            for i, row in enumerate(found):
                row["score"] = round(float(sum(values[i] for values in parts.values())), 5)
                if len(parts) > 1:
                    row["parts"] = {name.removeprefix("reward_"): round(float(x[i]), 5) for name, x in parts.items()}
        if self.config.reward.kind == "sentiment" or self.config.task == "write":
            for row, text in zip(found, texts, strict=True):
                row["words"] = [word._asdict() for word in sentiment.words(text)]
                row["vader"] = round(sentiment.compound([text])[0], 5)
        return found

    # Votes

    def duel(self, prompt: Prompt, how: Settings) -> Iterator[dict[str, Any]]:
        """A completion of each side in a random order, to be voted on without knowing whose they are.

        Yields the events of `compare`, and at last {"id", "texts", "note"}.
        """
        if len(self.sides) < 2:
            raise InputError("vote: expected a run with two finished policies, there is one")
        rows: list[dict[str, Any]] = []
        for event in self.compare(prompt, how):
            rows = event["rows"]  # the last ones are whole texts
            yield event
        order = [0, 1] if secrets.randbits(1) else [1, 0]
        shown = [rows[i] | {"stage": self.sides[i]} for i in order]
        number = secrets.token_hex(8)
        with self._lock:
            self._pairs[number] = {"prompt": prompt.text, "rows": shown, "how": how}
            while len(self._pairs) > KEPT:
                self._pairs.popitem(last=False)
        yield {"id": number, "texts": [row["text"] for row in shown], "note": prompt.note}

    def vote(self, number: str, choice: int) -> dict[str, Any]:
        """Keeps the vote for text `choice` of a pair, 0 or 1, as a preference row; returns whose texts they were.

        A choice of -1 keeps nothing, and only reveals. InputError where the reader of training refuses the row or skips
        it, such as that of an empty text or of one without an end; then nothing is written.
        """
        if choice not in (-1, 0, 1):
            raise InputError(f"choice: expected 0, 1, or -1 for none, got {choice!r}")
        with self._lock:
            pair = self._pairs.get(number)
            if pair is None:
                raise InputError(f"id: expected one of the last {KEPT} pairs that has no vote, got {number!r}")
            if choice >= 0:
                self.workdir.append_line(VOTES, self._preference(pair, choice))
            del self._pairs[number]
        return {"rows": pair["rows"], "saved": str(self.workdir / VOTES) if choice >= 0 else "", "votes": self.votes}

    def _preference(self, pair, choice):
        """The preference row of a vote, which the reader of training accepts."""
        chosen, rejected = pair["rows"][choice], pair["rows"][1 - choice]
        if chosen["text"] == rejected["text"]:
            raise InputError("choice: expected -1, as the two texts are the same")
        row: dict[str, Any] = {"prompt": pair["prompt"], "chosen": chosen["text"], "rejected": rejected["text"]}
        for column in sources.COLUMNS["preferences"]:
            if not row[column].strip():
                raise InputError(f"{column}: expected a text, got an empty one, which data.preferences refuses")
        if self.config.task != "write":
            data = self.config.data
            lengths = {"prompt_length": data.prompt_length, "cut": data.cut, "source": "vote"}
            length = data.pair_length or data.response_length
            if self.chat:
                roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
                row = {column: [_message(role, row[column])] for column, role in roles.items()}
            read = chats.row(row, sources.COLUMNS["preferences"])
            batches.encode_pairs([read], self.model.tokenizer, response_length=length, **lengths)
        stages = {"chosen_stage": chosen["stage"], "rejected_stage": rejected["stage"]}
        return row | stages | configs.tree(pair["how"])


def _message(role, content):
    return {"role": role, "content": content}


def finite(value: Any) -> Any:
    """A JSON value without NaN and infinities, which JSON does not have: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return value
