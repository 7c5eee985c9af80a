import dataclasses
import functools
import inspect
import json
import os
import re
import runpy
from pathlib import Path

import pytest

from rlhf_jax import config as configs
from rlhf_jax import provenance
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.data import corpus
from rlhf_jax.data.sources import COLUMNS
from rlhf_jax.tasks import TASKS
from tests.support import error

ROOT = Path(__file__).parents[1]


def tree(**changes):
    """The defaults as a nested dict, with some dotted fields changed: tree(**{"ppo.steps": 3})."""
    whole = configs.tree(configs.Config())
    for field, value in changes.items():
        *sections, name = field.split(".")
        functools.reduce(dict.__getitem__, sections, whole)[name] = value
    return whole


def without(field):
    whole = tree()
    *sections, name = field.split(".")
    del functools.reduce(dict.__getitem__, sections, whole)[name]
    return whole


# Parsing


def test_what_is_parsed_is_what_was_given():
    config = configs.parse(tree(**{"seed": 7, "ppo.kl_coef": 0.1, "data.sft": "a.jsonl", "ppo.whiten_rewards": True}))
    assert (config.seed, config.ppo.kl_coef, config.data.sft, config.ppo.whiten_rewards) == (7, 0.1, "a.jsonl", True)
    assert configs.parse(configs.tree(config)) == config


@pytest.mark.parametrize(
    ("field", "near"),
    [("ppo.kl_coeff", "kl_coef"), ("ppo.Steps", "steps"), ("sed", "seed"), ("pppo", "ppo"), ("data.sft_", "sft")],
)
def test_an_unknown_field_is_named_with_its_nearest_neighbour(field, near):
    assert error(configs.parse, tree(**{field: 1})) == f"{field}: no such field; did you mean {near}?"


def test_an_unknown_field_like_no_other_is_named_alone():
    assert error(configs.parse, tree(**{"ppo.zzzzzz": 1})) == "ppo.zzzzzz: no such field"


@pytest.mark.parametrize("field", ["seed", "ppo", "ppo.kl_coef", "data.world_seed"])
def test_a_missing_field_is_named(field):
    assert error(configs.parse, without(field)).startswith(f"{field}: missing, expected ")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ppo.steps", 1.5, "expected int, got 1.5"),
        ("ppo.steps", 2.0, "expected int, got 2.0"),
        ("ppo.steps", "2", "expected int, got '2'"),
        ("ppo.steps", None, "expected int, got None"),
        ("ppo.steps", True, "expected int, got True"),  # a bool is an int to Python
        ("ppo.lr", True, "expected float, got True"),
        ("ppo.lr", "1e-3", "expected float, got '1e-3'"),
        ("ppo.whiten_rewards", 1, "expected bool, got 1"),
        ("data.sft", 3, "expected str, got 3"),
        ("data.sft", ["a.jsonl"], "expected str, got ['a.jsonl']"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value, message):
    assert error(configs.parse, tree(**{field: value})) == f"{field}: {message}"


def test_a_whole_number_does_for_a_float():
    lr = configs.parse(tree(**{"ppo.lr": 1})).ppo.lr
    assert (type(lr), lr) == (float, 1.0)


# Checks


NAN = float("nan")
COUNT = "at least 1"
WORLD = {"data.source": "world", "text.kind": "bpe", "data.prompt_length": 64, "data.response_length": 22}


