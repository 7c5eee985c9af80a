"""Exported, and read back from the folder alone. That transformers gives the same was seen by hand."""

import json
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import checkpoint, pipeline
from rlhf_jax import config as configs
from rlhf_jax.algorithms import POLICY, policy_gradient, ppo
from rlhf_jax.commands import model_card
from rlhf_jax.commands.export import export
from rlhf_jax.data import corpus, sources
from rlhf_jax.data.tldr import format_query
from rlhf_jax.errors import InputError
from rlhf_jax.generate import Sampling, generate
from rlhf_jax.models import decoder, hf, hf_config
from rlhf_jax.models.families import neox
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.report import metrics
from rlhf_jax.text import files
from rlhf_jax.training.checkpoint import Checkpoints
from tests.support import assert_trees_equal, changed, differ, error, opened, stages

SIZES = {"layers": 1, "heads": 2, "head_size": 8, "width": 16, "context": 64}
MODELS = {"gpt2": SIZES, "neox": SIZES | neox.NEOX | {"context": 64, "rotary_share": 0.5, "vocab_size": 320}}
ROW = {"prompt": format_query("s", "title", "the secret post"), "label": "the secret label"}
MEASURED = {"ppo/score": 0.25, "ppo/score_ci95": [0.125, 0.5], "reward/accuracy": 0.75, "ppo/steps": 3}


def random(shapes):
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: draw.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def finish(steps, stage, result):
    """The stage as if it had been trained."""
    folder = opened(steps, stage)
    with Checkpoints(folder / "result") as checkpoints:
        checkpoints.save(3, result, {})
    metrics.summarize(folder / "summary.json", {**metrics.environment(), "seed": 1, "seconds": 1.5, **MEASURED})


@pytest.fixture(scope="module", params=list(MODELS))
def made(request, tmp_path_factory):
    """A finished run of random parameters; its data have been moved since."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROW | {"prompt": f"{i}"}) + "\n" for i in range(20)))
    config = configs.Config(
        text=configs.Text(kind="bpe", vocab_size=300),
        data=sources.Config(
            source="files", sft=str(folder / "rows.jsonl"), held_out=0.3, prompt_length=40, response_length=9
        ),
        model=decoder.Config(**MODELS[request.param]),
        ppo=ppo.Config(kl_coef=0.0625),
    )
    steps = stages(config, folder / "run")
    apply = steps.setup.apply
    shapes = jax.eval_shape(apply.policy.init, jax.random.key(0))
    policy = random(shapes)
    if "wpe" in policy:  # else, tied, it says its last token again and again
        policy["wpe"]["embedding"] *= 9
    reward = random(jax.eval_shape(apply.scalar.zero_head, shapes))
    finish(steps, "sft", {"policy": jax.tree.map(jnp.zeros_like, policy)})
    finish(steps, "reward", {"reward": reward})
    finish(steps, "ppo", {"policy": policy, "value": reward})
    (folder / "rows.jsonl").unlink()
    workdir, tokenizer = steps.workdir.path, steps.setup.tokenizer
    return types.SimpleNamespace(apply=apply, tokenizer=tokenizer, policy=policy, reward=reward, workdir=workdir)


def greedy(model, params, tokenizer, prompts, count):
    """What the model goes on with, at its likeliest."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, ids))
    prompt_BP = jnp.array([[tokenizer.pad_id] * (longest - len(row)) + row for row in ids])
    keys_B = jax.random.split(jax.random.key(0), len(ids))
    how = Sampling(count, tokenizer.eos_id, tokenizer.pad_id, temperature=0.0)
    run = jax.jit(generate, static_argnums=(0, 5))
    drawn = run(model, params, prompt_BP, prompt_BP != tokenizer.pad_id, keys_B, how)
    return [tokenizer.decode(row.tolist()) for row in np.asarray(drawn.response_BR)]


