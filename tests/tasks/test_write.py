"""Texts to write from nothing: which are happy, and the pairs that a reward model learns of them."""

import pytest

from rlhf_jax import config as configs
from rlhf_jax.data import corpus
from rlhf_jax.models import decoder
from rlhf_jax.rewards import sentiment
from tests.support import changed, error, stages


@pytest.fixture(scope="module", params=["tweets", "stories"])
def config(request):
    return configs.write(
        text=configs.Text(kind="char"),
        data=corpus.Config(kind=request.param, made=120, length=12),
        model=decoder.Config(layers=1, heads=2, head_size=7, width=16, context=12),
    )


def happy(config, text):
    if config.data.kind == "stories":
        return sentiment.compound([text])[0] > config.data.min_reward
    return any(row["text"] == text and row["sentiment"] == "positive" for row in corpus.load(config.data, 1)[0][0])


def test_pairs_are_a_happy_text_and_another(config, tmp_path):
    """In an order from the seed, each on its side of the split."""
    learned = changed(config, reward={"kind": "learned"})
    task = stages(learned, tmp_path / "a").task
    pairs, everything = task.rows("preferences"), task.rows("pretrain")
    for side, texts in zip(pairs[:2], everything[:2], strict=True):
        known = [row["text"] for row in texts]
        assert side and all(row["chosen"] in known and row["rejected"] in known for row in side)
    assert [row["chosen"] for row in pairs.train] == [row["text"] for row in task.rows("sft").train]
    for row in pairs.train:
        assert happy(learned, row["chosen"]) and not happy(learned, row["rejected"])
    assert len({row["rejected"] for row in pairs.train}) > 1
    assert stages(learned, tmp_path / "b").task.rows("preferences") == pairs
    arrays = stages(learned, tmp_path / "a").setup.arrays("preferences")
    for side, rows in zip(arrays[:2], pairs[:2], strict=True):  # without those that are cut to the same
        index = [i for i, row in enumerate(rows) if row["chosen"][:11] != row["rejected"][:11]]
        assert side["index_N"].tolist() == index and side["chosen_NR"].shape == (len(index), 11)


def test_a_reward_of_rows_has_no_rows_here(config, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def mine(rows, texts):\n    return [0.0] * len(texts)\n")
    kind = f"{path}:mine"
    expected = "reward.kind: expected a function of texts alone where task is write, whose rows hold nothing, got "
    assert error(configs.check, changed(config, reward={"kind": kind})) == f"{expected}{kind!r}"
    gold = error(configs.check, changed(config, reward={"kind": "gold"}))
    assert gold.startswith(
        "reward.kind: expected learned, sentiment, rouge, exact, partial or path/to/file.py:function"
    )
