"""The embedded task: a small world of people who ask strangers for advice, as a TFDS data set written from a seed.

A post states who did what, how its writer feels, and a question (the hidden record, whose words are in
`rewards/gold.py`). It ends with a remark that uses other words of the same lists: "ps years ago my uncle sold my
bike .". Labels come from writers of mixed skill, so reinforcement learning can improve on imitation:

    writer     share  what is written                                gold: mean   sd
    careful      .30  the whole record in 12 words                         1.00  .00
    forgetful    .30  one or two slots left out                             .62  .13
    careless     .05  one or two words wrong, from a remark if possible     .33  .24
    rambling     .20  the whole record and four to six idle words           .73  .04
    vague        .15  one slot or none                                      .13  .13
    all         1.00                                                        .67  .31

A pair is two such summaries of one post. The preferred one has the higher gold score, except that noise flips 7% of
the pairs.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from random import Random

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.proto import tf_example_pb2

from rlhf_jax.data.tldr import format_query
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import gold

FEATURES = {
    "sft": ("prompt", "label", "record"),
    "preferences": ("prompt", "chosen", "rejected", "record"),
    "prompts": ("prompt", "record"),
}
SPLITS = ("train", "validation")
NOISE = 0.1  # tau: summary a is preferred to b with probability sigmoid((gold(a) - gold(b)) / tau)

SUBREDDITS = ("advice", "family", "people", "home", "today", "help")
TITLES = (
    "my {who} and i", "trouble with my {who}", "help with my {who}", "unsure what to do",
    "need some advice", "a bad day", "am i wrong here", "long story short",
)  # fmt: skip
EVENTS = (
    "last night my {who} {verb} my {object} .", "today my {who} {verb} my {object} .",
    "on monday my {who} {verb} my {object} .", "so my {who} just {verb} my {object} .",
    "i found out my {who} {verb} my {object} .", "we fought when my {who} {verb} my {object} .",
    "guess who {verb} my {object} ? my {who} .",
)  # fmt: skip
MOODS = (
    "honestly i feel so {feeling} .", "now i am {feeling} .",
    "this makes me {feeling} .", "i have been {feeling} all day .",
    "since then i feel {feeling} .", "deep down i am {feeling} .",
)  # fmt: skip
ASKS = (
    "should i {ask} ?", "i wonder if i should {ask} .",
    "is it time to {ask} ?", "would it be wrong to {ask} ?",
    "part of me wants to {ask} .", "do you think i can {ask} ?",
)  # fmt: skip
REMARKS = (
    "my {who} says hi .", "my {who} was not there .",
    "years ago my {who} {verb} my {object} .", "once a stranger {verb} my {object} .",
    "at least nobody {verb} my {object} .", "my {who} thinks i am {feeling} .",
    "i was never {feeling} before .", "do not tell me to {ask} .",
    "my {who} would never {ask} .", "others may {ask} but not me .",
)  # fmt: skip
OPENINGS = ("ok so here is the thing", "i will keep this one short", "hi all first time poster here")
CLOSINGS = ("thanks for reading all this .", "any help would be great .", "edit : fixed some typos .")
VAGUE = (
    "i need some advice about my life .", "things are bad and i need help .",
    "it is a long story , what now ?", "there was trouble with my {who} .",
    "i feel {feeling} , please help .", "should i {ask} or not ?",
)  # fmt: skip
SLOTS = (("who",), ("verb", "object"), ("feeling",), ("ask",))

Record = dict[str, str]  # field -> word, the fields of gold.VOCABULARY
Remarked = dict[str, str]  # field -> the word that the post's remark uses


def draw_record(rng: Random) -> Record:
    return {field: rng.choice(words) for field, words in gold.VOCABULARY.items()}


def another(field: str, record: Record, rng: Random) -> str:
    """A word of the field that is not the record's."""
    return rng.choice([word for word in gold.VOCABULARY[field] if word != record[field]])


def write_post(record: Record, rng: Random) -> tuple[str, Remarked]:
    """A post about the record as a TL;DR query, and the words its remark uses."""
    sentences = [rng.choice(templates).format(**record) for templates in (EVENTS, MOODS, ASKS)]
    remark = rng.choice(REMARKS)
    remarked = {field: another(field, record, rng) for field in record if f"{{{field}}}" in remark}
    rng.shuffle(sentences)
    sentences.append(f"ps {remark.format(**remarked)}")
    post = sentences[0] + "".join(rng.choice((" ", " ", "\n")) + sentence for sentence in sentences[1:])
    title = rng.choice(TITLES).format(**record)
    return format_query(rng.choice(SUBREDDITS), title, post), remarked


def compose(named: Mapping[str, str], rng: Random) -> str:
    """One or two sentences with the words in `named`; a missing `who` or `verb` becomes a vague phrase."""
    who = f"my {named['who']}" if "who" in named else "somebody"
    what = f"{named['verb']} my {named['object']}" if "verb" in named else "upset me"
    story = f"{who} {what}"
    if "feeling" in named:
        mood = f"{rng.choice(('i feel', 'i am'))} {named['feeling']}"
        story = rng.choice((f"{story} and {mood}", f"{mood} because {story}"))
    if "ask" not in named:
        return f"{story} ."
    ask = f"should i {named['ask']} ?"
    return rng.choice((f"{story} , {ask}", f"{ask} {story} ."))