def check(devices=1, **changes):
    configs.check(configs.parse(tree(**WORLD | changes)), devices=devices)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.context": 86},  # exactly prompt + response
        {"model.rotary_share": 1.0},
        {"data.response_length": 2, "model.dropout": 0.0, "evaluation.temperature": 0.0, "evaluation.prompts": 2},
        {"ppo.gamma": 0.0, "ppo.lam": 0.0},
        {"ppo.gamma": 1.0, "ppo.lam": 1.0},
        {"ppo.kl_coef": 0.0, "sft.eval_every": 0, "sft.save_every": 0, "sft.warmup": 10_000},
    ],
)
def test_the_edge_of_what_is_possible(changes):
    check(**changes)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("text.kind", "words", "files or gpt2 or bpe or char, got 'words'"),
        ("data.source", "web", "world or files or hub, got 'web'"),
        ("data.split", "", "the name of one, got ''"),
        ("model.dtype", "float16", "float32 or bfloat16, got 'float16'"),
        ("sft.loss_on", "prompt", "all or response, got 'prompt'"),
        ("ppo.missing_eos", "ignore", "replace or subtract, got 'ignore'"),
        ("ppo.value_init", "policy", "auto or reward or zero, got 'policy'"),
        ("sft.schedule", "step", "linear or cosine or constant, got 'step'"),
        ("reward.schedule", "step", "linear or cosine or constant, got 'step'"),
        ("ppo.schedule", "step", "linear or cosine or constant, got 'step'"),
        ("task", "translate", f"{' or '.join(TASKS)}, got 'translate'"),
        ("algorithm", "no", f"{' or '.join(ALGORITHMS)}, got 'no'"),
        ("evaluation.result", "first", "last or best, got 'first'"),
        ("data.cut", "middle", "left or right or newline or skip or error, got 'middle'"),
        ("seed", -1, "at least 0 and less than 4.29497e+09, got -1"),
        ("seed", 2**32, "at least 0 and less than 4.29497e+09, got 4294967296"),
        *((f"model.{name}", 0, f"{COUNT}, got 0") for name in ("layers", "heads", "width")),
        ("model.head_size", -1, f"{COUNT}, got -1"),
        *(("model.rotary_share", share, f"at least 0 and at most 1, got {share}") for share in (-0.5, 1.1, NAN)),
        *(("model.rotary_share", share, "0, or a share of head_size = 64 that is ") for share in (0.02, 0.05)),
        *(
            ("model.rotary_base", 0.0, "more than 0, got 0.0"),
            ("model.rotary_base", NAN, "more than 0 and at most 1e+09, got nan"),
        ),
        *(("model.norm_eps", value, f"more than 0 and at most 1, got {value}") for value in (0.0, NAN)),
        ("model.dropout", 1.0, "at least 0 and less than 1, got 1.0"),
        ("model.dropout", -0.1, "at least 0 and less than 1, got -0.1"),
        ("model.context", 85, "at least data.prompt_length + data.response_length = 86, got 85"),
        ("data.held_out", 0.0, "more than 0 and less than 1, got 0.0"),
        ("data.held_out", 1.0, "more than 0 and less than 1, got 1.0"),
        ("data.prompt_length", 0, f"{COUNT}, got 0"),
        ("data.response_length", 1, "at least 2, got 1"),
        ("data.pair_length", 1, "0, or at least 2, got 1"),
        ("data.pair_length", -3, "0, or at least 2, got -3"),
        ("evaluation.prompts", 1, "at least 2, got 1"),
        ("evaluation.batch", 0, f"{COUNT}, got 0"),
        ("alarms.over_optimization", -1.0, "at least 0 and at most 100, got -1.0"),
        ("evaluation.temperature", -0.1, "at least 0 and at most 100, got -0.1"),
        ("evaluation.temperature", NAN, "at least 0 and at most 100, got nan"),
        *(
            (f"{stage}.{name}", 0, f"{COUNT}, got 0")
            for stage in ("sft", "reward", "ppo")
            for name in ("batch", "microbatches")
        ),
        ("sft.steps", -1, "at least 0, got -1"),  # with 0 the stage is left out
        ("reward.steps", 0, "more than 0 where the reward is learned, got 0"),
        ("pretrain.steps", 5, "0, as only task = write has plain texts to pretrain on, got 5"),
        ("ppo.steps", 0, f"{COUNT}, got 0"),
        *(
            (f"{stage}.lr", lr, f"more than 0 and at most 10, got {lr}")
            for stage in ("sft", "reward", "ppo")
            for lr in (0.0, NAN)
        ),
        ("ppo.epochs", 0, f"{COUNT}, got 0"),
        ("ppo.minibatches", 0, f"{COUNT}, got 0"),
        ("ppo.temperature", 0.0, "more than 0 and at most 100, got 0.0"),
        ("ppo.clip", 0.0, "more than 0, got 0.0"),
        ("ppo.value_clip", 0.0, "more than 0, got 0.0"),
        ("ppo.gamma", 1.01, "at least 0 and at most 1, got 1.01"),
        ("ppo.lam", -0.01, "at least 0 and at most 1, got -0.01"),
        ("ppo.kl_coef", -0.01, "at least 0, got -0.01"),
        *(
            (f"{name}.{field}", value, f"{off} in training (a rollout samples the distribution that the update ")
            for name in ("ppo", "policy_gradient")
            for field, value, off in (("top_k", 50, 0), ("top_p", 0.9, 1))
        ),
    ],
)
def test_what_is_impossible_is_refused(field, value, expected):
    """Top-k and top-p in training: invariant 3."""
    assert error(check, **{field: value}).startswith(f"{field}: expected {expected}")


