import dataclasses
import functools
import math

import pytest

from rlhf_jax import config, fields
from rlhf_jax.algorithms import ALGORITHMS, POLICY, policy, ppo
from rlhf_jax.training import optim
from tests.support import error


def refusal(value):
    """What `check` says of it."""
    return error(fields.check, value)


# By hand


@dataclasses.dataclass(frozen=True)
class Inner:
    share: float = fields.number(0.5, above=0, below=1)
    places: int = fields.number(0, least=2, most=4, or_zero=True)
    colour: str = fields.choice("red", "red", "blue")
    free: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int = fields.number(3, least=1)
    inner: Inner = Inner()
    start: int = fields.number(1, least=0)
    fast: bool = fields.neutral(False)
    lanes: int = fields.number(1, least=1, neutral=True)

    def problems(self):
        if self.start > self.steps:
            yield "start", f"at most steps = {self.steps}"
        if self.steps == 7:
            yield "steps", "no 7"


@pytest.mark.parametrize(
    "changes",
    [{}, {"share": 1e-30}, {"share": 0.9999}, {"places": 2}, {"places": 4}, {"places": 0}, {"colour": "blue"}],
)
def test_what_is_in_range_is_not_refused(changes):
    fields.check(Inner(**changes))
    fields.check(Outer(inner=Inner(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "share: expected more than 0 and less than 1, got 0.0"),
        ({"share": 1.0}, "share: expected more than 0 and less than 1, got 1.0"),
        ({"share": math.nan}, "share: expected more than 0 and less than 1, got nan"),
        ({"places": 1}, "places: expected 0, or at least 2 and at most 4, got 1"),
        ({"places": 5}, "places: expected 0, or at least 2 and at most 4, got 5"),
        ({"places": -1}, "places: expected 0, or at least 2 and at most 4, got -1"),
        ({"colour": "green"}, "colour: expected red or blue, got 'green'"),
        ({"colour": ""}, "colour: expected red or blue, got ''"),
    ],
)
def test_what_is_out_of_range_is_refused_by_its_path(changes, message):
    assert refusal(Inner(**changes)) == message
    assert refusal(Outer(inner=Inner(**changes))) == f"inner.{message}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.1e9])
def test_a_range_without_limits_has_finite_numbers_alone(value):
    assert value not in fields.Range() and value not in fields.Range(or_zero=True)
    assert 0 in fields.Range() and -1e9 in fields.Range() and fields.LARGEST in fields.Range()


def test_a_problem_of_several_fields_is_refused():
    fields.check(Outer(steps=2, start=2))
    assert refusal(Outer(steps=2, start=3)) == "start: expected at most steps = 2, got 3"
    assert refusal(Outer(steps=7)) == "steps: expected no 7, got 7"

    @dataclasses.dataclass(frozen=True)
    class Whole:
        part: Outer = Outer(steps=2, start=3)

    assert refusal(Whole()) == "part.start: expected at most steps = 2, got 3"


def test_ranges_are_checked_before_problems():
    assert refusal(Outer(steps=0, start=3)) == "steps: expected at least 1, got 0"


def test_significant_is_all_but_the_neutral_fields():
    inner = {"share": 0.5, "places": 0, "colour": "red", "free": 0.0}
    assert fields.significant(Outer()) == {"steps": 3, "start": 1, "inner": inner}


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Place:
        there: str = fields.path()
        kind: str = fields.path("learned", neutral=True)
        text: str = ""

    @dataclasses.dataclass(frozen=True)
    class Whole:
        place: Place = Place(there="~/a/~b", kind="~/x.py:f", text="~/c")

    monkeypatch.setenv("HOME", "/home/me")
    assert fields.expanded(Whole()).place == Place(there="/home/me/a/~b", kind="/home/me/x.py:f", text="~/c")
    assert fields.expanded(Place()) == Place()
    assert fields.significant(Place()) == {"there": "", "text": ""}


@dataclasses.dataclass(frozen=True)
class Partly(Outer):
    steps: int = fields.number(4, least=1)
    from_: str = fields.path()  # a folder
    # Above,
    # and
    late: int = 2  # beside

    def unused(self):
        yield "from_", "this"
        yield "inner.free", "that"
        if self.fast:
            yield "inner", "fast is True"


