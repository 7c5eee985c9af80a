"""Questions with one right answer, from a seed: addition, sorting, reversing, and sequences to continue.

    kind      prompt     label       digits
    add       37+58=     59          2: of each number; the answer 95 stands backwards, as carries are computed
    sort      52913=     12359       5: characters
    reverse   52913=     31925       5: characters
    digits    1,3,5=     7913        4: of the answer; each term is the last digit of the one before it plus 1 or 2

Rewards that fit: `exact` (1 for the label) and `partial` (the share of its characters that are right).
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import InputError
from rlhf_jax.fields import choice, number
from rlhf_jax.rewards import answers
from rlhf_jax.tasks.task import Encoded, Rows

SHOWN = range(2, 10)  # terms of a sequence that a prompt of `digits` may show
STEPS = (1, 2)  # from term to term


@dataclasses.dataclass(frozen=True)
class Config:
    """Which questions, and how long they are."""

    kind: str = choice("add", "add", "sort", "reverse", "digits")
    digits: int = number(
        2, least=1, most=9
    )  # of each number (add), of the prompt (sort, reverse), of the answer (digits)
    rows: int = number(8_000, least=2)  # different questions at most; made from the run's seed
    # Share of the training labels with one wrong digit: fine-tuning on these ends at about 1 - wrong right answers.
    wrong: float = number(0.0, least=0, below=1)
    held_out: float = number(0.1, above=0, below=1)  # share of the questions held out for evaluation

    @property
    def prompt_length(self):
        """P, tokens: characters of the longest prompt."""
        return {"add": 2 * self.digits + 2, "digits": 2 * max(SHOWN)}.get(self.kind, self.digits + 1)

    @property
    def response_length(self):
        """R, tokens: a space, the longest answer and EOS."""
        return self.digits + (self.kind == "add") + 2

    @property
    def pair_length(self):
        """The same, of preference rows."""
        return self.response_length


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Questions and their answers; a row is {"prompt", "label"}, and "label" is what the rewards read."""

    config: Config
    seed: int  # which questions there are, and which are held out

    same_prompt = False
    questions = {"sft": "sft", "prompts": "prompts"}

    @property
    def name(self):
        return self.config.kind

    @property
    def prompt_length(self):
        return self.config.prompt_length

    @property
    def response_length(self):
        return self.config.response_length

    def files(self):
        return {}

    def texts(self):
        return [f"{row['prompt']} {row['label']}" for row in self.rows("sft").train]

    def rows(self, kind):
        if kind == "pretrain":
            raise InputError("pretrain.steps: expected 0, as only task = write has plain texts to pretrain on")
        train, held_out = _rows(self.config, self.seed)
        if kind == "sft":
            return Rows(_labelled(train, self.config.wrong, self.seed), held_out)
        if kind == "preferences":
            return Rows(_pairs(train, self.seed), _pairs(held_out, self.seed))
        return Rows(train, held_out)

    def arrays(self, kind, tokenizer):
        encode: Callable = {"sft": batches.encode_sft, "preferences": batches.encode_pairs}.get(
            kind, batches.encode_prompts
        )
        lengths = {"prompt_length": self.prompt_length, "cut": "error", "source": f"data, {kind}"}
        if kind in ("sft", "preferences"):
            lengths["response_length"] = self.response_length
        train, held_out = (encode(rows, tokenizer, **lengths)[0] for rows in self.rows(kind)[:2])
        count = f"{len(train['index_N'])} questions, {len(held_out['index_N'])} held out"
        return Encoded(train, held_out, (f"data, {self.config.kind}: {count}",))

    def judge(self, rows, texts):
        """{"exact": 1 where the completion is the label}"""
        return {"exact": np.array(answers.exact(rows, texts))}


def make(config) -> Arithmetic:
    """The task of a whole config whose `task` is arithmetic."""
    return Arithmetic(config.data, config.seed)


def unused(config) -> Iterator[tuple[str, str]]:
    """Fields of a whole config of this task that have no effect, and why: none."""
    yield from ()


@functools.lru_cache(maxsize=8)
def _rows(config, seed):
    """(train, held out): different questions in an order of the seed."""
    rng, found = random.Random(f"arithmetic/{seed}"), {}
    digits = config.digits
    if config.kind == "digits":
        every = list(itertools.product(range(10), STEPS, SHOWN))
        rng.shuffle(every)
        found = dict(_continued(*each, digits) for each in every[: config.rows])
    else:
        smallest = 10 ** (digits - 1) if digits > 1 else 0
        possible = (10**digits - smallest) ** 2 if config.kind == "add" else 10**digits
        make_one = {"add": _added, "sort": _sorted, "reverse": _reversed}[config.kind]
        while len(found) < min(config.rows, possible * 9 // 10):  # the last few would take many tries
            prompt, label = make_one(rng, digits, smallest)
            found[prompt] = label
    rows = [{"prompt": prompt, "label": label} for prompt, label in found.items()]
    try:
        return batches.split(rows, config.held_out, seed)
    except InputError as error:
        raise InputError(f"data.held_out: {error}") from None


def _added(rng, digits, smallest):
    a, b = (rng.randrange(smallest, 10**digits) for _ in range(2))
    return f"{a}+{b}=", str(a + b)[::-1]


def _sorted(rng, digits, _):
    text = "".join(rng.choices("0123456789", k=digits))
    return f"{text}=", "".join(sorted(text))


def _reversed(rng, digits, _):
    text = "".join(rng.choices("0123456789", k=digits))
    return f"{text}=", text[::-1]


def _continued(first, step, shown, digits):
    terms = [str((first + step * i) % 10) for i in range(shown + digits)]
    return f"{','.join(terms[:shown])}=", "".join(terms[shown:])


def _labelled(rows, wrong, seed):
    """The rows, a share of them with a wrong label."""
    found = []
    for row in rows:
        rng = random.Random(f"labels/{seed}/{row['prompt']}")
        found.append(row | {"label": _altered(row["label"], rng)} if rng.random() < wrong else row)
    return found


def _pairs(rows, seed):
    """Preference rows: the label is chosen over one with another digit."""
    rngs = (random.Random(f"pairs/{seed}/{row['prompt']}") for row in rows)
    return [
        row | {"chosen": row["label"], "rejected": _altered(row["label"], rng)}
        for row, rng in zip(rows, rngs, strict=True)
    ]


def _altered(label, rng):
    """The label with one other digit."""
    place = rng.randrange(len(label))
    other = str((int(label[place]) + rng.randrange(1, 10)) % 10)
    return label[:place] + other + label[place + 1 :]
