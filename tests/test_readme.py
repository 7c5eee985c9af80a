"""What the README shows is run as it stands there, and what it names exists."""

import ast
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.data import sources
from rlhf_jax.models import decoder, heads
from rlhf_jax.rewards import function
from rlhf_jax.text import char

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]


def section(title):
    """The text under a heading, up to the next heading."""
    return re.split(r"\n##+ ", README.split(f"# {title}\n")[1])[0]


def python(title):
    """The one block of Python in a section."""
    (code,) = re.findall(r"```python\n(.*?)```", section(title), flags=re.DOTALL)
    return code


@pytest.fixture
def demo(tmp_path, monkeypatch, finished):
    """The current folder has runs/demo, whose tokens are characters."""
    folder, tokenizer = tmp_path / "runs" / "demo", char.train([README])
    config = decoder.Config(layers=1, heads=1, head_size=8, width=8, context=160, vocab_size=tokenizer.vocab_size)
    tokenizer.save(folder / "text")
    whole = configs.Config(model=config, data=sources.Config(response_length=9))
    (folder / "config.json").write_text(json.dumps(configs.tree(whole)))
    policy = jax.jit(heads.LanguageModel(config).init)(jax.random.key(0))
    finished(folder, "reward", reward=heads.ScalarModel(config).init(jax.random.key(1), policy))
    finished(folder, "ppo", policy=policy)
    monkeypatch.chdir(tmp_path)


def test_from_python(demo):
    names = {}
    exec(python("From Python"), names)
    assert len(names["texts"]) == len(names["nats"]) == len(names["scores"]) == 4
    for text, nats_R in zip(names["texts"], names["nats"], strict=True):
        assert len(nats_R) == len(f" {text}") + 1 and (nats_R < 0).all()
    assert np.isfinite(names["scores"]).all()


def test_train_from_python(demo):
    names = {}
    exec(python("Train from Python"), names)
    assert len(names["texts"]) == 4
    summary = json.loads(Path("runs", "names", "ppo", "summary.json").read_text())
    assert summary["ppo/steps"] == 20 and np.isfinite(summary["ppo/reward_gain"])
    before, after = names["model"].params, names["fitted"].state.policy
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert any(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), before, after)))


def test_your_own_reward(tmp_path, monkeypatch):
    (tmp_path / "readme_reward.py").write_text(python("Your own prompts and your own reward"))
    (row,) = re.findall(r"`(\{.*?\})`", section("Your own prompts and your own reward"))
    monkeypatch.syspath_prepend(tmp_path)
    reward = function.load(f"{tmp_path}/readme_reward.py:score")
    scores = reward.scores([json.loads(row)] * 2, ["It is 7 .", "8"])
    np.testing.assert_allclose(scores["reward_correct"], [1, 0])
    np.testing.assert_allclose(scores["reward_brief"], [-0.09, -0.01], rtol=1e-6)


def defined(path):
    """The names that a file defines at its top level, and Class.name of what its classes define."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_name_of_the_table_is_defined_in_its_file():
    rows = [line.split("|")[2] for line in section("From the article to the code").splitlines() if "`" in line]
    places = [place for row in rows for place in re.findall("`(.*?)`", row)]
    assert len(places) > 20
    for place in places:
        path, names = place.split(": ")
        assert set(names.split(", ")) <= defined(ROOT / "rlhf_jax" / path), place


def test_every_name_of_the_tree_exists():
    folders = {path.stem for path in (ROOT / "rlhf_jax").iterdir() if path.suffix == ".py" or path.is_dir()}
    folders -= {"__init__", "__pycache__", "py", "configs"}
    (tree,) = re.findall(r"```\nrlhf_jax/\n(.*?)\nexperiments/", section("The tree"), flags=re.DOTALL)
    assert set(re.findall(r"(?<=  )(\w+)(?=/|\.py)", tree)) == folders


def test_every_flag_is_a_field_of_a_config():
    values = [configs.tree(configs.Config()), configs.tree(configs.write())]
    known = {name for tree in values for name in fields(tree)}
    named = {flag for page in PAGES for flag in re.findall(r"--config\.([a-z_][\w.]*\w)=", page)}
    assert len(named) > 30 and named - known == set()


def fields(tree, prefix=""):
    """The paths of all fields of a config, and of the section that a reward's name may stand for."""
    for name, value in tree.items():
        if not isinstance(value, dict) or name == "reward":
            yield prefix + name
        if isinstance(value, dict):
            yield from fields(value, f"{prefix}{name}.")
