import dataclasses
import math

import pytest

from rlhf_jax import alarms, config, fields
from rlhf_jax.algorithms import policy_gradient, ppo, preference, supervised
from rlhf_jax.data import corpus, sources
from rlhf_jax.errors import InputError
from rlhf_jax.models import gpt2
from rlhf_jax.training import checkpoint, optim


def refusal(value):
    with pytest.raises(InputError) as caught:
        fields.check(value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert refusal(Outer(steps=0, start=3)) == "steps: expected at least 1 and at most 1e+09, got 0"


def test_significant_is_all_but_the_neutral_fields():
    inner = {"share": 0.5, "places": 0, "colour": "red", "free": 0.0}
    assert fields.significant(Outer()) == {"steps": 3, "start": 1, "inner": inner}


def test_numbers_are_the_numeric_fields_by_their_paths():
    found = dict(fields.numbers(Outer()))
    assert list(found) == ["steps", "inner.share", "inner.places", "inner.free", "start", "lanes"]
    assert found["inner.places"].metadata["range"].most == 4 and "range" not in found["inner.free"].metadata


# The configs


SECTIONS = {
    "optim": optim.Config,
    "sft": supervised.Config,
    "reward": preference.Config,
    "ppo": ppo.Config,
    "policy_gradient": policy_gradient.Config,
    "alarms": alarms.Config,
    "keep": checkpoint.Config,
    "model": gpt2.Config,
    "corpus": corpus.Config,
    "data": sources.Config,
    "text": config.Text,
    "evaluation": config.Evaluation,
}
Whole = dataclasses.make_dataclass("Whole", [(name, kind, kind()) for name, kind in SECTIONS.items()], frozen=True)


def leaves(value, path=""):
    """(path, dataclass field) of every field that is no dataclass."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field


def changed(**changes):
    """The defaults with some fields of sections changed: changed(**{"ppo.steps": 3, "ppo.warmup": 9})."""
    whole = Whole()
    for path, value in changes.items():
        section, name = path.split(".")
        whole = dataclasses.replace(whole, **{section: dataclasses.replace(getattr(whole, section), **{name: value})})
    return whole


NUMBERS = dict(fields.numbers(Whole()))
STAGES = ("sft", "reward", "ppo", "policy_gradient")
CHOICES = {path: field for path, field in leaves(Whole()) if "choices" in field.metadata}


def test_the_defaults_are_in_their_ranges():
    fields.check(Whole())


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_range_that_excludes_what_is_no_sane_number(path):
    """A reward may be negative; every other number is at least 0."""
    assert "range" in NUMBERS[path].metadata
    for value in math.nan, math.inf, -math.inf, 1e30:
        assert refusal(changed(**{path: value})).startswith(f"{path}: expected ")
    if path == "corpus.min_reward":
        fields.check(changed(**{path: -1.0}))
    else:
        assert refusal(changed(**{path: -1})).startswith(f"{path}: expected ")


@pytest.mark.parametrize("path", CHOICES)
def test_a_choice_is_one_of_its_words(path):
    assert refusal(changed(**{path: "other"})).startswith(f"{path}: expected ")


def test_which_fields_are_choices():
    assert set(CHOICES) == {
        *(f"{name}.schedule" for name in ("optim", *STAGES)),
        *("sft.loss_on", "ppo.value_init", "ppo.missing_eos", "policy_gradient.baseline", "model.dtype"),
        *("corpus.kind", "corpus.source", "corpus.sentiment", "data.source", "text.kind"),
    }


def test_which_fields_are_neutral():
    assert {path for path, field in leaves(Whole()) if field.metadata.get("neutral")} == {
        *(f"{name}.{field}" for name in STAGES for field in ("microbatches", "save_every")),
        *("ppo.lanes", "ppo.widths", "ppo.trace_epochs", "model.remat", "corpus.cache", "data.cache"),
        *("evaluation.batch", "evaluation.samples", "keep.last", "keep.best"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"sft.steps": 0, "sft.warmup": 10, "ppo.steps": 0, "ppo.warmup": 10},  # a stage that is left out
        {"sft.steps": 10, "sft.warmup": 10},
        {"ppo.steps": 2, "ppo.epochs": 4, "ppo.minibatches": 2, "ppo.warmup": 16},  # warm-up is in optimizer steps
        {"policy_gradient.steps": 2, "policy_gradient.epochs": 4, "policy_gradient.warmup": 8},
        {"ppo.batch": 12, "ppo.minibatches": 3, "ppo.microbatches": 2, "ppo.lanes": 4},
        {"ppo.batch": 10, "ppo.kl_horizon": 2},  # no target: the horizon is not read
        {"ppo.batch": 10, "ppo.kl_horizon": 3, "ppo.kl_target": 6.0},
        {"model.rotary_share": 1.0},
        {"model.head_size": 8, "model.rotary_share": 0.25},
        {"corpus.source": "file", "corpus.path": "tweets.csv"},
    ],
)
def test_fields_that_go_together(changes):
    fields.check(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft.steps": 9, "sft.warmup": 10}, "sft.warmup: expected at most the stage's optimizer steps = 9, got 10"),
        ({"reward.steps": 9, "reward.warmup": 10}, "reward.warmup: expected at most the stage's optimizer steps = 9, "),
        (
            {"ppo.steps": 2, "ppo.minibatches": 2, "ppo.warmup": 17},
            "ppo.warmup: expected at most the stage's optimizer",
        ),
        (
            {"policy_gradient.steps": 2, "policy_gradient.epochs": 4, "policy_gradient.warmup": 9},
            "policy_gradient.warmup: expected at most the stage's optimizer steps = 8, got 9",
        ),
        ({"sft.microbatches": 3}, "sft.batch: expected a multiple of minibatches x microbatches = 3, got 128"),
        ({"reward.microbatches": 3}, "reward.batch: expected a multiple of minibatches x microbatches = 3, got 64"),
        ({"policy_gradient.microbatches": 3}, "policy_gradient.batch: expected a multiple of "),
        (
            {"ppo.batch": 12, "ppo.minibatches": 2, "ppo.microbatches": 4},
            "ppo.batch: expected a multiple of minibatches x microbatches = 8, got 12",
        ),
        ({"ppo.batch": 12, "ppo.lanes": 5}, "ppo.lanes: expected 0, or a divisor of batch = 12, got 5"),
        *(({f"{name}.top_k": 50}, f"{name}.top_k: expected 0 in training (") for name in ("ppo", "policy_gradient")),
        *(({f"{name}.top_p": 0.9}, f"{name}.top_p: expected 1 in training (") for name in ("ppo", "policy_gradient")),
        *(
            (
                {f"{name}.batch": 10, f"{name}.kl_target": 6.0, f"{name}.kl_horizon": 2},
                f"{name}.kl_horizon: expected more than 0.2 batch = 2, to keep kl_coef positive, got 2",
            )
            for name in ("ppo", "policy_gradient")
        ),
        *(
            ({"model.rotary_share": share}, "model.rotary_share: expected 0, or a share of ")
            for share in (0.01, 0.02, 0.05)
        ),
        ({"corpus.split": ""}, "corpus.split: expected the name of one, got ''"),
        ({"data.split": ""}, "data.split: expected the name of one, got ''"),
        ({"corpus.source": "file"}, "corpus.path: expected a file where source is file, got ''"),
        ({"corpus.path": "a.csv"}, "corpus.path: expected none where source is made, got 'a.csv'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, message):
    """Top-k and top-p in training: invariant 3."""
    assert refusal(changed(**changes)).startswith(message)