def careful(record: Record, remarked: Remarked, rng: Random) -> str:
    return compose(record, rng)


def forgetful(record: Record, remarked: Remarked, rng: Random) -> str:
    forgotten = sum(rng.sample(SLOTS, rng.choice((1, 2))), ())
    return compose({field: word for field, word in record.items() if field not in forgotten}, rng)


def careless(record: Record, remarked: Remarked, rng: Random) -> str:
    fields = rng.sample(list(record), rng.choice((1, 2)))
    wrong = {field: remarked.get(field) or another(field, record, rng) for field in fields}
    return compose(record | wrong, rng)


def rambling(record: Record, remarked: Remarked, rng: Random) -> str:
    summary = compose(record, rng)
    return rng.choice((f"{rng.choice(OPENINGS)} {summary}", f"{summary} {rng.choice(CLOSINGS)}"))


def vague(record: Record, remarked: Remarked, rng: Random) -> str:
    return rng.choice(VAGUE).format(**record)


WRITERS = {careful: 0.30, forgetful: 0.30, careless: 0.05, rambling: 0.20, vague: 0.15}  # writer -> share of summaries


def write_summary(record: Record, remarked: Remarked, rng: Random) -> str:
    (writer,) = rng.choices(list(WRITERS), list(WRITERS.values()))
    return writer(record, remarked, rng)


def write_pair(record: Record, remarked: Remarked, rng: Random) -> tuple[str, str]:
    """(chosen, rejected): two writers' summaries, compared by gold with Bradley-Terry noise; ties are sampled again."""
    while True:
        a, b = (write_summary(record, remarked, rng) for _ in range(2))
        gap = gold.score(record, a) - gold.score(record, b)
        if gap:
            return (a, b) if rng.random() < 1 / (1 + math.exp(-gap / NOISE)) else (b, a)


def generate(kind: str, split: str, seed: int) -> Iterator[dict]:
    """Yields rows of one kind and split without end; the same seed gives the same rows. `record` is a dict."""
    rng = Random(f"{seed}/{kind}/{split}")
    while True:
        record = draw_record(rng)
        prompt, remarked = write_post(record, rng)
        row = {"prompt": prompt, "record": record}
        if kind == "sft":
            row["label"] = write_summary(record, remarked, rng)
        elif kind == "preferences":
            row["chosen"], row["rejected"] = write_pair(record, remarked, rng)
        yield row


@dataclasses.dataclass(kw_only=True, eq=False)
class Config(tfds.core.BuilderConfig):
    """A data set: a kind of FEATURES, a seed, and the number of rows of each split; its name contains them all."""

    name: str = dataclasses.field(init=False)
    kind: str
    seed: int
    train: int
    validation: int

    def __post_init__(self):
        if self.kind not in FEATURES:
            raise InputError(f"kind: expected one of {', '.join(FEATURES)}; got {self.kind!r}")
        for split in SPLITS:
            if getattr(self, split) < 1:
                raise InputError(f"{split}: expected at least 1 row; got {getattr(self, split)}")
        # TFDS finds a prepared data set by this name, so it must differ wherever the rows do.
        self.name = f"{self.kind}_seed{self.seed}_train{self.train}_validation{self.validation}"


class World(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no types
    """The world as a TFDS builder: every feature is text, and `record` is JSON."""

    VERSION = tfds.core.Version("1.4.0")  # raise it with every change of the rows, or old ones are read

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {name: tfds.features.Text() for name in FEATURES[self.builder_config.kind]}
        features = tfds.features.FeaturesDict(texts)
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        rows = generate(config.kind, split, config.seed)
        for i, row in enumerate(islice(rows, getattr(config, split))):
            yield i, row | {"record": json.dumps(row["record"])}


def load(kind: str, split: str, *, seed: int, train: int, validation: int, data_dir: str | os.PathLike) -> list[dict]:
    """The rows of a split, in order, from the data set under `data_dir`, which is written first if it does not exist.

    Raises InputError for an unknown kind or split, an empty split, or a folder that cannot be written.
    """
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}; got {split!r}")
    config = Config(kind=kind, seed=seed, train=train, validation=validation)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES  # one text per feature; TFDS's own decoding is three times slower
    source = _prepare(config, data_dir).as_data_source(split, deserialize_method=raw)
    rows = []
    for example in source.__getitems__(range(len(source))):  # all at once: half the time of one by one
        features = tf_example_pb2.Example.FromString(example).features.feature
        row = {name: features[name].bytes_list.value[0].decode() for name in FEATURES[kind]}
        rows.append(row | {"record": json.loads(row["record"])})
    return rows


def _prepare(config: Config, data_dir: str | os.PathLike) -> World:
    """Writes the data set if it is missing. TFDS renames its folder last: a killed run leaves no partial data set."""
    with _quiet():
        try:
            World(config=config, data_dir=data_dir).download_and_prepare(file_format="array_record")
        except OSError as error:
            if not World(config=config, data_dir=data_dir).is_prepared():  # or another process renamed its folder first
                raise InputError(f"data_dir: cannot write {os.fspath(data_dir)}: {error.strerror or error}") from error
        return World(config=config, data_dir=data_dir)  # a new one: one made before the files lacks the splits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS, which shows bars, prints two lines, and warns of configurations that it does not list."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