def test_over_optimization_is_seen_by_gold_or_a_judge():
    watched = {"alarms.over_optimization": 2.0}
    configs.check(configs.parse(tree(**WORLD | watched)))
    files = {"data.source": "files", "data.sft": __file__, "data.preferences": __file__, "text.kind": "char"}
    expected = "0 where there is neither gold (data.source) nor reward.holdout_judge, got 2.0"
    assert error(check, **files | watched) == f"alarms.over_optimization: expected {expected}"
    check(**files | watched | {"reward.holdout_judge": True})


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"sft.batch": 10, "sft.microbatches": 4}, 1, "sft.batch: expected a multiple of {} = 4, got 10"),
        ({"reward.batch": 10}, 4, "reward.batch: expected a multiple of {} x data x fsdp = 1 x 4 x 1, got 10"),
        (
            {"ppo.batch": 12, "ppo.minibatches": 2, "ppo.microbatches": 4},
            1,
            "ppo.batch: expected a multiple of {} = 8, got 12",
        ),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(changes, devices, message):
    assert error(check, devices, **changes) == message.format("minibatches x microbatches")


@pytest.mark.parametrize(
    ("lanes", "devices", "expected"),
    [
        (5, 1, "0, or a divisor of batch = 12"),
        (-4, 1, "at least 0"),
        (8, 1, "0, or a divisor of batch = 12"),
        (2, 4, "0, or a divisor of ppo.batch = 12 and a multiple of data x fsdp = 4 x 1"),
    ],
)
def test_lanes_must_share_the_batch(lanes, devices, expected):
    message = error(check, devices, **{"ppo.batch": 12, "ppo.lanes": lanes})
    assert message == f"ppo.lanes: expected {expected}, got {lanes}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 0}, "mesh.data: expected -1 (all devices that are left), or at least 1, got 0"),
        (
            {"mesh.data": 2, "mesh.fsdp": 3},
            "mesh.data: expected data x fsdp x tensor to be the number of devices = 8, got 2 in 2 x 3 x 1",
        ),
        ({"mesh.tensor": 4, "model.heads": 6}, "mesh.tensor: expected a divisor of model.heads = 6, got 4"),
        (
            {"mesh.tensor": 4, "model.heads": 8, "model.kv_heads": 2},
            "mesh.tensor: expected a divisor of model.kv_heads = 2, got 4",
        ),
        (
            {"mesh.fsdp": 2, "sft.batch": 12},
            "sft.batch: expected a multiple of minibatches x microbatches x data x fsdp = 1 x 4 x 2, got 12",
        ),
        (
            {"algorithm": "grpo", "grpo.group": 4, "grpo.batch": 16},
            "grpo.batch: expected a multiple of group x data x fsdp = 4 x 8 x 1, got 16",
        ),
        (
            {"algorithm": "grpo", "grpo.group": 4, "grpo.batch": 64, "grpo.lanes": 16},
            "grpo.lanes: expected a multiple of group x data x fsdp = 4 x 8 x 1, got 16",
        ),
    ],
)
def test_a_mesh_that_cannot_share_the_work_is_refused(changes, message):
    assert error(check, 8, **changes) == message


