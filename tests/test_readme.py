"""What the README shows is run as it stands there."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.data import sources
from rlhf_jax.models import gpt2, heads
from rlhf_jax.text import char

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def demo(tmp_path, monkeypatch, finished):
    """The current folder has runs/demo, whose tokens are characters."""
    folder, tokenizer = tmp_path / "runs" / "demo", char.train([README])
    config = gpt2.Config(layers=1, heads=1, head_size=8, width=8, context=128, vocab_size=tokenizer.vocab_size)
    tokenizer.save(folder / "text")
    whole = configs.Config(model=config, data=sources.Config(response_length=9))
    (folder / "config.json").write_text(json.dumps(configs.tree(whole)))
    policy = jax.jit(heads.LanguageModel(config).init)(jax.random.key(0))
    finished(folder, "reward", reward=heads.ScalarModel(config).init(jax.random.key(1), policy))
    finished(folder, "ppo", policy=policy)
    monkeypatch.chdir(tmp_path)


def test_from_python(demo):
    section = README.split("### From Python\n")[1].split("\n### ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert len(names["texts"]) == len(names["nats"]) == len(names["scores"]) == 4
    for text, nats_R in zip(names["texts"], names["nats"], strict=True):
        assert len(nats_R) == len(f" {text}") + 1 and (nats_R < 0).all()
    assert np.isfinite(names["scores"]).all()
