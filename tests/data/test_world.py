import hashlib
import json
import re
import subprocess
import sys
from itertools import islice
from random import Random

import pytest

from rlhf_jax.data import world
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import gold

RECORD = {"who": "sister", "verb": "broke", "object": "laptop", "feeling": "angry", "ask": "leave"}
SIZES = {"train": 30, "validation": 20}
QUERY = re.compile(r"SUBREDDIT: r/(\w+)\n\nTITLE: ([\w ]+)\n\nPOST: ([\w .?\n]+)\n\nTL;DR:")


def rows(kind, split="train", seed=0, count=500):
    return list(islice(world.generate(kind, split, seed), count))


def posts(count=500):
    rng = Random(0)
    for _ in range(count):
        record = world.draw_record(rng)
        yield record, *world.write_post(record, rng)


def gold_of(writer, count=500):
    rng = Random(0)
    return [gold.score(record, writer(record, remarked, rng)) for record, _, remarked in posts(count)]


# The world


def test_a_post_is_a_query_that_tells_the_record_and_remarks_on_other_words():
    for record, prompt, remarked in posts():
        _, title, post = QUERY.fullmatch(prompt).groups()
        told = gold.parts(record, f"{title} {post}")
        assert told["coverage"] == 1
        assert told["invented"] == len({word for word in remarked.values()}) > 0
        facts, remark = re.split(r"[ \n]ps ", post)
        assert gold.parts(record, f"{title} {facts}")["invented"] == 0 == gold.parts(record, remark)["coverage"]


def test_a_post_is_short():
    for _, prompt, _ in posts():
        assert 15 <= len(re.findall(r"\w+", QUERY.fullmatch(prompt).group(3))) <= 35


def test_words_of_slots_come_from_the_record_alone():
    # a slot word in a template would be in posts and summaries whatever the record says
    tables = (world.TITLES, world.EVENTS, world.MOODS, world.ASKS, world.REMARKS, world.VAGUE)
    tables += (world.SUBREDDITS, world.OPENINGS, world.CLOSINGS)
    for template in (template for table in tables for template in table):
        text = re.sub(r"\{\w+\}", "", template)
        assert gold.parts(RECORD, text) | {"excess": 0} == {"coverage": 0, "invented": 0, "excess": 0}, template


def test_gold_by_writer():
    # careful 1; forgetful 1 - 1/4 or 1 - 2/4; vague 0 or 1/4; rambling 1 - .05 * (4, 5 or 6 idle words);
    # careless: a wrong word costs its weight and 1/4: 1/2, or 5/8 for the verb or the object, of one; then of two
    assert set(gold_of(world.careful)) == {1.0}
    assert set(gold_of(world.forgetful)) == {0.75, 0.5}
    assert set(gold_of(world.careless)) == {0.5, 0.625, 0.0, 0.125, 0.25}
    assert {round(score, 9) for score in gold_of(world.rambling)} == {0.8, 0.75, 0.7}
    assert set(gold_of(world.vague)) == {0.0, 0.25}