def test_a_policy_is_read_back_from_its_folder_alone(made, tmp_path):
    """Bit for bit, and it writes the same text at its likeliest."""
    assert export(made.workdir, tmp_path / "out") == "ppo"
    config = hf_config.read(tmp_path / "out")
    params, tokenizer = hf.load(tmp_path / "out", config), files.from_files(tmp_path / "out")
    assert_trees_equal(params, made.policy)
    assert tokenizer == made.tokenizer and tokenizer.pad_id != tokenizer.eos_id
    prompts = ["the", "the secret label", "0", "a post, a title", "post? 12 posts!"]
    ours = greedy(made.apply.policy, made.policy, made.tokenizer, prompts, 9)
    policy = LanguageModel(config, ids=tokenizer.vocab_size)
    theirs = greedy(policy, params, tokenizer, prompts, json_of(tmp_path / "out")["max_new_tokens"])
    assert ours == theirs and len(set(ours)) > 2


def test_the_run_and_its_exports_are_the_same_from_python(made, tmp_path):
    export(made.workdir, tmp_path / "policy")
    export(made.workdir, tmp_path / "reward", "reward")
    run, policy, reward = (rlhf_jax.load(folder) for folder in (made.workdir, tmp_path / "policy", tmp_path / "reward"))
    prompts = ["the secret", "post 12"]
    texts = run.generate(prompts, n=4, max_tokens=9)
    assert texts == policy.generate(prompts, n=4, max_tokens=9) and len(set(texts)) > 2
    np.testing.assert_allclose(reward.scores("the", texts), run.scores("the", texts), rtol=1e-4, atol=1e-4)


def json_of(folder, name="generation_config.json"):
    return json.loads((folder / name).read_text())


def test_generate_is_told_how_the_run_drew_its_samples(made, tmp_path):
    """transformers would take the 50 likeliest tokens, and stop after 20."""
    export(made.workdir, tmp_path)
    ids = {"bos_token_id": made.tokenizer.eos_id, "eos_token_id": made.tokenizer.eos_id}
    ids |= {"pad_token_id": made.tokenizer.pad_id}
    drawn = {"do_sample": True, "temperature": 0.01, "top_k": 0, "max_new_tokens": 9}
    if (size := json_of(tmp_path, "config.json")["vocab_size"]) > made.tokenizer.vocab_size:
        drawn["suppress_tokens"] = list(range(made.tokenizer.vocab_size, size))
    assert ("suppress_tokens" in drawn) == ("wpe" not in made.policy)  # of GPT-NeoX: 320 ids, of which 300 are known
    assert json_of(tmp_path) == ids | drawn
    tokenizer = json_of(tmp_path, "tokenizer_config.json")
    assert tokenizer["padding_side"] == "left"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_reward_model_scores_what_it_scored(made, tmp_path):
    """Up to the rounding of its bias, which moves into the last norm."""
    assert export(made.workdir, tmp_path, "reward") == "reward"
    config = hf_config.read(tmp_path)
    params = hf.scalar_from_hf(hf.read(tmp_path), config)
    tokens_BT = jax.random.randint(jax.random.key(0), (4, 12), 0, made.tokenizer.vocab_size)
    mask_BT = jnp.arange(12) < jnp.array([[12], [9], [3], [1]])
    ours = made.apply.scalar.score(made.reward, tokens_BT, mask_BT)
    np.testing.assert_allclose(ScalarModel(config).score(params, tokens_BT, mask_BT), ours, rtol=1e-5, atol=1e-5)
    assert abs(ours).min() > 1e-3
    assert json_of(tmp_path, "tokenizer_config.json")["padding_side"] == "right"
    assert json_of(tmp_path, "config.json")["architectures"][0].endswith("ForSequenceClassification")
    assert not (tmp_path / "generation_config.json").exists()


def test_the_card_tells_recipe_data_and_numbers_and_no_row_or_place(made, tmp_path):
    export(made.workdir, tmp_path / "policy")
    export(made.workdir, tmp_path / "reward", "reward")
    card, reward = ((tmp_path / name / "README.md").read_text() for name in ("policy", "reward"))
    for told in (
        "kl_coef 0.0625", "| `seed` | 1 |", "summaries: rows.jsonl", "| `ppo/score` | 0.25 |",
        "| `ppo/score_ci95` | 0.125, 0.5 |", f"jax {jax.__version__}", "1.5 seconds", "AutoModelForCausalLM",
    ):  # fmt: skip
        assert told in card
    assert "kl_coef" not in reward and "`reward/accuracy` | 0.75" in reward and "ppo/" not in reward
    assert "AutoModelForSequenceClassification" in reward
    for text in card, reward:
        assert "secret" not in text and str(made.workdir.parent) not in text
        assert not [field for field in ("eval_every", "save_every", "top_k") if field in text]