def test_devices_along_tensor_share_rows():
    check(8, **{"mesh.tensor": 2, "model.heads": 2, "sft.batch": 4, "reward.batch": 4, "ppo.batch": 4})
    assert "data x fsdp = 1 x 8 x 1" in error(check, 8, **{"sft.batch": 4, "reward.batch": 4, "ppo.batch": 4})


def test_a_workdir_goes_on_with_another_mesh():
    """No number depends on it."""
    config = configs.Config()
    other = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=4))
    assert provenance.depends(config, "ppo") == provenance.depends(other, "ppo")


def test_a_run_is_read_on_a_machine_with_other_devices(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tree(**{"mesh.data": 8, "mesh.fsdp": 4})))
    assert configs.read(tmp_path) == configs.parse(tree())


def test_there_are_not_more_widths_than_columns():
    assert error(check, **{"data.prompt_length": 8, "ppo.widths": 9}) == (
        "ppo.widths: expected at most data.prompt_length = 8, got 9"
    )


def test_pairs_that_may_be_longer_need_a_longer_context():
    assert error(check, **{"data.prompt_length": 80, "data.response_length": 6, "data.pair_length": 945}) == (
        "model.context: expected at least data.prompt_length + data.pair_length = 1025, got 1024"
    )


def test_all_files_that_are_missing_are_named_at_once(tmp_path):
    (tmp_path / "there.jsonl").touch()
    paths = {"data.sft": str(tmp_path / "there.jsonl"), "data.prompts": "no.csv", "model.init": "no/such/x"}
    message = error(check, **paths, **{"data.source": "files"})
    assert "data.sft" not in message
    named = "missing files: model.init = 'no/such/x', data.prompts = 'no.csv'; give each as --config.FIELD="
    assert message.startswith(named)


def test_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "label": "b"}\n')
    (tmp_path / "own.py").write_text("def x(texts): return texts\n")
    (tmp_path / "folder").mkdir()
    files = {f"data.{name}": "~/a.jsonl" for name in ("sft", "preferences", "prompts")}
    files |= {"text.path": "~/folder", "model.init": "~/folder", "reward": "~/own.py:x", "data.source": "files"}
    config = configs.parse(tree(**WORLD | files, **{"sft.from": "~/run", "data.cache": "~"}))
    configs.check(config)
    assert config.data.sft == f"{tmp_path}/a.jsonl" and config.reward.kind == f"{tmp_path}/own.py:x"
    assert configs.place(config, "here", "sft") == tmp_path / "run" and config.data.cache == str(tmp_path)
    assert provenance.fingerprints(config).keys() == {
        f"{field} = {tmp_path}/a.jsonl" for field in files if field.startswith("data.") and field != "data.source"
    } | {f"{field} = {tmp_path}/folder" for field in ("text.path", "model.init")}


@pytest.mark.parametrize("field", ["data.sft", "text.path", "model.init"])
def test_a_pipe_is_refused_rather_than_waited_for(field, tmp_path):
    """As from <(command)."""
    os.mkfifo(tmp_path / "pipe")
    message = error(check, **{"data.source": "files", field: f"{tmp_path}/pipe"})
    assert message == f"{field}: {tmp_path}/pipe: expected a file or a folder, got a pipe or a device"


def test_a_path_that_is_too_long_is_missing():
    assert error(check, **{"text.path": "a" * 5_000}).startswith("missing files: text.path = 'aaa")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "expected the config of a run (Expecting value)"),
        ("[]", "expected the config of a run (got list)"),
        ("[" * 5_000, "expected the config of a run (more than 100 levels deep)"),
        ("{}", "seed: missing, expected int"),
        ('{"task": []}', "seed: missing, expected int"),
    ],
)
def test_a_damaged_config_of_a_run_is_named_with_its_remedy(content, reason, tmp_path):
    (tmp_path / "config.json").write_text(content)
    again = "; the command that trains the run writes it again"
    assert error(configs.read, tmp_path) == f"workdir: {tmp_path}/config.json: {reason}{again}"


