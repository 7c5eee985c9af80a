import dataclasses
import functools
import math

import pytest

from rlhf_jax import config, fields
from rlhf_jax.algorithms import policy
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


NUMBERS = {(task, path): field for task, whole in WHOLE.items() for path, field in fields.numbers(whole)}
CHOICES = {
    (task, path): field for task, whole in WHOLE.items() for path, field in leaves(whole) if "choices" in field.metadata
}
STAGES = ("pretrain", "sft", "reward", "ppo", "policy_gradient")


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
    """A reward may be negative; every other number is at least 0."""
    assert "range" in NUMBERS[task, path].metadata
    for value in math.nan, math.inf, -math.inf, 1e30:
        assert refusal(changed(task, **{path: value})).startswith(f"{path}: expected ")
    if path == "data.min_reward":
        fields.check(changed(task, **{path: -1.0}))
    else:
        assert refusal(changed(task, **{path: -1})).startswith(f"{path}: expected ")


@pytest.mark.parametrize(("task", "path"), CHOICES)
def test_a_choice_is_one_of_its_words(task, path):
    assert refusal(changed(task, **{path: "other"})).startswith(f"{path}: expected ")


def test_which_fields_are_choices():
    both = {
        *("task", "algorithm", "text.kind", "model.dtype", "evaluation.result", "guard.action"),
        *(f"{name}.schedule" for name in STAGES),
        *("pretrain.loss_on", "sft.loss_on", "ppo.value_init", "policy_gradient.baseline"),
        *("ppo.missing_eos", "policy_gradient.missing_eos"),
    }
    assert having("summarize", "choices") == both | {"data.source", "data.cut"}
    assert having("write", "choices") == both | {"data.kind", "data.source", "data.sentiment"}


def test_which_fields_are_neutral():
    both = {
        *(f"{name}.{field}" for name in STAGES for field in ("microbatches", "save_every")),
        *(f"{name}.{field}" for name in ("ppo", "policy_gradient") for field in ("lanes", "widths", "trace_epochs")),
        *(f"{name}.from_" for name in ("pretrain", "sft", "reward")),
        *("model.remat", "data.cache", "evaluation.batch", "evaluation.samples", "keep.last", "keep.best", "log"),
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
