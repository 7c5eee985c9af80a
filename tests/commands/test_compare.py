"""Finished runs side by side: numbers by hand, from the files that a run leaves."""

import json

import numpy as np
import pytest

from rlhf_jax.commands import compare
from tests.support import Recorder, error

GOLD = {"rloo": [0.5, 0.75, 1.0, 0.75], "grpo": [0.75, 0.75, 1.0, 1.0]}


def leave(folder, stage, lr, prompts="abcd", seed=1, task="summarize", **summary):
    """Writes what a stage of two iterations of 8 completions leaves."""
    (folder / stage).mkdir(parents=True)
    config = {"algorithm": stage, "section": stage, stage: {"lr": lr, "batch": 8}, "seed": seed, "sha256": {"x": stage}}
    config["task"] = task
    numbers = {"gold": float(np.mean(GOLD[stage])), "kl_exact": 1.5, "steps": 2} | summary
    rows = [{"step": step, "time": 10.0 * step, f"{stage}/eval_gold": step / 4} for step in (0, 2)]
    samples = [
        {"prompt": p, "sft": {"completion": "", "gold": 0.0}, stage: {"completion": "", "gold": x}}
        for p, x in zip(prompts, GOLD[stage], strict=True)
    ]
    files = {
        "config": config,
        "summary": {f"{stage}/{key}": value for key, value in numbers.items()} | {"seconds": 20.0},
    }
    for name, value in files.items():
        (folder / stage / f"{name}.json").write_text(json.dumps(value))
    for name, lines in {"metrics": rows, "samples": samples}.items():
        (folder / stage / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / stage)


@pytest.fixture
def reporter():
    found = Recorder()
    found.table = lambda header, rows: found.tables.append((header, rows))
    return found


def test_two_runs_on_the_same_prompts(tmp_path, reporter):
    leave(tmp_path / "a", "rloo", 0.1), leave(tmp_path / "a", "grpo", 0.2)
    results = compare.compare([str(tmp_path / "a")], str(tmp_path / "out.png"), reporter)
    assert list(results) == ["a/grpo", "a/rloo"]
    assert results["a/rloo"]["gold"] == 0.75 and results["a/rloo"]["gain"] == -0.125
    low, high = results["a/rloo"]["gain_ci95"]
    assert low + high == pytest.approx(-0.25) and high - low == pytest.approx(
        2 * 1.96 * np.std([-1, 0, 0, -1], ddof=1) / 8, rel=1e-3
    )
    assert (results["a/rloo"]["samples"], results["a/rloo"]["seconds"]) == (16, 20)
    assert results["a/grpo"]["gain"] is None  # it is the first
    header, rows = reporter.tables[0]
    assert header == ["differs", "a/grpo", "a/rloo"]
    assert rows == [["algorithm", "grpo", "rloo"], ["lr", "0.2", "0.1"]]
    curve = compare.read(str(tmp_path / "a" / "rloo"))[0].curve("gold")
    np.testing.assert_array_equal(
        [curve[name] for name in ("iterations", "samples", "value")], [[0, 2], [0, 16], [0, 0.5]]
    )
    assert (tmp_path / "out.png").exists()


def test_best_of_n_of_the_policy_before(tmp_path):
    """Scores 0 to 19: the best of 2 of them is 2/3 (20 + 1) - 1 = 13 on average, log 2 - 1/2 nats away."""
    place = leave(tmp_path / "a", "rloo", 0.1)
    assert compare.read(place)[0].best_of_n("gold").shape == (0, 2)  # each sample has its own prompt
    lines = [json.dumps({"reward_sft": i, "reward_rl": 0.0}) + "\n" for i in range(20)]
    (tmp_path / "a" / "rloo" / "samples.jsonl").write_text("".join(lines))
    found = compare.read(place)[0].best_of_n("reward")
    np.testing.assert_allclose(found, [[0, 9.5], [np.log(2) - 0.5, 13]], atol=1e-9)
    (tmp_path / "a" / "rloo" / "samples.jsonl").write_text("")
    assert compare.read(place)[0].best_of_n("reward").shape == (0, 2)


def test_other_prompts_are_not_paired(tmp_path, reporter):
    places = [leave(tmp_path / "a", "rloo", 0.1), leave(tmp_path / "b", "grpo", 0.1, prompts="abce")]
    results = compare.compare(places, str(tmp_path / "out.png"), reporter)
    assert results["b/grpo"]["gain"] is None and results["b/grpo"]["ci95"] is not None


