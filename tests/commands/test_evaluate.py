"""Evaluating a finished run: each number is the one that the library gives, and nothing is computed twice."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import tasks
from rlhf_jax.commands import evaluate as command
from rlhf_jax.commands.evaluate import Settings, evaluate
from rlhf_jax.data import sources
from rlhf_jax.evaluate import calibration, win_rate
from rlhf_jax.models import heads, hf
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.text import hf as text_hf
from tests.commands.conftest import LABELS, PAIRS, SFT
from tests.support import Recorder, error, write_rows


@pytest.fixture(scope="module")
def result(folder):
    return evaluate(folder, Settings())


@pytest.fixture(scope="module")
def model(folder):
    return rlhf_jax.load(folder)


def completions(folder, stage):
    (path,) = (folder / command.FOLDER).glob(f"{stage}-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_result_is_written(result, folder):
    written = json.loads((folder / command.FOLDER / "ppo.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert result.keys() == {"stage", "rows", "temperature", "seed", "text", "win_rate", "reward_model"}


def test_texts_are_measured_as_the_library_scores_them(result, folder, model):
    ours, text = completions(folder, "ppo"), result["text"]
    assert len(ours) == result["rows"] >= 2
    prompts, texts = [row["prompt"] for row in ours], [row["completion"] for row in ours]
    assert text["length"]["value"] == pytest.approx(np.mean([len(row["ids"]) for row in ours]))
    assert text["eos_rate"]["value"] == np.mean([row["ended"] for row in ours])
    lo, hi = text["learned"]["ci95"]
    assert lo < text["learned"]["value"] < hi
    labels = {row["prompt"]: row["label"] for row in SFT}
    nats = model.logprobs(prompts, [labels[prompt] for prompt in prompts])
    assert text["label_loss"]["value"] == pytest.approx(-np.concatenate(nats).mean(), abs=1e-5)
    assert {"rouge1", "rouge2", "rougeL", "copied", "distinct1", "distinct2", "repeat_rate"} <= text.keys()
    assert 0 <= text["rougeL"]["value"] <= 1 and texts


def test_the_reward_model_is_measured_on_held_out_pairs(result, folder, model):
    held_out = [row for row in PAIRS if row["prompt"] in {each["prompt"] for each in completions(folder, "ppo")}]
    chosen, rejected = (
        model.scores([row["prompt"] for row in held_out], [row[side] for row in held_out])
        for side in ("chosen", "rejected")
    )
    numbers = {name: each["value"] for name, each in result["reward_model"].items()}
    assert numbers["pairs"] == len(held_out)
    assert numbers["accuracy"] == np.mean(chosen > rejected)
    assert numbers["accuracy_of_longer"] == 1 and numbers["accuracy_of_shorter"] == 0  # every label is longer than "hm"
    assert numbers["brier"] == pytest.approx(calibration.brier(chosen - rejected), abs=1e-5)
    lengths = [len(row[side]) + 2 for side in ("chosen", "rejected") for row in held_out]
    assert numbers["length_correlation"] == pytest.approx(
        np.corrcoef(lengths, np.concatenate([chosen, rejected]))[0, 1], abs=1e-4
    )
    assert "accuracy_where_chosen_is_shorter" not in numbers


def test_the_reward_model_is_tried_on_other_prompts_and_cut_texts(result, folder, model):
    held_out = tasks.load(configs.read(folder)).rows("preferences").held_out
    prompts, texts = [row["prompt"] for row in held_out], [row["chosen"] for row in held_out]
    own, other = model.scores(prompts, texts), model.scores(prompts[1:] + prompts[:1], texts)
    encode, eos_id = model.tokenizer.encode, model.tokenizer.eos_id
    ids = [[*encode(" " + text), eos_id] for text in texts]
    cut = [encode(prompt) + each[: len(each) // 2] + [eos_id] for prompt, each in zip(prompts, ids, strict=True)]
    numbers = {name: each["value"] for name, each in result["reward_model"].items()}
    assert numbers["accuracy_prefers_own_prompt"] == win_rate.win_rate(own, other)[0]
    assert numbers["accuracy_prefers_whole"] == win_rate.win_rate(own, model.score_tokens(cut))[0]


def test_the_win_rate_is_over_the_stage_before(result, folder, model):
    assert result["win_rate"]["against"] == "sft"
    prompts = [row["prompt"] for row in completions(folder, "ppo")]
    texts = [[row["completion"] for row in completions(folder, stage)] for stage in ("ppo", "sft")]
    scores = [model.scores(prompts, side) for side in texts]
    wins = result["win_rate"]["learned"]
    assert (wins["value"], wins["ci95"]) == win_rate.win_rate(*scores)
    assert 0 <= wins["length_controlled"]["value"] <= 1
    assert wins["words"] == [np.mean([len(text.split()) for text in side]) for side in texts]


def test_a_run_of_pairs_alone_has_no_score(tmp_path):
    """DPO's reward is `learned` where none is named, and there is no such model."""
    config = configs.Config(algorithm="dpo", data=sources.Config(source="files"))
    run = command.Run(tmp_path, config, types.SimpleNamespace(reward=None), [], [], 1.0, Settings(), None)
    assert run.scores == {}