def test_a_config_of_a_run_is_in_its_ranges(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tree(algorithm="no")))
    assert f"config.json: algorithm: expected {' or '.join(ALGORITHMS)}, got 'no';" in error(configs.read, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tree(task=[])))
    assert "config.json: task: expected str, got []" in error(configs.read, tmp_path)


def test_what_may_be_on_the_hub_is_not_missing():
    check(
        **{"data.source": "hub", "data.sft": "who/what", "data.preferences": "who/what/pairs@v1", "text.path": "gpt2"}
    )
    check(**{"model.init": "openai-community/gpt2@607a30d"})
    for field in "text.path", "model.init":
        for path in "no/such/folder", "gpt2/model.safetensors", "gpt2/tokenizer.json":
            assert error(check, **{field: path}).startswith(f"missing files: {field} = '{path}';")


def fields():
    for section in dataclasses.fields(configs.Config):
        yield from dataclasses.fields(section.type) if dataclasses.is_dataclass(section.type) else [section]


@pytest.mark.parametrize("field", sorted({field.name for field in fields()}))
def test_every_field_is_read(field):
    """By more than the check: a field that only config.py reads decides nothing."""
    paths = [path for path in (ROOT / "rlhf_jax").rglob("*.py") if path.name != "config.py"]
    source = "".join(path.read_text() for path in [*paths, ROOT / "experiments" / "launch.py"])
    source = source.replace('getattr(config, f"world_{kind}")', " ".join(f"config.world_{kind}" for kind in COLUMNS))
    source += inspect.getsource(configs.place).replace('"from_", ""', ".from_")
    assert re.search(rf"\.{field}\b", source)


# Free choice, and what cannot go together


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["sft", "reward", "ppo"]),
        ({"algorithm": "policy_gradient"}, ["sft", "reward", "policy_gradient"]),
        ({"sft.steps": 0}, ["reward", "ppo"]),
        ({"reward": "sentiment"}, ["sft", "ppo"]),
        ({"algorithm": "grpo"}, ["sft", "reward", "grpo"]),
        ({"reward.holdout_judge": True}, ["sft", "reward", "judge", "ppo"]),
        ({"reward.holdout_judge": True, "algorithm": "dpo"}, ["sft", "judge", "dpo"]),
        ({"reward.holdout_judge": True, "algorithm": "dpo", "reward.kind": "gold"}, ["sft", "dpo"]),
        ({"algorithm": "dpo"}, ["sft", "dpo"]),  # it needs no reward model
        ({"algorithm": "dpo", "reward": "gold"}, ["sft", "dpo"]),
        ({"reward": "gold", "algorithm": "policy_gradient", "sft.steps": 0}, ["policy_gradient"]),
    ],
)
def test_the_stages_of_a_run(changes, names):
    config = configs.parse(tree(**WORLD | changes))
    configs.check(config)
    assert configs.stages(config) == names
    assert [configs.section(config, name) for name in names] == [name.replace("judge", "reward") for name in names]


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, ["pretrain", "sft", "rl"]),
        ({"reward": configs.Reward()}, ["pretrain", "sft", "reward", "rl"]),
        ({"pretrain": configs.Supervised(steps=0), "algorithm": "ppo"}, ["sft", "rl"]),
    ],
)
def test_the_stages_of_a_writer(sections, names):
    config = configs.write(**sections)
    configs.check(config)
    assert configs.parse(configs.tree(config)) == config
    assert configs.stages(config) == names
    assert configs.section(config, "rl") == config.algorithm


