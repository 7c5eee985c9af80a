"""Writing without a prompt: pretraining on all texts, fine-tuning on the happy ones; samples start after EOS."""

import dataclasses
import functools
import random

from rlhf_jax.data import corpus
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import function
from rlhf_jax.tasks.task import Encoded, Rows, Task, stamp

Config = corpus.Config  # of the section `data`

STARTS = 65_536  # prompts of EOS alone: more than any batch
START = {"prompt": ""}


@dataclasses.dataclass(frozen=True)
class Write:
    """Tweets or stories. `reward`, named as in a config, selects the happy stories and scores samples."""

    config: corpus.Config
    seed: int  # which texts are held out
    reward: str

    name = "write"
    same_prompt = True
    questions = {"pretrain": "prompts", "sft": "prompts", "prompts": "prompts"}
    prompt_length = 1

    @property
    def response_length(self):
        return self.config.response_length

    def files(self):
        return {"data.path": self.config.path} if self.config.source == "file" else {}

    def texts(self):
        return [row["text"] for row in self.rows("pretrain").train]

    def rows(self, kind):
        return _rows(self, kind, stamp(self.files()))

    def arrays(self, kind, tokenizer):
        if kind == "prompts":
            starts = corpus.starts(STARTS, tokenizer)
            return Encoded(starts, starts)
        rows = self.rows(kind)
        make_arrays = {"pretrain": corpus.windows, "sft": corpus.openings, "preferences": corpus.pairs}[kind]
        sides, notes = [], list(rows.notes)
        for side, texts in (("train", rows.train), ("held out", rows.held_out)):
            arrays = make_arrays(texts, tokenizer, self.config.length, skip_bad=self.config.skip_bad, notes=notes)
            notes.append(f"{kind}, {side}: {len(texts)} texts, {len(arrays['index_N'])} rows")
            sides.append(arrays)
        train, held_out = sides
        return Encoded(train, held_out, tuple(notes))

    def judge(self, rows, texts):
        """{"reward": [N]} of the texts, and its components if it has several."""
        components = function.load(self.reward).scores(rows, texts)
        if "reward" in components:
            return components
        return {"reward": sum(components.values())} | components


def make(config) -> Task:
    """The task of a whole config whose `task` is write. With a learned reward, VADER scores the texts."""
    reward = "sentiment" if config.reward.kind == "learned" else config.reward.kind
    return Write(config.data, config.seed, reward)


def unused(config):
    """Fields of a whole config of this task that have no effect, and why."""
    yield "evaluation.draws", f"task is {config.task}, whose completions are not right or wrong"
    for name in ("pretrain", "sft"):
        yield f"{name}.loss_on", "a row has no prompt where task is write"
    if not config.sft.steps and config.sampled and not config.learned:
        for name in ("data.sentiment", "data.min_reward"):
            yield name, f"sft.steps is 0 and reward is {config.reward.kind}"


@functools.lru_cache(maxsize=8)
def _rows(task, kind, _):
    config = task.config
    if kind == "prompts":
        return Rows([START] * STARTS, [START] * STARTS)
    if kind == "pretrain":
        (train, held_out), notes = corpus.load(config, task.seed)
        return Rows(train, held_out, tuple(notes))
    everything = task.rows("pretrain")
    split = [_by_mood(task, side) for side in (everything.train, everything.held_out)]
    if kind == "preferences":
        sides = [_pairs(happy, others, task.seed) for happy, others in split]
    else:
        sides = [happy for happy, _ in split]
    if not all(sides):
        if config.kind == "tweets":
            why = f"data.sentiment: expected texts labelled {config.sentiment!r}"
        else:
            why = f"data.min_reward: expected texts with a reward above {config.min_reward}"
        raise InputError(f"{why} on both sides of data.held_out, got {len(sides[0])} and {len(sides[1])}")
    return Rows(*sides)


def _by_mood(task, rows):
    """(the happy rows, the others)."""
    if task.config.kind == "tweets":
        happy = [row["sentiment"] == task.config.sentiment for row in rows]
    else:
        happy = task.judge(rows, [row["text"] for row in rows])["reward"] > task.config.min_reward
    return [row for row, yes in zip(rows, happy, strict=True) if yes], [
        row for row, yes in zip(rows, happy, strict=True) if not yes
    ]


def _pairs(happy, others, seed):
    """Preference rows: each happy text is chosen over one of the others, which the seed selects."""
    if not others:
        return []
    rng = random.Random(f"pairs/{seed}")
    return [{"prompt": "", "chosen": row["text"], "rejected": rng.choice(others)["text"]} for row in happy]