@pytest.mark.parametrize(("unfinished", "expected"), [((), "ppo"), (("ppo",), "sft"), (("ppo", "reward"), "sft")])
def test_the_last_finished_policy_is_the_default(unfinished, expected, made, tmp_path):
    shutil.copytree(made.workdir, tmp_path / "run")
    for stage in unfinished:
        (tmp_path / "run" / stage / "summary.json").unlink()
    assert export(tmp_path / "run", tmp_path / "out") == expected
    params = hf.load(tmp_path / "out", hf_config.read(tmp_path / "out"))
    assert_trees_equal(params, made.policy if expected == "ppo" else jax.tree.map(np.zeros_like, made.policy))


def nothing(folder):
    shutil.rmtree(folder / "sft"), shutil.rmtree(folder / "ppo")


def other_heads(folder):
    tree = json.loads((folder / "config.json").read_text())
    tree["model"]["head_size"] = 7
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "stage", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "", "workdir: .*config.json: expected the config of a run"),
        (lambda folder: (folder / "config.json").write_text("{"), "", "workdir: .*config.json: expected the config"),
        (lambda folder: (folder / "config.json").write_text("{}"), "", "workdir: .*config.json: seed: missing"),
        (lambda folder: None, "rl", "stage: expected sft or reward or ppo, got 'rl'"),
        (lambda folder: (folder / "ppo" / "summary.json").unlink(), "ppo", "stage: expected a finished one .sft, rew"),
        (nothing, "", "workdir: expected a finished stage in .*; there is none yet"),
        (lambda folder: shutil.rmtree(folder / "ppo" / "result"), "", "expected the folder of a run or a stage with"),
        (lambda folder: shutil.rmtree(folder / "text"), "", "tokenizer.json: No such file"),
        *(
            (
                lambda folder, text=text: (folder / "ppo" / "summary.json").write_text(text),
                "",
                f"summary.json: {reason}",
            )
            for text, reason in (
                ("", "expected the summary of a stage .Expecting value.; remove .* again"),
                ("[]", "expected the summary of a stage .got list.; remove .* again"),
                (
                    '{"versions": [], "machine": {}, "seconds": 1}',
                    "expected versions, machine, seconds; remove .* again",
                ),
            )
        ),
        (
            other_heads,
            "",
            "model.(head_size: expected model.width / model.heads = 16 / 2|rotary_share: expected 0, or)",
        ),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_written(change, stage, told, made, tmp_path):
    shutil.copytree(made.workdir, tmp_path / "run")
    change(tmp_path / "run")
    with pytest.raises(InputError, match=told) as caught:
        export(tmp_path / "run", tmp_path / "out", stage)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_overwritten(made, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert error(export, made.workdir, tmp_path) == f"{tmp_path}: expected a new or an empty folder to write to"
    assert error(export, made.workdir, tmp_path / "mine").endswith("expected a new or an empty folder to write to")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine", "mine")]


@pytest.mark.parametrize("out", ["mine/out", "~/mine/out"])
def test_the_place_to_write_to_is_checked_before_anything_is_read(out, tmp_path, monkeypatch):
    """And ~ is the home folder. The workdir is not there, which would be said otherwise."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").write_text("mine")
    out = out if out.startswith("~") else tmp_path / out
    expected = f"{tmp_path}/mine/out: cannot be written ({tmp_path}/mine is not a folder)"
    assert error(export, tmp_path / "no", out) == expected


def test_the_home_folder_is_read_and_written(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(made.workdir)
    export("~/run", "~/new/out", "sft")
    assert (tmp_path / "new" / "out" / "README.md").exists()
    assert rlhf_jax.load("~/new/out").tokenizer == made.tokenizer


def test_of_several_seeds_the_first_is_exported(tmp_path):
    """Of a policy that learned by itself, whose texts begin with EOS."""
    config = configs.write(
        seeds=2,
        model=decoder.Config(**SIZES),
        data=corpus.Config(made=20, length=12),
        pretrain=configs.Supervised(steps=0),
        sft=configs.Supervised(steps=0),
        policy_gradient=policy_gradient.Config(steps=1, batch=4, lr=0.1),
        evaluation=configs.Evaluation(prompts=4, batch=4),
    )
    pipeline.run(config, tmp_path / "run")
    first, second = (checkpoint.load(tmp_path / "run" / "seeds" / str(i) / "rl")["policy"] for i in range(2))
    assert differ(first, second)
    assert export(tmp_path / "run", tmp_path / "out") == "rl"
    assert_trees_equal(hf.load(tmp_path / "out", hf_config.read(tmp_path / "out")), first)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `seeds` | 2, this is the first |" in card and "tokenizer('<|endoftext|>'" in card
    assert "`policy_gradient`" in card and "`ppo`" not in card and "20 tweets, written by rlhf_jax (seed 0)" in card
    assert json_of(tmp_path / "out")["max_new_tokens"] == 11


TWO = ("ppo", "policy_gradient")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on prompts and a reward of one's own, with two algorithms in one workdir."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} plus"}) + "\n" for i in range(20)))
    (folder / "mine.py").write_text("def length(texts):\n    return [float(len(text)) for text in texts]\n")
    rollouts = {"steps": 1, "batch": 4, "epochs": 1, "lr": 0.1}
    config = configs.Config(
        task="prompts",
        text=configs.Text(kind="char"),
        data=sources.Config(
            source="files", prompts=str(folder / "prompts.jsonl"), held_out=0.3, prompt_length=9, response_length=5
        ),
        model=decoder.Config(**SIZES),
        sft=configs.Supervised(steps=0),
        reward=configs.Reward(kind=f"{folder}/mine.py:length"),
        ppo=ppo.Config(**rollouts),
        policy_gradient=policy_gradient.Config(**rollouts),
        evaluation=configs.Evaluation(prompts=4, batch=4),
    )
    for algorithm in TWO:
        pipeline.run(changed(config, algorithm=algorithm), folder / "run")
    return folder


def test_a_run_on_own_prompts(own, tmp_path):
    """Its card has its recipe, and nothing of summaries or of the other algorithm."""
    policies = {}
    for algorithm in TWO:
        config = changed(configs.read(own / "run"), algorithm=algorithm)
        (own / "run" / "config.json").write_text(json.dumps(configs.tree(config)))
        assert export(own / "run", tmp_path / algorithm) == algorithm
        policies[algorithm] = hf.load(tmp_path / algorithm, hf_config.read(tmp_path / algorithm))
        assert_trees_equal(policies[algorithm], checkpoint.load(own / "run" / algorithm)["policy"])
        assert json_of(tmp_path / algorithm)["max_new_tokens"] == 5
        card = (tmp_path / algorithm / "README.md").read_text()
        reward = "the reward mine.py:length"
        assert f"# A policy after {algorithm.replace('_', ' ')} against {reward}\n" in card
        assert "prompts: prompts.jsonl" in card and f"`{algorithm}/reward_sft`" in card
        assert not [other for other in TWO if other != algorithm and other in card]
        assert "summar" not in card.replace("`summary.json`", "") and "SUBREDDIT" not in card
        assert str(own) not in card
    assert differ(*policies.values())


def test_weights_to_start_from_are_named(made, tmp_path):
    shutil.copytree(made.workdir, tmp_path / "run")
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    for init, told in ("who/what@v1", "weights to start from: who/what@v1"), (str(tmp_path), Path(tmp_path).name):
        tree["model"]["init"] = init
        (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
        export(tmp_path / "run", tmp_path / told.rpartition("/")[2])
        card = (tmp_path / told.rpartition("/")[2] / "README.md").read_text()
        assert told in card and str(tmp_path) not in card
        assert ("base_model: who/what\n" in card) == (init == "who/what@v1")


def test_every_stage_has_words():
    rows = configs.Supervised(steps=1)
    judged = configs.Config(sft=rows, reward=configs.Reward(holdout_judge=True))
    every = [
        configs.write(pretrain=rows),
        judged,
        *(configs.Config(sft=rows, algorithm=algorithm) for algorithm in POLICY),
    ]
    names = {name for config in every for name in configs.stages(config)}
    assert names == model_card.WHAT.keys() | POLICY.keys()
    assert model_card._what(configs.Config(algorithm="dpo"), "dpo") == "A policy after dpo on preference pairs"