def test_a_second_evaluation_samples_nothing(result, folder, monkeypatch):
    monkeypatch.setattr(Pretrained, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert evaluate(folder, Settings()) == result


def test_other_weights_are_sampled_anew(result, folder, tmp_path, monkeypatch):
    """A run that was trained again has another summary: its completions get a file of their own."""
    (tmp_path / "ppo").symlink_to(folder / "ppo")
    for name in ("text", "sft", "reward", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    evaluate(tmp_path, Settings(rows=2))
    monkeypatch.setattr(command.generate, "made_of", lambda *_: {"run": "trained again"})
    evaluate(tmp_path, Settings(rows=2))
    assert len(list((tmp_path / command.FOLDER).glob("ppo-*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("judge", "name"),
    [("rouge", "rouge"), ("{folder}/rules.py:short", "{folder}/rules.py:short"), ("{python} {folder}/judge.py",) * 2],
)
def test_any_judge_against_the_references(judge, name, folder):
    (folder / "rules.py").write_text("def short(texts):\n    return [-len(text) for text in texts]\n")
    (folder / "judge.py").write_text(
        'import sys\nfor line in sys.stdin:\n    print(\'{"winner": "tie"}\', flush=True)\n'
    )
    names = {"folder": folder, "python": sys.executable}
    judge, name = judge.format(**names), name.format(**names)
    result = evaluate(folder, Settings(judge=judge, against="reference"))
    wins = result["win_rate"]
    assert wins.keys() == {"against", name} and wins["against"] == "reference"
    if judge == "rouge":  # no text is closer to the reference than itself
        assert wins[name]["value"] <= 0.5
    if "judge.py" in judge:
        assert wins[name]["value"] == wins[name]["ties"] * 0.5 == 0.5


def test_another_run_and_other_rows(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{label} sets"} for label in LABELS])
    result = evaluate(folder, Settings(against=str(folder), rows=3), data=rows)
    assert result["rows"] == 3 and result["win_rate"]["learned"]["value"] == 0.5  # against itself
    assert "label_loss" not in result["text"]


@pytest.fixture(scope="module")
def square(folder, finished, tmp_path_factory):
    """Another run, whose sizes transformers can have."""
    square = tmp_path_factory.mktemp("square")
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= {"head_size": 8, "init_std": 0.5}
    (square / "config.json").write_text(json.dumps(config))
    (square / "text").symlink_to(folder / "text")
    made = configs.parse(config).model
    params = jax.jit(heads.LanguageModel(made).init)(jax.random.key(0))
    finished(square, "reward", reward=heads.ScalarModel(made).init(jax.random.key(1), params))
    finished(square, "ppo", policy=params)
    return square


@pytest.fixture(scope="module")
def exported(square, tmp_path_factory):
    """Folders with the policy and the reward model of `square` as transformers has them."""
    out, model = tmp_path_factory.mktemp("exported"), rlhf_jax.load(square)
    parts = {"eos_id": model.tokenizer.eos_id, "pad_id": model.tokenizer.pad_id}
    parts |= {"beside": text_hf.to_hf(model.tokenizer)}
    hf.save(out / "policy", model.params, model.config, generation={"max_new_tokens": 9}, **parts)
    hf.save_scalar(out / "reward", model.reward, model.config, **parts)
    return out


def test_an_exported_model_is_evaluated_like_the_run(square, exported, tmp_path):
    """On the run's rows: the same prompts and the same noise give the same completions."""
    run = evaluate(square, Settings(against="reference"))
    labels = {row["prompt"]: row["label"] for row in SFT}
    rows = [{"prompt": row["prompt"], "label": labels[row["prompt"]]} for row in completions(square, "ppo")]
    judge, data = str(exported / "reward"), write_rows(tmp_path / "rows.jsonl", rows)
    settings = Settings(judge=judge, temperature=run["temperature"])
    found = evaluate(exported / "policy", settings, data=data)
    assert found["rows"] == run["rows"] and "reward_model" not in found
    for name in "length", "rouge1", "copied", "distinct2":
        assert found["text"][name] == run["text"][name], name
    assert found["text"]["label_loss"]["value"] == pytest.approx(run["text"]["label_loss"]["value"], abs=1e-5)
    assert found["win_rate"]["against"] == "reference"
    assert found["win_rate"][judge]["value"] == run["win_rate"]["learned"]["value"]
    itself = dataclasses.replace(settings, against=str(exported / "policy"))
    assert evaluate(exported / "policy", itself, data=data)["win_rate"][judge]["ties"] == 1


def test_an_exported_reward_model_is_measured_on_a_file_of_pairs(square, exported, tmp_path):
    run = evaluate(square, Settings(stage="reward"))["reward_model"]
    held_out = tasks.load(configs.read(square)).rows("preferences").held_out
    pairs = write_rows(tmp_path / "pairs.jsonl", held_out)
    found = evaluate(exported / "reward", Settings(), data=pairs)["reward_model"]
    assert found["accuracy"] == run["accuracy"] and found["pairs"] == run["pairs"]
    assert "data: expected a file of rows" in error(evaluate, exported / "reward", Settings())
    rows = write_rows(tmp_path / "rows.jsonl", SFT)
    assert "expected a column 'chosen'" in error(evaluate, exported / "reward", Settings(), data=rows)


def test_a_policy_is_no_judge(folder, exported):
    message = error(evaluate, folder, Settings(judge=str(exported / "policy")))
    assert message == f"judge: {exported}/policy: expected a reward model, got a policy"


def test_a_reward_model_alone(folder, result):
    assert evaluate(folder, Settings(stage="reward"))["reward_model"] == result["reward_model"]


def test_it_is_shown(result):
    reporter = Recorder()
    command.show(result, reporter)
    assert len(reporter.tables) == 3


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({"against": "reference"}, [{"prompt": "a"}, {"prompt": "b"}], "against: expected rows with a label"),
        (
            {"against": "nowhere"},
            None,
            "against: expected sft, reward, ppo, reference, or the folder of a run or a model",
        ),
        ({"stage": "tweets"}, None, "stage: expected sft or reward or ppo"),
        ({"rows": 1}, None, "rows: expected at least 2"),
        ({"judge": "gold"}, None, "gold"),
        ({}, [{"text": "a"}], "data: "),
    ],
)
def test_what_cannot_be_evaluated_is_named(settings, rows, expected, folder, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows) if rows else None
    assert expected in error(evaluate, folder, Settings(**settings), data=data)
