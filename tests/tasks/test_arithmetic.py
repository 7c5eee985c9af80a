"""Questions with one right answer: each is what it says, and the two sides share none."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.rewards import answers, function
from rlhf_jax.tasks import arithmetic
from rlhf_jax.text import char
from tests.support import error


def task(kind, digits=3, **changes):
    return arithmetic.Arithmetic(arithmetic.Config(kind=kind, digits=digits, **{"rows": 300} | changes), seed=1)


def right(kind, prompt):
    """The answer, by other means than those of the task."""
    question = prompt.removesuffix("=")
    if kind == "add":
        return "".join(reversed(str(sum(map(int, question.split("+"))))))
    if kind == "digits":
        terms = list(map(int, question.split(",")))
        for _ in range(3):
            terms.append((2 * terms[-1] - terms[-2]) % 10)
        return "".join(map(str, terms[-3:]))
    return {"sort": "".join(sorted(question)), "reverse": question[::-1]}[kind]


@pytest.mark.parametrize("kind", ["add", "sort", "reverse", "digits"])
def test_every_label_is_right_and_fits(kind):
    made = task(kind)
    train, held_out = made.rows("prompts")[:2]
    everything = train + held_out
    assert len({row["prompt"] for row in everything}) == len(everything) == (160 if kind == "digits" else 300)
    assert all(row["label"] == right(kind, row["prompt"]) for row in everything)
    tokenizer = char.train(made.texts())
    for kind_of_rows in "sft", "prompts", "preferences":
        arrays = made.arrays(kind_of_rows, tokenizer)
        assert len(arrays.train["index_N"]) == len(train) and len(arrays.held_out["index_N"]) == len(held_out)
    response_NR = made.arrays("sft", tokenizer).train["response_NR"]
    assert response_NR.shape[1] == made.response_length and (response_NR[:, -1] == tokenizer.eos_id).any()
    assert made.rows("prompts") == task(kind).rows("prompts")
    assert made.rows("prompts") != dataclasses.replace(made, seed=2).rows("prompts")


def test_wrong_labels_are_of_fine_tuning_alone():
    made = task("add", rows=2_000, wrong=0.6)
    train, held_out = made.rows("sft")[:2]
    wrong = np.mean([row["label"] != right("add", row["prompt"]) for row in train])
    assert 0.56 < wrong < 0.64
    assert all(row["label"] == right("add", row["prompt"]) for row in held_out + made.rows("prompts").train)


def test_a_pair_differs_in_one_digit():
    for row in task("sort").rows("preferences").train:
        pairs = zip(row["chosen"], row["rejected"], strict=True)
        assert sum(a != b for a, b in pairs) == 1 and row["chosen"] == row["label"]


def test_rewards_by_hand():
    rows = [{"label": "123"}] * 5
    texts = ["123", " 123 ", "12", "1239", "321"]
    assert answers.exact(rows, texts) == [1, 1, 0, 0, 0]
    assert answers.partial(rows, texts) == [1, 1, 2 / 3, 3 / 4, 1 / 3]
    assert error(function.load("exact").scores, [{"prompt": "a"}], ["b"]).startswith(
        "reward exact: InputError: exact: expected rows with a label"
    )


def test_a_config_of_arithmetic(tmp_path):
    config = configs.Config(
        task="arithmetic",
        data=arithmetic.Config(),
        text=configs.Text(kind="char"),
        reward=configs.Reward(kind="exact"),
    )
    configs.check(config)
    assert configs.parse(configs.tree(config)) == config
    assert (config.data.prompt_length, config.data.response_length) == (len("37+58="), len(" 591") + 1)
    one = dataclasses.replace(config, data=arithmetic.Config(kind="reverse", digits=1, rows=2, held_out=1e-9))
    assert error(arithmetic.make(one).rows, "sft").startswith("data.held_out: ")
    assert error(arithmetic.make(config).rows, "pretrain").startswith("pretrain.steps: expected 0")