def test_a_reward_is_a_name_or_a_section():
    named = tree(reward="sentiment")
    assert configs.parse(named).reward == configs.Reward(kind="sentiment")
    assert not configs.parse(named).learned and configs.parse(tree()).learned
    assert error(configs.parse, tree(reward=3)) == "reward: expected a section of fields, got 3"


def test_data_have_the_fields_of_their_task():
    whole = tree(task="write")
    assert error(configs.parse, whole).startswith("data.")
    whole["data"] = configs.tree(corpus.Config())
    assert configs.parse(whole).data == corpus.Config()
    assert error(configs.parse, tree(data=whole["data"])).startswith("data.")


@pytest.mark.parametrize("name", ["sft", "reward", "pretrain"])
def test_a_stage_may_be_from_elsewhere(name):
    config = configs.parse(tree(**{f"{name}.from": "runs/a"}))
    assert getattr(config, name).from_ == "runs/a"
    assert configs.tree(config)[name]["from"] == "runs/a"
    assert f"{name}.from_: no such field" in error(configs.parse, tree(**{f"{name}.from_": "runs/a"}))


KNOWN = "learned, sentiment, rouge, exact, partial or path/to/file.py:function"
GOLD = f"{KNOWN} where no row has a record (data.source), got 'gold'"


def test_what_an_algorithm_or_a_reward_needs(tmp_path):
    zero = error(check, **{"reward": "sentiment", "ppo.value_init": "reward"})
    assert zero == (
        "ppo.value_init: expected zero or auto where reward is sentiment, as there is no reward model, got 'reward'"
    )
    check(**{"reward": "sentiment", "ppo.value_init": "reward", "algorithm": "policy_gradient"})
    for change in {"reward": "sentiment", "ppo.value_init": "zero"}, {"reward": "gold"}, {"reward": "sentiment"}:
        check(**change)
    assert error(check, **{"reward": "gold", "data.source": "hub"}) == f"reward.kind: expected {GOLD}"
    gold = configs.write(reward=configs.Reward(kind="gold"))
    assert error(configs.check, gold) == f"reward.kind: expected {GOLD}"
    for kind in "gould", "no/such/file.py:f", "file.py":
        assert error(check, reward=kind).startswith("reward: ")
    (tmp_path / "own.py").write_text("x = 3\n")
    assert "expected a function 'x', found none" in error(check, reward=f"{tmp_path}/own.py:x")


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("model", {"context": 31}, "model.context: expected at least data.length = 32, got 31"),
        ("policy_gradient", {"lanes": 16}, "policy_gradient.lanes: expected 0 ("),
        ("policy_gradient", {"widths": 2}, "policy_gradient.widths: expected 1 ("),
    ],
)
def test_a_writer_starts_from_nothing(section, fields, message):
    config = configs.write()
    changed = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    assert error(configs.check, changed).startswith(message)


# configs/ppo_summarize.py


@pytest.fixture(scope="module")
def get_config():
    return runpy.run_path(str(ROOT / "configs" / "ppo_summarize.py"))["get_config"]