def test_unused_are_paths_as_flags_have_them_with_the_reason():
    """A section stands for its fields; the first reason counts."""
    assert fields.unused(Partly()) == {"from": "this", "inner.free": "that"}
    inner = dict.fromkeys(("inner.share", "inner.places", "inner.colour"), "fast is True")
    assert fields.unused(Partly(fast=True)) == {"from": "this", "inner.free": "that"} | inner
    outer = dataclasses.make_dataclass("Whole", [("part", Partly, Partly())], frozen=True)
    assert fields.unused(outer()) == {"part.from": "this", "part.inner.free": "that"}
    assert fields.unused(Outer()) == {}


def test_leaves_have_the_names_of_flags():
    found = [(path, value) for path, _, value in fields.leaves(Partly(from_="a"))]
    assert found[:2] == [("steps", 4), ("inner.share", 0.5)] and found[-2:] == [("from", "a"), ("late", 2)]


def test_comments_stand_beside_a_field_or_above_it():
    assert fields.comments(Partly) == {"from_": "a folder", "late": "Above, and beside"}
    assert fields.comments(ppo.Config)["lr"] == "peak learning rate"  # of the class that it comes from
    assert fields.comments(ppo.Config)["steps"] == "rollouts"


def test_numbers_are_the_numeric_fields_by_their_paths():
    found = dict(fields.numbers(Outer()))
    assert list(found) == ["steps", "inner.share", "inner.places", "inner.free", "start", "lanes"]
    assert found["inner.places"].metadata["range"].most == 4 and "range" not in found["inner.free"].metadata


# The configs: every dataclass that a run of either task has, whatever they are; and those that others inherit


Bases = dataclasses.make_dataclass(
    "Bases", [("optim", optim.Config, optim.Config()), ("policy", policy.Config, policy.Config())], frozen=True
)
WHOLE = {"summarize": config.Config(), "write": config.write(), "bases": Bases()}


def leaves(value, path=""):
    """(path, dataclass field) of every field that is no dataclass."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field


def replaced(value, path, new):
    """The dataclass with another value at a path: replaced(config, "ppo.steps", 3)."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(value, **{name: replaced(getattr(value, name), rest, new) if rest else new})


def changed(task, /, **changes):
    """The defaults of the task with these values at these paths."""
    return functools.reduce(lambda whole, item: replaced(whole, *item), changes.items(), WHOLE[task])


def of_tasks(found):
    """{(task, path): field} of the fields that found(config) yields, those of an algorithm once."""
    pairs = ((task, path, field) for task, whole in WHOLE.items() for path, field in found(whole))
    return {
        (task, path): field for task, path, field in pairs if task != "write" or path.split(".")[0] not in ALGORITHMS
    }


NUMBERS = of_tasks(fields.numbers)
CHOICES = {key: field for key, field in of_tasks(leaves).items() if "choices" in field.metadata}
STAGES = ("pretrain", "sft", "reward", *ALGORITHMS)


def having(task, key):
    """The paths of the task's fields with this in their metadata."""
    return {path for path, field in leaves(WHOLE[task]) if field.metadata.get(key)}


@pytest.mark.parametrize("task", WHOLE)
def test_the_defaults_are_in_their_ranges(task):
    fields.check(WHOLE[task])


@pytest.mark.parametrize("task", WHOLE)
def test_every_field_is_a_number_a_text_or_a_switch(task):
    """What a number is, is told by its default: none may hide behind another type."""
    for path, field in leaves(WHOLE[task]):
        assert field.type in (int, float, str, bool), path
        value = functools.reduce(getattr, path.split("."), WHOLE[task])
        assert type(value) is field.type, path


@pytest.mark.parametrize(("task", "path"), NUMBERS)
def test_every_number_has_a_range_that_excludes_what_is_no_sane_number(task, path):
    """A reward may be negative, and -1 stands for what is found; every other number is at least 0."""
    assert "range" in NUMBERS[task, path].metadata
    for value in math.nan, math.inf, -math.inf, 1e30:
        assert refusal(changed(task, **{path: value})).startswith(f"{path}: expected ")
    if path == "data.min_reward":
        fields.check(changed(task, **{path: -1.0}))
    elif path in ("mesh.data", "hosts.index"):
        assert refusal(changed(task, **{path: -2})).startswith(f"{path}: expected at least -1")
    else:
        assert refusal(changed(task, **{path: -1})).startswith(f"{path}: expected ")


