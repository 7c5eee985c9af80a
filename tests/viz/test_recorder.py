"""What is recorded, and how: the steps that are due, the texts of ids, the format of arrays and numbers."""

import gzip
import types

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.text import bpe, char
from rlhf_jax.training.workdir import Workdir
from rlhf_jax.viz import recorder, trace
from tests.support import changed, error


def stage(name, steps, eval_every=0):
    return types.SimpleNamespace(name=name, config=types.SimpleNamespace(steps=steps, eval_every=eval_every))


@pytest.fixture
def made(tmp_path):
    """The recorder of a run with characters, every third iteration."""
    config = changed(configs.Config(), trace={"every": 3})
    return recorder.Recorder(Workdir(tmp_path), config, char.train(["abc"]))


def test_the_first_the_last_and_each_that_is_due_is_recorded(made):
    """Of reinforcement learning every N-th; of the stages before it those that they evaluate."""
    ppo, sft = stage("ppo", 8, eval_every=2), stage("sft", 10, eval_every=4)
    assert [step for step in range(1, 9) if made.due(ppo, step)] == [1, 3, 6, 8]
    assert [step for step in range(1, 11) if made.due(sft, step)] == [1, 4, 8, 10]


def test_a_trace_that_cannot_be_continued_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "manifest.json").write_text('{"schema": 9}')
    message = error(recorder.Recorder, Workdir(tmp_path), configs.Config(), char.train(["abc"]))
    assert "expected a trace of schema version 1, got 9" in message


def test_texts_of_ids():
    """A byte that is no text of its own is a lone surrogate; EOS and PAD have no text."""
    tokenizer = bpe.train(["a day, a day \u00e9"] * 3, 262)
    ids = tokenizer.encode(" day \u20ac")
    texts = [recorder.text_of(tokenizer, i) for i in ids]
    assert "".join(texts).encode("utf-8", "surrogateescape").decode() == " day \u20ac"
    assert texts[-3:] == ["\udce2", "\udc82", "\udcac"]
    assert [recorder.text_of(tokenizer, i) for i in (tokenizer.eos_id, tokenizer.pad_id)] == ["", ""]
    letters = char.train(["abc"])
    assert [recorder.text_of(letters, i) for i in letters.encode("cab")] == ["c", "a", "b"]


def test_a_file_has_all_that_was_written():
    arrays = {
        "update.logp_BR": np.array([[1.5, -np.inf], [np.nan, 0]], np.float32),
        "rollout.mask_BR": np.array([True, False]),
        "update.rows_B": np.arange(3),
    }
    fields = {
        "numbers": {"ppo/kl": 0.5, "ppo/loss": np.nan},
        "strings": {3: "\udce2", 1: "a"},
        "samples": [{"prompt": "p"}],
    }
    file = trace.File("a", "ppo", "iter", 7, arrays=arrays, more={"rule": "all"}, **fields)
    there = trace.decode("a", gzip.decompress(trace.encode(file)))
    assert (there.stage, there.kind, there.step, there.strings) == ("ppo", "iter", 7, file.strings)
    assert there.samples == file.samples and there.more["rule"] == "all" and there.numbers["ppo/kl"] == 0.5
    assert np.isnan(there.numbers["ppo/loss"])
    assert {name: array.dtype.name for name, array in there.arrays.items()} == {
        "update.logp_BR": "float32", "rollout.mask_BR": "uint8", "update.rows_B": "int32",
    }  # fmt: skip
    for name, array in arrays.items():
        np.testing.assert_array_equal(there[name], array)
    assert error(there.__getitem__, "rollout.values_BR").startswith("a: expected the array rollout.values_BR")