ARGUMENTS = ("tiny", "files", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-2019", "pythia-160m")
ARGUMENTS += ("smollm2", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b")


@pytest.mark.parametrize("arg", ARGUMENTS)
def test_every_argument_gives_a_whole_config_that_needs_no_file(arg, get_config):
    configs.check(configs.parse(get_config(arg).to_dict()))


def test_the_default_is_the_embedded_task_and_needs_no_file(get_config):
    config = configs.parse(get_config().to_dict())
    assert config == configs.parse(get_config("tiny").to_dict())
    assert config.data.source == "world" and config.text.kind != "gpt2" and not config.model.init


def test_an_unknown_argument_is_one_line(get_config):
    assert error(get_config, "tinny") == f"--config=...:tinny: expected {', '.join(ARGUMENTS)}"


# Number by number: arXiv 2403.17031 on TL;DR, and what arXiv 1909.08593 has otherwise.
PUBLISHED = {
    **{f"{stage}.lr": 3e-6 for stage in ("sft", "reward", "ppo")},
    **{f"{stage}.adam_eps": 1e-5 for stage in ("sft", "reward", "ppo")},
    **{f"{stage}.warmup": 0 for stage in ("sft", "reward", "ppo")},
    **{f"{stage}.end_lr": 0 for stage in ("sft", "reward", "ppo")},
    **{f"{stage}.max_grad_norm": 0 for stage in ("sft", "reward", "ppo")},
    "model.dropout": 0,
    "model.dtype": "float32",
    "data.prompt_length": 512,
    "sft.steps": 911,  # 116,722 examples / 128
    "sft.batch": 128,
    "sft.schedule": "cosine",
    "sft.loss_on": "all",
    "reward.steps": 1_450,  # 92,800 pairs / 64
    "reward.batch": 64,
    "reward.schedule": "cosine",
    "reward.normalize_before": False,
    "ppo.steps": 1_953,  # 1,000,000 episodes / 512
    "ppo.batch": 512,
    "ppo.schedule": "linear",
    "ppo.epochs": 4,
    "ppo.minibatches": 1,
    "ppo.temperature": 0.7,
    "ppo.kl_coef": 0.05,
    "ppo.kl_target": 0,
    "ppo.gamma": 1,
    "ppo.lam": 0.95,
    "ppo.clip": 0.2,
    "ppo.value_clip": 0.2,
    "ppo.value_coef": 0.1,
    "ppo.value_init": "reward",
    "ppo.missing_eos": "replace",
    "ppo.missing_eos_penalty": 1,  # the score becomes -1
    "ppo.whiten_rewards": False,
    "ppo.whiten_advantages": True,
    "ppo.trace_epochs": True,
    "evaluation.temperature": 0.01,
}
GPT2 = {"data.response_length": 48, "data.pair_length": 153, "model.layers": 12, "model.heads": 12, "model.width": 768}
GPT2 |= {"model.context": 1024, "model.init": "openai-community/gpt2", "text.path": "openai-community/gpt2"}
MEDIUM = {"model.layers": 24, "model.heads": 16, "model.width": 1024, "model.init": "openai-community/gpt2-medium"}
PYTHIA = {
    "data.response_length": 53,
    "data.pair_length": 169,
    "model.layers": 12,
    "model.heads": 12,
    "model.width": 768,
}
PYTHIA |= {"model.vocab_size": 50_304, "model.rotary_share": 0.25, "model.tied": False}
PYTHIA |= {"model.init": "EleutherAI/pythia-160m", "text.path": "EleutherAI/pythia-160m"}
FIRST = {"ppo.kl_coef": 0.15, "ppo.kl_target": 6, "ppo.kl_horizon": 10_000, "ppo.value_init": "zero"}
FIRST |= {"ppo.whiten_rewards": True, "reward.normalize_before": True}
RECIPES = {
    "gpt2": PUBLISHED | GPT2,
    "gpt2-medium": PUBLISHED | GPT2 | MEDIUM | {"text.path": "openai-community/gpt2-medium"},
    "gpt2-2019": PUBLISHED | GPT2 | FIRST,
    "pythia-160m": PUBLISHED | PYTHIA,
}


@pytest.mark.parametrize("arg", RECIPES)
def test_the_published_recipes(arg, get_config):
    config = configs.parse(get_config(arg).to_dict())
    fields = RECIPES[arg]
    assert {field: functools.reduce(getattr, field.split("."), config) for field in fields} == fields


def test_a_run_of_before_a_field_existed_has_its_default(tmp_path):
    """A field and a whole section; what every run has had is never made up."""
    older = tree(**{"evaluation.prompts": 7})
    del older["evaluation"]["draws"], older["lora"], older["text"]["eos"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    config = configs.read(tmp_path)
    assert config == configs.parse(tree(**{"evaluation.prompts": 7}))
    for name in "model", "data", "task":
        (tmp_path / "config.json").write_text(json.dumps({key: older[key] for key in older.keys() - {name}}))
        assert "missing, expected" in error(configs.read, tmp_path)