@pytest.mark.parametrize(("task", "path"), CHOICES)
def test_a_choice_is_one_of_its_words(task, path):
    assert refusal(changed(task, **{path: "other"})).startswith(f"{path}: expected ")


def test_which_fields_are_choices():
    both = {
        *("task", "algorithm", "text.kind", "model.dtype", "evaluation.result", "guard.action", "doctor"),
        *("model.norm", "model.feed_forward", "model.biases"),
        *(f"{name}.schedule" for name in STAGES),
        *("pretrain.loss_on", "sft.loss_on", "ppo.value_init", "policy_gradient.baseline", "reinforce_pp.baseline"),
        *(f"{name}.{field}" for name in POLICY for field in ("missing_eos", "reduction", "kl")),
        *(f"{name}.{field}" for name in ("rloo", "grpo", "dr_grpo", "dapo") for field in ("baseline", "scale")),
        *(f"{name}.{field}" for name in ("dpo", "online_dpo") for field in ("loss", "total")),
    }
    assert having("summarize", "choices") == both | {"data.source", "data.cut", "data.world_labels"}
    assert having("write", "choices") == both | {"data.kind", "data.source", "data.sentiment"}


def test_which_fields_are_paths():
    both = {"text.path", "text.template", "model.init", "reward.kind", "data.cache"}
    both |= {f"{name}.from_" for name in ("pretrain", "sft", "reward")}
    assert having("summarize", "path") == both | {"data.sft", "data.preferences", "data.prompts"}
    assert having("write", "path") == both | {"data.path"}


