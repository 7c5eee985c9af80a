"""The commands of the writing tasks as a person runs them."""

import json

import pytest

from rlhf_jax.algorithms import ALGORITHMS

TWEETS, STORIES, REUSE = (f"experiments/{name}.py" for name in ("pg_tweets", "pg_stories", "reuse_rollouts"))
FIELDS = {"data.made": 100, "data.length": 10, "evaluation.prompts": 8, "evaluation.batch": 8}
FIELDS |= {"model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_size": 8}
for stage in "pretrain", "sft", "policy_gradient":
    FIELDS |= {f"{stage}.steps": 2, f"{stage}.batch": 4, f"{stage}.schedule": "constant"}
SMALL = ["--config=configs/pg_tweets.py", *(f"--config.{field}={value}" for field, value in FIELDS.items())]


def assert_refused(result, *words):
    """One line that has these words, and exit code 2."""
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert result.err.startswith("pg_tweets.py: ") and "Traceback" not in result.err
    for word in words:
        assert word in result.err


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV file of tweets, and a reward file."""
    folder = tmp_path_factory.mktemp("table")
    lines = [f"{i},tweet number {i},{'positive' if i % 2 else 'negative'}" for i in range(60)]
    (folder / "t.csv").write_text("\n".join(["textID,text,sentiment", *lines]))
    (folder / "bad.csv").write_text("\n".join(["textID,text,sentiment", *lines, "60,  ,neutral"]))
    (folder / "label.csv").write_text("\n".join(["textID,text,sentiment", *lines, "60,so so,mixed"]))
    (folder / "columns.csv").write_text("id,tweet\n1,good\n")
    (folder / "mine.py").write_text(
        "def fails(texts):\n    raise RuntimeError('no')\n"
        "def nan(texts):\n    return [float('nan')] * len(texts)\n"
        "def short(texts):\n    return [1.0]\n"
        "def good(texts):\n    return [float(len(text)) for text in texts]\n"
        "def both(rows, texts):\n    return [float(len(text)) for text in texts]\n"
    )
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.algorithm=trpo"], [f"algorithm: expected {' or '.join(ALGORITHMS)}, got 'trpo'"]),
        (["--config.policy_gradient.baseline=median"], ["policy_gradient.baseline: expected none or mean or"]),
        (["--config.policy_gradient.top_k=30"], ["policy_gradient.top_k: expected 0 in training"]),
        (["--config.policy_gradient.epochs=0"], ["policy_gradient.epochs: expected at least 1, got", "got 0"]),
        (["--config.seeds=0"], ["seeds: expected at least 1, got", "got 0"]),
        (["--config.data.length=40"], ["model.context: expected at least data.length = 40, got 32"]),
        (["--config.data.kind=poems"], ["data.kind: expected tweets or stories, got 'poems'"]),
        (["--config.data.sentiment=joyful"], ["data.sentiment: expected positive or neutral or negative"]),
        (["--config.data.path=no.csv"], ["data.path: expected none where source is made, got 'no.csv'"]),
        (["--config.data.source=file", "--config.data.path=no.csv"], ["missing files: data.path = 'no.csv'"]),
        (["--config.data.source=file"], ["data.path: expected a file where source is file"]),
        (["--config.alarms.patience=0"], ["alarms.patience: expected at least 1, got", "got 0"]),
        (
            ["--config.reward=joy"],
            ["reward: expected learned, sentiment, gold, rouge, exact, partial or path/to/file.py:function; got 'joy'"],
        ),
        (["--config.reward=no.py:f"], ["reward: no.py: no such file"]),
        (["--config.policy_gradient.lrr=1"], ["lrr", 'Did you mean "lr"']),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(flags, words, forks, tmp_path):
    assert_refused(forks(TWEETS, *SMALL, f"--workdir={tmp_path}/run", *flags), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad.csv", "bad.csv:62: text: expected text, got an empty one"),
        ("label.csv", "label.csv:62: sentiment: expected positive, neutral, negative (0 negative"),
        ("columns.csv", "columns.csv:1: expected columns 'text' and 'sentiment', or 'text' and"),
    ],
)
def test_a_bad_row_is_named(name, words, forks, table, tmp_path):
    flags = ["--config.data.source=file", f"--config.data.path={table}/{name}"]
    assert_refused(forks(TWEETS, *SMALL, f"--workdir={tmp_path}/run", *flags), "data.path: ", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "mine.py:fails: RuntimeError: no"),
        ("nan", "mine.py:nan: expected finite numbers, got nan for text 1 of 8"),
        ("short", "mine.py:short: expected 8 numbers, one a text; got shape (1,)"),
        ("none", "expected a function 'none', found none"),
    ],
)
def test_a_reward_that_is_none_is_named(name, words, forks, table, tmp_path):
    assert_refused(forks(TWEETS, *SMALL, f"--workdir={tmp_path}", f"--config.reward={table}/mine.py:{name}"), words)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("both", "reward.kind: expected a function of texts alone where task is write, whose rows hold nothing"),
        (
            "gold",
            "reward.kind: expected learned, sentiment, rouge, exact, partial or path/to/file.py:function where no row "
            "has a record",
        ),
    ],
)
def test_a_reward_of_rows_is_refused_before_anything_is_trained(reward, words, forks, table, tmp_path):
    """A text that is written from nothing has no row."""
    spec = reward if reward == "gold" else f"{table}/mine.py:{reward}"
    assert_refused(forks(TWEETS, *SMALL, f"--workdir={tmp_path}/run", f"--config.reward={spec}"), words)
    assert not (tmp_path / "run").exists()


def test_a_whole_run_on_a_file_with_a_reward_of_ones_own(forks, table, tmp_path):
    """Three stages, skipped the second time; then what becomes of its rollouts when they are used again."""
    flags = ["--config.data.source=file", f"--config.data.path={table}/bad.csv", "--config.data.skip_bad=true"]
    flags += [f"--config.reward={table}/mine.py:good", f"--workdir={tmp_path}"]
    result = forks(TWEETS, *SMALL, *flags)
    assert (result.code, result.err) == (0, "")
    assert "data.path: 1 rows skipped; the first: " in result.out and "best-of-n reward at this KL" in result.out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"pretrain/seconds", "sft/loss", "rl/reward_after", "rl/distinct2_before"} <= summary.keys()
    again = forks(TWEETS, *SMALL, *flags)
    assert (again.code, again.err) == (0, "")
    assert all(f"{stage}: finished with this config, skipped" in again.out for stage in ("pretrain", "sft", "rl"))
    (tmp_path / "rl" / "summary.json").unlink()
    result = forks(REUSE, *SMALL, *flags)
    assert (result.code, result.err) == (0, "")
    reuse = json.loads((tmp_path / "reuse" / "summary.json").read_text())["reuse"]
    assert set(reuse) == {"policy_gradient", "importance", "clipped"}
    # The first use is of a fresh rollout: the three updates are the same.
    first = [by_uses["1"]["ratio_max"] for by_uses in reuse.values()]
    assert max(first) - min(first) < 1e-4
    assert (tmp_path / "reuse" / "plots" / "reuse.png").exists()


def test_stories_have_a_command_too(forks, tmp_path):
    small = [flag for flag in SMALL[1:] if not flag.startswith("--config.sft.schedule")]  # it has no effect
    flags = ["--config=configs/pg_stories.py", *small, "--config.text.vocab_size=300", "--config.sft.steps=0"]
    result = forks(STORIES, *flags, f"--workdir={tmp_path}")
    assert (result.code, result.err) == (0, "")
    assert "rl/reward_after" in json.loads((tmp_path / "summary.json").read_text())