def test_labels_leave_something_to_learn():
    # by the table in the module's docstring: mean .65, standard deviation .32, three in ten of them right
    scores = [gold.score(row["record"], row["label"]) for row in rows("sft", count=2000)]
    mean = sum(scores) / len(scores)
    assert mean == pytest.approx(0.65, abs=0.03)
    assert (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5 == pytest.approx(0.32, abs=0.02)
    assert scores.count(1.0) / len(scores) == pytest.approx(0.30, abs=0.03)


def test_a_careless_writer_believes_a_remark():
    remarked = {field: words[-1] for field, words in gold.VOCABULARY.items()}
    for seed in range(50):
        words = set(world.careless(RECORD, remarked, Random(seed)).split())
        wrong = {word for words in gold.VOCABULARY.values() for word in words} & words - set(RECORD.values())
        assert 1 <= len(wrong) <= 2 and wrong <= {words[-1] for words in gold.VOCABULARY.values()}


# Pairs


def test_pairs_are_never_ties():
    for row in rows("preferences"):
        assert gold.score(row["record"], row["chosen"]) != gold.score(row["record"], row["rejected"])


def test_a_tie_is_redrawn_whole(monkeypatch):
    drawn = iter(["sister", "sister", "sister broke laptop angry", "leave"])
    monkeypatch.setattr(world, "write_summary", lambda record, remarked, rng: next(drawn))
    assert world.write_pair(RECORD, {}, Random(0)) == ("sister broke laptop angry", "leave")


@pytest.mark.parametrize("better_first", [True, False])
def test_the_judge_flips_a_pair_by_bradley_terry(monkeypatch, better_first):
    # gold 1/2 against 1/4: flipped with probability 1 / (1 + exp(.25 / .1)) = .0759
    drawn = ["sister leave", "sister"] if better_first else ["sister", "sister leave"]
    summaries = iter(drawn * 4000)
    monkeypatch.setattr(world, "write_summary", lambda record, remarked, rng: next(summaries))
    rng = Random(0)
    flipped = sum(world.write_pair(RECORD, {}, rng)[0] == "sister" for _ in range(4000))
    assert flipped / 4000 == pytest.approx(0.0759, abs=0.013)  # 3 standard errors


def test_a_few_of_all_pairs_are_flipped():
    pairs = [(row["record"], row["chosen"], row["rejected"]) for row in rows("preferences", count=3000)]
    flipped = sum(gold.score(record, chosen) < gold.score(record, rejected) for record, chosen, rejected in pairs)
    assert 0.04 < flipped / len(pairs) < 0.08


# The same rows again, and never the same twice


def test_the_rows_of_a_version_never_change():
    # Another digest means other rows: raise World.VERSION, or data sets prepared before would be read for them.
    text = json.dumps([rows(kind, split, count=200) for kind in world.FEATURES for split in world.SPLITS])
    assert (str(world.World.VERSION), hashlib.sha256(text.encode()).hexdigest()[:16]) == ("1.4.0", "10959402e38c4ae5")


def test_kinds_splits_and_seeds_have_their_own_posts():
    draws = [rows(kind, split, seed, 200) for kind in world.FEATURES for split in world.SPLITS for seed in (0, 1)]
    prompts = [row["prompt"] for draw in draws for row in draw]
    assert len(set(prompts)) == len(prompts) == 2400


# The data set


@pytest.mark.parametrize("kind", world.FEATURES)
def test_load_gives_the_rows_in_order(tmp_path, kind):
    for _ in ("written", "read again"):
        for split, size in SIZES.items():
            loaded = world.load(kind, split, seed=3, **SIZES, data_dir=tmp_path)
            assert loaded == rows(kind, split, seed=3, count=size)
            assert all(set(row) == set(world.FEATURES[kind]) for row in loaded)


def test_a_prepared_data_set_is_not_written_again(tmp_path, monkeypatch):
    first = world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path)
    monkeypatch.setattr(world, "generate", None)
    assert world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path) == first


@pytest.mark.parametrize("change", [{"seed": 1}, {"train": 31}, {"validation": 21}])
def test_a_data_set_of_another_seed_or_size_is_not_reused(tmp_path, change):
    for settings in ({"seed": 0} | SIZES, {"seed": 0} | SIZES | change):
        for split in world.SPLITS:
            loaded = world.load("prompts", split, **settings, data_dir=tmp_path)
            assert loaded == rows("prompts", split, settings["seed"], settings[split])


def test_load_says_nothing(tmp_path, capfd, caplog):
    world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_another_process_may_prepare_the_same_and_finish_first(tmp_path, monkeypatch):
    generate = world.generate

    def overtaken(*args):
        monkeypatch.setattr(world, "generate", generate)
        world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path)
        return generate(*args)

    monkeypatch.setattr(world, "generate", overtaken)
    assert world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path) == rows("prompts", count=SIZES["train"])


def test_another_process_may_have_finished_before_this_one_starts(tmp_path, monkeypatch):
    def overtaken(builder, **settings):
        monkeypatch.undo()
        world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path)
        builder.download_and_prepare(**settings)

    monkeypatch.setattr(world.World, "download_and_prepare", overtaken)
    assert world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path) == rows("prompts", count=SIZES["train"])


def test_a_preparation_killed_half_way_is_done_again(tmp_path):
    script = """
import os, sys
from rlhf_jax.data import world
generate = world.generate
def killed(kind, split, seed):
    if split == "validation":
        os._exit(9)
    return generate(kind, split, seed)
world.generate = killed
world.load("prompts", "train", seed=0, train=30, validation=20, data_dir=sys.argv[1])
"""
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == 9
    assert any(tmp_path.rglob("incomplete*"))
    assert world.load("prompts", "train", seed=0, **SIZES, data_dir=tmp_path) == rows("prompts", count=30)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "stf"}, "kind: expected one of sft, preferences, prompts; got 'stf'"),
        ({"split": "test"}, "split: expected one of train, validation; got 'test'"),
        ({"train": 0}, "train: expected at least 1 row; got 0"),
        ({"validation": -1}, "validation: expected at least 1 row; got -1"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, change, message):
    with pytest.raises(InputError) as error:
        world.load(**{"kind": "sft", "split": "train", "seed": 0, "data_dir": tmp_path} | SIZES | change)
    assert str(error.value) == message
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^data_dir: cannot write .*/file/data: Not a directory$"):
        world.load("sft", "train", seed=0, **SIZES, data_dir=tmp_path / "file" / "data")