def test_which_fields_are_neutral():
    both = {
        *(f"{name}.{field}" for name in STAGES for field in ("microbatches", "save_every")),
        *(f"{name}.{field}" for name in POLICY for field in ("lanes", "widths", "trace_epochs")),
        *(f"{name}.from_" for name in ("pretrain", "sft", "reward")),
        *(
            "model.remat",
            *("mesh.data", "mesh.fsdp", "mesh.tensor"),
            *(f"hosts.{name}" for name in ("coordinator", "count", "index", "wait", "lost")),
            "data.cache",
            "evaluation.batch",
            "evaluation.samples",
            "keep.last",
            "keep.best",
            "trace.every",
            "log",
            "doctor",
        ),
    }
    assert having("summarize", "neutral") == having("write", "neutral") == both


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("summarize", changes)
        for changes in (
            {"sft.steps": 0, "sft.warmup": 10},  # a stage that is left out
            {"sft.steps": 10, "sft.warmup": 10},
            {"ppo.steps": 2, "ppo.epochs": 4, "ppo.minibatches": 2, "ppo.warmup": 16},
            # Whoever tries a config with fewer steps need not change its warm-up.
            *({f"{name}.steps": 1, f"{name}.warmup": 99} for name in STAGES),
            {"ppo.batch": 12, "ppo.minibatches": 3, "ppo.microbatches": 2, "ppo.lanes": 4},
            {"ppo.batch": 10, "ppo.kl_horizon": 2},  # no target: the horizon is not read
            {"ppo.batch": 10, "ppo.kl_horizon": 3, "ppo.kl_target": 6.0},
            {"model.rotary_share": 1.0},
            {"model.head_size": 8, "model.rotary_share": 0.25},
        )
    ]
    + [("write", {"data.source": "file", "data.path": "tweets.csv"})],
)
def test_fields_that_go_together(task, changes):
    fields.check(changed(task, **changes))


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        *(
            ("summarize", *case)
            for case in (
                ({"sft.microbatches": 3}, "sft.batch: expected a multiple of minibatches x microbatches = 3, got 128"),
                (
                    {"reward.microbatches": 3},
                    "reward.batch: expected a multiple of minibatches x microbatches = 3, got 64",
                ),
                ({"policy_gradient.microbatches": 3}, "policy_gradient.batch: expected a multiple of "),
                (
                    {"ppo.batch": 12, "ppo.minibatches": 2, "ppo.microbatches": 4},
                    "ppo.batch: expected a multiple of minibatches x microbatches = 8, got 12",
                ),
                ({"model.rotary_share": 0.01}, "model.rotary_share: expected 0, or a share of "),
                ({"model.rotary_share": 0.02}, "model.rotary_share: expected 0, or a share of "),
                ({"model.rotary_share": 0.05}, "model.rotary_share: expected 0, or a share of "),
                ({"model.kv_heads": 5}, "model.kv_heads: expected 0, or a divisor of heads = "),
                (
                    {"model.rotary_slow": 4.0},
                    "model.rotary_fast: expected more than rotary_slow = 4, got 4.0",
                ),
                ({"data.split": ""}, "data.split: expected the name of one, got ''"),
            )
        ),
        *(
            ("summarize", {f"{name}.{field}": value for field, value in changes.items()}, f"{name}.{message}")
            for name in ("ppo", "policy_gradient")
            for changes, message in (
                ({"batch": 12, "lanes": 5}, "lanes: expected 0, or a divisor of batch = 12, got 5"),
                ({"top_k": 50}, "top_k: expected 0 in training ("),
                ({"top_p": 0.9}, "top_p: expected 1 in training ("),
                (
                    {"batch": 10, "kl_target": 6.0, "kl_horizon": 2},
                    "kl_horizon: expected more than 0.2 batch = 2, to keep kl_coef positive, got 2",
                ),
            )
        ),
        ("write", {"data.split": ""}, "data.split: expected the name of one, got ''"),
        ("write", {"data.source": "file"}, "data.path: expected a file where source is file, got ''"),
        ("write", {"data.path": "a.csv"}, "data.path: expected none where source is made, got 'a.csv'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(task, changes, message):
    """Top-k and top-p in training: invariant 3."""
    assert refusal(changed(task, **changes)).startswith(message)


# What is said of fields, and which of them have no effect


def sections(value, path=""):
    """(path, dataclass) of a config and of the dataclasses in it."""
    yield path, value
    for field in dataclasses.fields(value):
        if dataclasses.is_dataclass(inner := getattr(value, field.name)):
            yield from sections(inner, f"{path}{field.name}.")


@pytest.mark.parametrize("task", ["summarize", "write"])
def test_every_field_and_every_section_says_what_it_is(task):
    """`--help` shows it."""
    for path, section in sections(WHOLE[task]):
        assert type(section).__doc__.split("(")[0].strip() != type(section).__name__, path
        said = fields.comments(type(section))
        inner = {field.name for field in dataclasses.fields(section) if isinstance(field.default, str | int | float)}
        assert inner <= said.keys(), path


HUB = {"data.source": "hub", "data.held_out_split": "validation"}
FILES = {"data.source": "files", "data.prompts": "p.jsonl", "text.kind": "gpt2"}
MINE = FILES | {"reward.kind": "sentiment", "sft.steps": 0}

UNUSED = [
    *(("summarize", {}, f"data.{name}") for name in ("sft", "prompts")),
    ("summarize", {"data.preferences": "votes.jsonl"}, "data.world_preferences"),
    ("summarize", {"data.preferences": "votes.jsonl"}, "data.world_labels"),
    ("summarize", {}, "data.columns.label"),
    ("summarize", {}, "data.split"),
    ("summarize", {}, "data.held_out"),
    ("summarize", {}, "data.skip_bad"),
    ("summarize", HUB, "data.held_out"),
    ("summarize", HUB, "data.world_seed"),
    ("summarize", FILES, "data.held_out_split"),
    ("summarize", FILES, "data.world_sft"),
    ("summarize", FILES, "data.cache"),
    ("summarize", MINE, "data.sft"),
    ("summarize", MINE, "data.columns.label"),
    ("summarize", MINE, "data.preferences"),
    ("summarize", MINE, "data.columns.chosen"),
    ("summarize", MINE, "data.pair_length"),
    ("summarize", MINE, "reward.lr"),
    ("summarize", MINE, "reward.normalize_before"),
    ("summarize", {"algorithm": "dpo"}, "reward.lr"),
    ("summarize", {"algorithm": "dpo", "reward.kind": "gold"}, "reward.holdout_judge"),
    *(("summarize", {"algorithm": "dpo"}, f"evaluation.{name}") for name in ("result", "best_by")),
    ("summarize", {"algorithm": "dpo"}, "alarms.over_optimization"),
    ("summarize", MINE, "sft.lr"),
    ("summarize", MINE, "model.dropout"),
    ("summarize", {"reward.kind": "gold"}, "reward.from"),
    ("summarize", {"sft.steps": 0}, "sft.from"),
    ("summarize", {}, "pretrain.loss_on"),
    ("summarize", {"text.kind": "bpe"}, "text.path"),
    ("summarize", {"text.kind": "char"}, "text.vocab_size"),
    ("summarize", {}, "text.vocab_size"),
    ("summarize", {}, "policy_gradient.lr"),
    ("summarize", {"algorithm": "policy_gradient"}, "ppo.clip"),
    ("summarize", {}, "ppo.kl_horizon"),
    ("summarize", {"ppo.kl_target": 3.0, "ppo.kl_coef": 0.0}, "ppo.kl_target"),
    ("summarize", {"ppo.schedule": "constant"}, "ppo.end_lr"),
    ("summarize", {"ppo.epochs": 1}, "ppo.clip"),
    ("summarize", {"ppo.epochs": 1}, "ppo.value_clip"),
    ("summarize", {}, "guard.limit"),
    ("summarize", {}, "alarms.patience"),
    ("summarize", {}, "alarms.freeze"),
    *(("summarize", {}, f"model.rotary_{name}") for name in ("base", "factor", "context", "slow", "fast")),
    ("summarize", {"model.rotary_share": 1.0}, "model.rotary_context"),
    ("summarize", {"model.feed_forward": "swiglu"}, "model.exact_gelu"),
    ("summarize", {"model.window": 4096}, "model.window"),
    ("summarize", {}, "lora.alpha"),
    ("summarize", {}, "lora.products"),
    ("summarize", {"model.init": "gpt2"}, "model.init_std"),
    ("summarize", {"model.fused": True}, "model.fused"),
    ("write", {}, "policy_gradient.importance"),
    ("write", {"policy_gradient.reward_to_go": False}, "policy_gradient.gamma"),
    ("write", {}, "sft.loss_on"),
    ("write", {}, "data.min_reward"),
    ("write", {"data.kind": "stories"}, "data.sentiment"),
    ("write", {"data.kind": "stories"}, "data.columns.sentiment"),
    ("write", {"sft.steps": 0}, "data.sentiment"),
    ("write", {}, "data.columns.text"),
    ("write", {}, "data.skip_bad"),
    ("write", {}, "data.held_out_split"),
    ("write", {"data.source": "file", "data.path": "t.csv"}, "data.made_seed"),
    ("write", {"data.source": "file", "data.path": "t.csv"}, "data.made"),
]


@pytest.mark.parametrize(("task", "changes", "field"), UNUSED)
def test_fields_without_effect(task, changes, field):
    assert field in fields.unused(changed(task, **changes))


# Fields that always have an effect. A new field is here, or its dataclass says in `unused` when it has none.
ALWAYS = {
    *(
        "seed",
        "seeds",
        "task",
        "algorithm",
        "text.kind",
        "text.template",
        "deterministic",
        "reward.kind",
        "pretrain.steps",
        "sft.steps",
    ),
    *("data.source", "data.kind", "data.path", "data.prompt_length", "data.cut", "data.response_length", "data.length"),
    *(f"model.{name}" for name in ("layers", "heads", "head_size", "width", "context", "vocab_size", "rotary_share")),
    *(f"model.{name}" for name in ("parallel_residual", "tied", "norm_eps", "dtype", "remat", "init")),
    *(f"model.{name}" for name in ("kv_heads", "feed_forward", "feed_forward_size", "norm", "qk_norm", "biases")),
    *("lora.rank", "mesh.data", "mesh.fsdp", "mesh.tensor"),
    *(f"hosts.{name}" for name in ("coordinator", "count", "index", "wait", "lost")),
    *(f"evaluation.{name}" for name in ("prompts", "batch", "temperature", "samples")),
    *("keep.last", "keep.best", "guard.action", "trace.every", "log", "doctor"),
}


def test_for_every_field_it_is_decided_whether_it_may_have_no_effect():
    whole = {task: {path for path, *_ in fields.leaves(WHOLE[task])} for task in ("summarize", "write")}
    found = set()
    for task, changes, _ in UNUSED:
        found |= fields.unused(changed(task, **changes)).keys()
    assert found <= whole["summarize"] | whole["write"]
    assert whole["summarize"] | whole["write"] == found | ALWAYS
    assert not found & ALWAYS


def given(task, *names, **changes):
    """The notes on a config whose fields `names` are flags, or what is refused."""
    return config.check_given(changed(task, **changes), set(names))


@pytest.mark.parametrize(
    ("task", "changes", "names", "message"),
    [
        (
            "summarize",
            {"data.sft": "x.jsonl"},
            ["data.sft"],
            "data.sft: 'x.jsonl' has no effect, as source is world (--config=...:files or --config.data.source=files",
        ),
        (
            "summarize",
            {"text.kind": "bpe", "text.path": "x"},
            ["text.path"],
            "text.path: 'x' has no effect, as kind is",
        ),
        (
            "summarize",
            {},
            ["ppo.lr", "policy_gradient.lr"],
            "policy_gradient.lr: 0.0003 has no effect, as algorithm is",
        ),
        ("write", {"sft.steps": 0, "sft.from_": "x"}, ["sft.from"], "sft.from: 'x' has no effect, as sft.steps is 0"),
        (
            "summarize",
            {"sft.warmup": 912},
            ["sft.warmup"],
            "sft.warmup: expected at most sft.steps = 911, got 912",
        ),
        (
            "summarize",
            {"ppo.steps": 1, "ppo.warmup": 5},
            ["ppo.warmup"],
            "ppo.warmup: expected at most ppo.steps x epochs x minibatches = 4, got 5",
        ),
    ],
)
def test_a_flag_without_effect_is_refused(task, changes, names, message):
    assert error(given, task, *names, **changes).startswith(message)


@pytest.mark.parametrize(
    ("task", "changes", "names", "notes"),
    [
        ("summarize", {"data.sft": "x.jsonl", "text.kind": "bpe", "text.path": "x"}, ["algorithm", "ppo.lr"], []),
        ("summarize", {}, ["data.sft", "data.split_", "ppo.kl_coef"], []),  # an empty name asks for nothing
        (
            "summarize",
            FILES | {"reward.kind": "gold"},
            ["data.world_sft", "data.cache", "reward.steps", "data.world_prompts", "reward.kind"],
            ["source is files: data.world_sft, data.world_prompts", "reward is gold: reward.steps"],
        ),
        ("write", {"algorithm": "ppo"}, ["policy_gradient.epochs"], ["algorithm is ppo: policy_gradient.epochs"]),
        ("summarize", {"sft.steps": 9, "sft.warmup": 12}, ["sft.steps"], ["sft.warmup = 12 (of 9)"]),
        ("summarize", {"sft.steps": 9, "sft.warmup": 9}, ["sft.warmup"], []),
    ],
)
def test_what_a_config_file_has_and_sizes_that_are_given_are_not_refused(task, changes, names, notes):
    """A command line may serve several configs; the sizes that it has for nothing are noted."""
    found = given(task, *names, **changes)
    assert len(found) == len(notes) and all(note in line for note, line in zip(notes, found, strict=True))


@pytest.mark.parametrize(
    ("task", "changes", "refused"),
    [
        ("summarize", {"data.sft": "x.jsonl"}, "data.sft: "),
        ("summarize", {"text.kind": "char", "text.path": "x"}, "text.path: "),
        ("summarize", {"reward.kind": "gold", "reward.from_": "x"}, "reward.from: "),
        ("summarize", {"policy_gradient.lr": 0.1, "guard.limit": 3}, ""),
    ],
)
def test_in_python_only_a_file_that_is_not_read_is_refused(task, changes, refused):
    if refused:
        assert error(config.check_given, changed(task, **changes)).startswith(refused)
    else:
        assert config.check_given(changed(task, **changes)) == []