def test_what_cannot_be_compared_is_one_line(tmp_path, reporter):
    place = leave(tmp_path / "a", "rloo", 0.1)

    def refusal(*places):
        return error(compare.compare, list(places), str(tmp_path / "out.png"), reporter)

    assert refusal(place) == "RUN: expected at least 2 finished runs, got 1"
    assert refusal(place, place) == "RUN: expected different folders, got one of them twice"
    assert refusal(place, str(tmp_path / "none")).endswith("none: expected the folder of a run, found none")
    (tmp_path / "empty").mkdir()
    assert "expected a finished stage of reinforcement learning or DPO, found none" in refusal(
        place, str(tmp_path / "empty")
    )


def test_runs_that_differ_in_their_seed_are_one_row(tmp_path, reporter):
    """Gold .75, .85 and .65; the samples of every run beat 0, so each of the twelve is a win."""
    for seed, gold in enumerate((0.75, 0.85, 0.65)):
        leave(tmp_path / f"seed{seed}", "rloo", 0.1, seed=seed, gold=gold)
    places = [str(tmp_path / f"seed{seed}") for seed in range(3)]
    places.append(leave(tmp_path / "other", "rloo", 0.2))
    compare.compare(places, str(tmp_path / "out.png"), reporter)
    (row,) = compare.over_seeds([run for place in places for run in compare.read(place)], "gold")[1]
    assert row[:3] == ["seed0/rloo, seed1/rloo, seed2/rloo", 3, pytest.approx(0.75)]
    assert row[3] == pytest.approx((0.75 - 4.3027 * 0.1 / 3**0.5, 0.75 + 4.3027 * 0.1 / 3**0.5), abs=1e-4)
    assert row[4:] == [1, (1, 1)]
    header, rows = reporter.tables[2]
    assert header[:2] == ["setting", "seeds"] and rows[0][1] == 3
    page = (tmp_path / "out.html").read_text()
    assert "seed0/rloo, seed1/rloo, seed2/rloo" in page and "<h2>Over tasks</h2>" not in page
    assert (tmp_path / "out.md").exists()


def test_an_algorithm_over_tasks_is_an_interquartile_mean(tmp_path, reporter):
    """Two tasks with five seeds: .1 to .5 and .6 to 1. The middle half of ten is .3 to .8 with both ends in part."""
    places = []
    for task, first in ("summarize", 0.1), ("arithmetic", 0.6):
        for seed in range(5):
            gold = first + seed / 10
            places.append(leave(tmp_path / f"{task}{seed}", "rloo", 0.1, seed=seed, task=task, gold=gold))
    runs = [run for place in places for run in compare.read(place)]
    (row,) = compare.over_tasks(runs, "gold")[1]
    assert row[:4] == ["rloo", 2, 5, pytest.approx((0.3 * 0.5 + 0.4 + 0.5 + 0.6 + 0.7 + 0.8 * 0.5) / 5)]
    assert row[4][0] < row[3] < row[4][1]
    assert compare.over_tasks(runs[:9], "gold")[1] == []


def run(scores, task="sort", **summary):
    rows = [
        {"prompt": str(i), "sft": {"completion": "", **each}, "rloo": {"completion": "", **each}}
        for i, each in enumerate(scores)
    ]
    config = {"section": "rloo", "rloo.batch": 8, "task": task, "algorithm": "rloo"}
    return compare.Run(f"{task}/rloo", config, {"steps": 1, "seconds": 1.0} | summary, [], rows, "rloo")


def test_the_score_of_a_sample_is_the_reward_and_no_other_number():
    """A run by `partial` has another score than `exact`, which it is compared by where another run has no reward."""
    alone, both = (
        run([{"score": 0.5}, {"score": 0.25}]),
        run([{"score": 0.5, "exact": 0.0}, {"score": 1.0, "exact": 1.0}]),
    )
    np.testing.assert_array_equal(alone.scores("reward"), [0.5, 0.25])
    assert alone.scores("exact") is None and alone.wins("exact") is None
    np.testing.assert_array_equal(both.scores("exact"), [0, 1])


def test_the_same_prompts_of_another_task_are_not_paired():
    """31452= is a question of sorting and of reversing."""
    scores = [{"score": 1.0}, {"score": 0.0}]
    first = run(scores, reward=0.5)
    assert compare.numbers(run(scores, "reverse", reward=0.5), first, "reward")["gain"] is None
    assert compare.numbers(run(scores, reward=0.5), first, "reward")["gain"] == 0
