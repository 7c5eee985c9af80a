"""From a config to its values: workdirs that are refused, the tokenizer, the model. Nothing is trained."""

import dataclasses
import json
from pathlib import Path

import httpx2
import jax
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax import out_of_memory, pipeline
from rlhf_jax.data import batches, sources
from rlhf_jax.errors import OutOfMemory
from rlhf_jax.models import hf
from rlhf_jax.models.families import neox
from rlhf_jax.text import bpe
from rlhf_jax.text import hf as text_hf
from tests.support import changed, error, on_disk, opened, smallest, stages, write_rows

PARITY = Path(__file__).parent / "models" / "gpt2_parity" / "model.safetensors"


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    return smallest(tmp_path_factory.mktemp("world"))


# Lines for a person


def test_the_first_lines_say_where_on_what_and_of_what_size(config, tmp_path):
    steps = stages(config, tmp_path)
    for name in ["sft"], ["reward", "ppo"]:
        steps._begin(name)  # once
    tokens = steps.setup.tokenizer.vocab_size
    block = 16 * 42 + 42 + 14 * 16 + 16 + 2 * 16 * 64 + 64 + 16 + 2 * 32  # qkv, out, feed-forward, two norms
    size = tokens * 16 + 380 * 16 + block + 32
    assert steps.reporter.notes == [
        f"workdir {tmp_path}; to train: sft",
        f"{jax.device_count()} x cpu; a policy of {size:,} parameters, 1 layers of 16; {tokens} tokens",
    ]


def test_a_run_with_nothing_to_do_says_so(config, tmp_path):
    """And makes no tokenizer for that."""
    steps = stages(config, tmp_path)
    steps._begin([])
    assert steps.reporter.notes == [f"workdir {tmp_path}; to train: nothing"] and "setup" not in vars(steps)


def test_the_last_lines_say_where_the_results_are_and_what_comes_next(tmp_path):
    (tmp_path / "sft" / "plots").mkdir(parents=True)
    for name in "sft/plots/sft.png", "sft/summary.json", "summary.json", "samples.jsonl":
        (tmp_path / name).touch()
    results, see, then = pipeline._results(tmp_path, "")
    assert results == f"results in {tmp_path}: summary.json, samples.jsonl, sft/plots/"
    assert see == f"next: python experiments/serve.py --workdir={tmp_path}"
    assert then.strip() == f"python experiments/export_hf.py --workdir={tmp_path} --out=exported"
    results, _, then = pipeline._results(tmp_path, "sft")
    assert results == f"results in {tmp_path}/sft: summary.json, plots/"
    assert then.strip() == f"python experiments/export_hf.py --workdir={tmp_path} --stage=sft --out=exported"


@pytest.mark.parametrize(
    ("raised", "requested"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes."), "3.00 GiB requested"),
        (RuntimeError("RESOURCE_EXHAUSTED: failed to allocate 12.5GiB on the device"), "12.5 GiB requested"),
        (MemoryError("Unable to allocate 2.00 TiB for an array"), "2.00 TiB requested"),
        (MemoryError(), ""),
    ],
)
def test_out_of_memory_names_the_fields_that_need_less(raised, requested, config, monkeypatch):
    monkeypatch.setattr(out_of_memory.resource, "getrlimit", lambda _: (2**32, 2**32))
    wide = changed(config, model={"dtype": "bfloat16"}, ppo={"batch": 8})
    with pytest.raises(OutOfMemory) as caught, out_of_memory.named(wide, "ppo"):
        raise raised
    assert str(caught.value) == (
        f"ppo: out of memory: {requested or 'more requested'}; cpu has 4.00 GiB; less is needed with "
        "--config.ppo.microbatches (more than 1), --config.ppo.batch (less than 8), --config.ppo.lanes (less than 8), "
        "--config.model.remat (true), --config.evaluation.batch (less than 64)"
    )
    monkeypatch.setattr(out_of_memory.jax, "local_device_count", lambda: 8)
    divided = pytest.raises(OutOfMemory, match=r"--config.mesh.fsdp \(more than 1, at most 8\)")
    with divided, out_of_memory.named(wide, "ppo"):
        raise raised
    with pytest.raises(ZeroDivisionError), out_of_memory.named(config, "ppo"):
        raise ZeroDivisionError


def test_a_file_that_is_not_read_is_refused_in_python_too(config, tmp_path):
    message = error(pipeline.run, changed(config, data={"sft": __file__}), tmp_path / "run")
    assert message.startswith(f"data.sft: {__file__!r} has no effect, as source is world")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("doctor", ["warn", "stop", "off"])
def test_a_stage_that_fails_the_checks_ends_the_run_where_that_is_wanted(doctor, config, tmp_path, finished):
    """Before the next stage begins; the checks of a finished stage cost two files."""
    steps = stages(changed(config, doctor=doctor), tmp_path)
    finished(opened(steps, "sft").parent, "sft", policy={})
    (tmp_path / "sft" / "summary.json").write_text('{"sft/eos_rate": 0.1}')
    (tmp_path / "sft" / "metrics.jsonl").write_text("")
    if doctor != "stop":
        return steps._stop_before("reward")
    steps._stop_before("sft")
    assert error(steps._stop_before, "reward") == (
        "doctor  FAIL  sft  eos_rate: 0.1 (healthy: 0.9 or more); do the labels end, and do they fit in "
        "data.response_length? More steps teach EOS; --config.doctor=warn goes on to reward"
    )


# The workdir


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model": {"width": 24}}, "model.width = 16, not 24"),
        ({"text": {"kind": "bpe"}}, "text.kind = 'char', not 'bpe'"),
        ({"data": {"held_out": 0.2}}, "data.held_out = 0.1, not 0.2"),
        ({"sft": {"lr": 0.5}}, "sft.lr = 3e-06, not 0.5"),
        ({"seed": 2}, "seed = 1, not 2"),
        ({"evaluation": {"prompts": 4}}, "evaluation.prompts = 512, not 4"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype = 'float32', not 'bfloat16'"),
    ],
)
def test_a_workdir_of_another_config_is_refused_and_left_alone(changes, difference, config, tmp_path):
    folder = opened(stages(config, tmp_path), "sft")
    before = on_disk(tmp_path)
    message = error(stages, changed(config, **changes), tmp_path)
    assert message == f"workdir: {folder}/config.json was made with {difference}; choose another --workdir"
    assert on_disk(tmp_path) == before


NEUTRAL = {
    "model": {"remat": True},
    "sft": {"microbatches": 2, "save_every": 3, "eval_every": 7},
    "reward": {"microbatches": 4},
    "ppo": {"lanes": 8, "widths": 2, "microbatches": 8, "trace_epochs": True, "save_every": 1},
    "evaluation": {"batch": 3, "samples": 0},
    "data": {"cache": "elsewhere"},
    "keep": {"last": 5, "best": 3},
    "trace": {"every": 3},
}


@pytest.mark.parametrize("section", NEUTRAL)
def test_what_changes_no_number_never_refuses_a_workdir(section, config, tmp_path):
    steps = stages(config, tmp_path)
    for name in steps.names:
        opened(steps, name)
    for field, value in NEUTRAL[section].items():
        assert getattr(getattr(config, section), field) != value
        if field == "eval_every":  # of the stage itself; it may change until a later stage has begun
            continue
        assert stages(changed(config, **{section: {field: value}}), tmp_path).names == steps.names, field
    together = NEUTRAL | {"sft": {name: value for name, value in NEUTRAL["sft"].items() if name != "eval_every"}}
    assert stages(changed(config, **together, log=""), tmp_path).names == steps.names


def test_with_dropout_each_microbatch_has_its_own_noise(config, tmp_path):
    noisy = changed(config, model={"dropout": 0.1})
    opened(stages(noisy, tmp_path), "sft")
    stages(changed(noisy, reward={"microbatches": 2}), tmp_path)
    message = error(stages, changed(noisy, sft={"microbatches": 2}), tmp_path)
    assert "was made with sft.microbatches = 1, not 2;" in message


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_steps_of_a_schedule_that_falls_are_refused(schedule, config, tmp_path):
    """The learning rate would jump back up."""
    falling = changed(config, sft={"schedule": schedule, "steps": 6})
    folder = opened(stages(falling, tmp_path), "sft")
    for steps in 5, 7:
        assert error(stages, changed(falling, sft={"steps": steps}), tmp_path) == (
            f"sft.steps: {folder}/config.json was made with 6 steps of a {schedule} schedule, and with {steps} the "
            "learning rate would jump; expected 6, or another --workdir"
        )
    constant = changed(config, sft={"schedule": "constant", "steps": 6})
    opened(stages(constant, tmp_path / "constant"), "sft")
    stages(changed(constant, sft={"steps": 7}), tmp_path / "constant")


def test_a_stage_depends_on_what_comes_before_it_and_not_on_what_comes_after(config, tmp_path):
    opened(stages(config, tmp_path), "sft")
    other = changed(config, reward={"lr": 3.0}, ppo={"lr": 3.0})
    opened(stages(other, tmp_path), "reward")
    assert "/reward/config.json was made with reward.lr = 3.0, not" in error(stages, config, tmp_path)
    opened(stages(changed(other, ppo={"lr": 4.0}), tmp_path), "ppo")
    assert "/ppo/config.json was made with ppo.lr = 4.0, not 3.0;" in error(stages, other, tmp_path)
    longer = changed(other, ppo={"lr": 4.0}, reward={"steps": 3})
    assert "/reward/config.json was made with 1450 steps" in error(stages, longer, tmp_path)
    (tmp_path / "reward" / "config.json").unlink()
    assert "/ppo/config.json was made with reward.steps = 1450, not 3;" in error(stages, longer, tmp_path)


def test_algorithms_stand_side_by_side_in_one_workdir(config, tmp_path):
    """A section that the run does not read may change."""
    opened(stages(config, tmp_path), "ppo")
    other = changed(config, algorithm="policy_gradient", ppo={"lr": 3.0})
    opened(stages(other, tmp_path), "policy_gradient")
    stages(changed(config, policy_gradient={"lr": 3.0}), tmp_path)
    assert "ppo.lr = 3e-06, not 3.0" in error(stages, changed(config, ppo={"lr": 3.0}), tmp_path)


def test_the_same_config_may_go_on(config, tmp_path):
    before = on_disk(opened(stages(config, tmp_path), "sft"))
    assert on_disk(opened(stages(config, tmp_path), "sft")) == before


def test_an_impossible_config_is_refused_before_anything_is_written(config, tmp_path):
    message = error(pipeline.run, changed(config, ppo={"top_k": 5}), tmp_path / "run")
    assert message.startswith("ppo.top_k: ")
    assert not (tmp_path / "run").exists()


def test_a_stage_that_the_config_does_not_have(config, tmp_path):
    message = error(pipeline.run, changed(config, reward={"kind": "gold"}), tmp_path / "run", only="reward")
    assert message == "reward: not a stage of this config, which has sft, ppo"


@pytest.mark.parametrize("make", [lambda steps: opened(steps, "sft"), lambda steps: steps.setup], ids=["open", "text"])
def test_a_workdir_that_cannot_be_written_is_named(make, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = error(make, stages(config, tmp_path / "file" / "run"))
    assert message.startswith(f"workdir: cannot write {tmp_path}/file/run") and "Not a directory" in message
    assert on_disk(tmp_path) == {tmp_path / "file": b"in the way"}


def test_config_json_is_the_whole_config_and_what_the_stage_depends_on(config, tmp_path):
    folder = opened(stages(config, tmp_path), "reward")
    assert configs.parse(json.loads((tmp_path / "config.json").read_text())) == config
    part = json.loads((folder / "config.json").read_text())
    assert part["reward"]["steps"] == config.reward.steps and "ppo" not in part


def test_what_an_unfinished_stage_would_give_is_not_there(config, tmp_path):
    steps = stages(config, tmp_path)
    opened(steps, "sft")
    assert not steps.finished("sft")
    assert error(steps.parameters, "sft", "policy", {}) == (
        f"workdir: expected a finished sft stage in {tmp_path}/sft; run it first"
    )


@pytest.mark.parametrize("content", ["", '{"sft": ', "[1]", "3"])
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_record_of_a_stage_is_named_with_its_remedy(name, content, config, tmp_path):
    steps = stages(config, tmp_path)
    path = opened(steps, "sft") / name
    path.write_text(content)
    message = error(lambda: stages(config, tmp_path).all())
    assert message.startswith(f"workdir: {path}: expected ")
    assert "; remove " in message and not (tmp_path / "text").exists()


def test_a_stage_without_its_config_is_not_taken(config, tmp_path):
    """Nothing says what it was made with."""
    steps = stages(config, tmp_path)
    folder = opened(steps, "sft")
    (folder / "config.json").unlink()
    stages(config, tmp_path)  # a folder that is empty is fine
    (folder / "checkpoints").mkdir()
    message = error(stages, config, tmp_path)
    assert message.startswith(f"workdir: {folder}: ") and f"remove {folder}" in message


# What a run reads and does not own


@pytest.fixture
def outside(config, tmp_path):
    """{field: file}, and a run of them: data, tokenizer, weights, and the code of a reward."""
    tokenizer = bpe.train(["one two", "one two"], 300)
    (tmp_path / "text").mkdir()
    for name, file in text_hf.to_hf(tokenizer).items():
        (tmp_path / "text" / name).write_text(json.dumps(file))
    rows = [{"prompt": f"one {i}", "label": "two"} for i in range(10)]
    (tmp_path / "model").mkdir()
    for path in PARITY.parent.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine.py").write_text("def mine(texts):\n    return [len(text) for text in texts]\n")
    files = {
        "data.sft": write_rows(tmp_path / "sft.jsonl", rows),
        "data.prompts": write_rows(tmp_path / "prompts.jsonl", rows),
        "text.path": str(tmp_path / "text"),
        "model.init": str(tmp_path / "model"),
        "reward": f"{tmp_path}/mine.py:mine",
    }
    data = {"source": "files", "sft": files["data.sft"], "prompts": files["data.prompts"], "held_out": 0.3}
    run = changed(
        config,
        text={"kind": "gpt2", "path": files["text.path"]},
        data=data,
        model={"init": files["model.init"]},
        reward={"kind": files["reward"]},
    )
    return files, run


@pytest.mark.parametrize("field", ["data.sft", "data.prompts", "text.path", "model.init", "reward"])
def test_a_file_that_changed_is_an_error_that_names_it_and_both_hashes(field, outside, tmp_path):
    files, config = outside
    steps = stages(config, tmp_path / "run")
    folder, place = opened(steps, "ppo"), files[field]
    was = steps.depends("ppo")["sha256"][f"{field} = {place}"]
    stages(config, tmp_path / "run")
    names = {"text.path": "tokenizer.json", "model.init": "model.safetensors"}
    path = Path(place.split(":")[0]) / names[field] if field in names else Path(place.split(":")[0])
    path.write_bytes(path.read_bytes() + b"\n")
    now = stages(config, tmp_path / "other").depends("ppo")["sha256"][f"{field} = {place}"]
    assert error(stages, config, tmp_path / "run") == (
        f"workdir: {folder}/config.json was made with other contents of {field} = {place} "
        f"(sha256 {was[:12]}..., now {now[:12]}...); restore them, or choose another --workdir"
    )
    assert was != now


def test_the_code_of_a_reward_concerns_the_last_stage_alone(outside, tmp_path):
    """Fine-tuning is judged by nothing of it."""
    _, config = outside
    opened(stages(config, tmp_path / "run"), "sft")
    (tmp_path / "mine.py").write_text("def mine(texts):\n    return [0.0] * len(texts)\n")
    stages(config, tmp_path / "run")


def test_pairs_concern_no_stage_before_the_reward_model(config, tmp_path):
    """Other pairs train another reward model; fine-tuning is the same, also where its record still has the pairs."""
    opened(stages(config, tmp_path / "run"), "sft")
    opened(stages(config, tmp_path / "judged"), "reward")
    other = changed(config, data={"world_labels": "longer", "pair_length": 9})
    stages(other, tmp_path / "run")
    assert "data.pair_length = 0, not 9" in error(stages, other, tmp_path / "judged")
    path = tmp_path / "run" / "sft" / "config.json"
    record = json.loads(path.read_text())
    record["data"] |= {"preferences": "old.jsonl", "world_labels": "gold"}
    record["sha256"] = {"data.preferences = old.jsonl": "1" * 64}
    path.write_text(json.dumps(record))
    stages(other, tmp_path / "run")
    record["sha256"] = {"data.sft = old.jsonl": "1" * 64}
    path.write_text(json.dumps(record))
    assert "data.sft" in error(stages, other, tmp_path / "run")


# The tokenizer


def test_the_tokenizer_is_made_once_and_kept(config, tmp_path, monkeypatch):
    steps = stages(config, tmp_path)
    tokenizer = steps.setup.tokenizer
    opened(steps, "sft")
    assert tokenizer.encode("TL;DR:") == [tokenizer.characters.index(character) for character in "TL;DR:"]
    monkeypatch.delattr(sources, "load")  # it is not made again
    assert stages(config, tmp_path).setup.tokenizer == tokenizer


def test_a_tokenizer_of_another_config_is_not_taken(config, tmp_path):
    """A run that ended before its first stage began, at a bad row, has left its tokenizer and nothing else."""
    assert stages(config, tmp_path).setup.tokenizer
    steps = stages(changed(config, text={"kind": "bpe", "vocab_size": 300}), tmp_path)
    assert steps.setup.tokenizer.vocab_size == 300


@pytest.mark.parametrize("begun", [False, True])
def test_a_tokenizer_of_another_run_is_made_again_or_refused(begun, config, tmp_path):
    """Of as many ids: its texts would only look wrong."""
    words = changed(config, text={"kind": "bpe", "vocab_size": 300})
    other = stages(changed(words, seed=2, data={"world_seed": 5}), tmp_path / "other").setup.tokenizer
    steps = stages(words, tmp_path / "run")
    own = steps.setup.tokenizer
    assert other != own and other.vocab_size == own.vocab_size
    if begun:
        opened(steps, "sft")
    for path in (tmp_path / "other" / "text").iterdir():
        (tmp_path / "run" / "text" / path.name).write_bytes(path.read_bytes())
    if begun:
        message = error(lambda: stages(words, tmp_path / "run").setup)
        assert message.startswith(f"workdir: {tmp_path}/run/text: the tokenizer of sft is missing or different")
    else:
        assert stages(words, tmp_path / "run").setup.tokenizer == own


def test_a_tokenizer_that_is_not_the_one_that_was_saved_is_refused(config, tmp_path):
    """The file alone, beside our own record of what it was made of."""
    words = changed(config, text={"kind": "bpe", "vocab_size": 300})
    assert stages(changed(words, data={"world_seed": 5}), tmp_path / "other").setup.tokenizer
    assert stages(words, tmp_path / "run").setup.tokenizer
    for path in (tmp_path / "other" / "text").iterdir():
        if path.name != "made_of.json":
            (tmp_path / "run" / "text" / path.name).write_bytes(path.read_bytes())
    message = error(lambda: stages(words, tmp_path / "run").setup)
    assert message == (f"workdir: {tmp_path}/run/text: not the tokenizer that was saved there; remove the folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
@pytest.mark.parametrize("name", ["made_of.json", "tokenizer.json"])
def test_a_damaged_tokenizer_or_its_record_is_made_again(name, content, config, tmp_path):
    """A stage was trained with it: the other of the two files says whether it is the same."""
    steps = stages(config, tmp_path)
    tokenizer = steps.setup.tokenizer
    opened(steps, "sft")
    before = on_disk(tmp_path)
    path = tmp_path / "text" / name
    path.unlink() if content is None else path.write_text(content)
    assert stages(config, tmp_path).setup.tokenizer == tokenizer
    assert on_disk(tmp_path) == before
    for path in (tmp_path / "text").iterdir():
        path.write_text("")
    message = error(lambda: stages(config, tmp_path).setup)
    assert message == f"workdir: {tmp_path}/text: the tokenizer of sft is missing or different"


def test_gpt2_needs_its_files(config, tmp_path):
    steps = stages(changed(config, text={"kind": "gpt2"}), tmp_path)
    assert error(lambda: steps.setup) == "text.path: expected a folder or a name on the hub, as gpt2, got none"


def test_gpt2_can_come_from_the_hub(config, tmp_path, hub_server):
    config = changed(config, text={"kind": "gpt2", "path": "who/what"})
    message = error(lambda: stages(config, tmp_path / "nothing").setup)
    assert message.startswith("text.path: who/what: no such file or folder, and no such model on the hub")
    tokenizer = bpe.train(["one two", "one two"], 300)
    hub_server.add("who/what", {name: json.dumps(file) for name, file in text_hf.to_hf(tokenizer).items()})
    assert stages(config, tmp_path / "run").setup.tokenizer == tokenizer


def test_a_vocabulary_too_small_is_named_by_its_field(config, tmp_path):
    small = changed(config, text={"kind": "bpe", "vocab_size": 100})
    assert error(lambda: stages(small, tmp_path).setup).startswith("text.vocab_size: expected at least 258")


# The model


@pytest.mark.parametrize(("beyond", "fine"), [(-1, False), (0, True), (511, True), (512, False)])
def test_the_vocabulary_may_be_padded_a_little(beyond, fine, config, tmp_path):
    ids = stages(config, tmp_path).setup.tokenizer.vocab_size
    steps = stages(changed(config, model={"vocab_size": ids + beyond}), tmp_path)
    if fine:
        apply = steps.setup.apply
        assert apply.policy.config.vocab_size == apply.scalar.config.vocab_size == ids + beyond
    else:
        expected = f"model.vocab_size: expected 0 or, for this tokenizer, {ids} to {ids + 511}, got {ids + beyond}"
        assert error(lambda: steps.setup) == expected


def test_ids_that_the_tokenizer_does_not_have_have_no_probability(config, tmp_path):
    """Not even where the model would have them before all others: in the sampler and in the learner's log-probs."""
    ids = stages(config, tmp_path).setup.tokenizer.vocab_size
    setup = stages(changed(config, model={"vocab_size": ids + 9}), tmp_path).setup
    model = setup.apply.policy
    tokens_BT, real_BT = np.array([[3, 4, ids + 2, 5]]), np.ones((1, 4), bool)

    @jax.jit
    def read():
        params = model.init(jax.random.key(0))
        hidden = model.hidden(params, tokens_BT, real_BT)
        params["wte"]["embedding"] = params["wte"]["embedding"].at[ids:].set(100 * hidden[0, 1])
        hidden = model.hidden(params, tokens_BT, real_BT)
        return (
            hidden[0, 1] @ params["wte"]["embedding"].T,
            jax.nn.softmax(model.logits(params, hidden)[0, 1]),
            model.logprobs(params, tokens_BT, real_BT, 2),
            model.compare(params, hidden, params, hidden, tokens_BT),
        )

    raw_V, probability_V, logp_BR, compared = read()
    assert int(raw_V.argmax()) >= ids
    assert (probability_V[ids:] == 0).all() and probability_V.sum() == pytest.approx(1)
    assert np.exp(logp_BR[0, 0]) == 0 and np.isfinite(logp_BR).all() and np.exp(logp_BR[0, 1]) > 0
    assert all(np.isfinite(x).all() for x in compared)


def test_the_models_vocabulary_is_the_tokenizers(config, tmp_path):
    setup = stages(config, tmp_path).setup
    assert setup.apply.policy.config.vocab_size == setup.tokenizer.vocab_size


def pretrained(config, tmp_path, characters, **model):
    """A run from the 97-token checkpoint, with a tokenizer of `characters` letters and three ids more."""
    letters = "".join(chr(0x4E00 + i) for i in range(characters))
    rows = [{"prompt": f"{letters}{i}", "label": letters} for i in range(10)]
    data = {"source": "files", "sft": write_rows(tmp_path / "sft.jsonl", rows), "held_out": 0.3}
    data |= {"prompt_length": 16, "response_length": 16}
    sizes = {"layers": 2, "heads": 3, "head_size": 8, "width": 24, "context": 32, "init": str(PARITY)}
    return stages(changed(config, data=data, model=sizes | model), tmp_path / "run")


def test_pretrained_weights_with_ids_that_they_do_not_know(config, tmp_path):
    steps = pretrained(config, tmp_path, characters=90, vocab_size=128)
    policy, ids = steps.setup.apply.policy, steps.setup.tokenizer.vocab_size
    assert 97 < ids < 128
    params, arrays = steps._policy_init(), hf.read(PARITY)
    embedding_VD, known_VD = params["wte"]["embedding"], arrays["transformer.wte.weight"]
    assert embedding_VD.shape == (128, 24)
    np.testing.assert_array_equal(embedding_VD[:97], known_VD)
    np.testing.assert_allclose(embedding_VD[97:], np.tile(known_VD.mean(axis=0), (31, 1)), rtol=1e-6)
    np.testing.assert_array_equal(params["h_1"]["mlp"]["fc"]["kernel"], arrays["transformer.h.1.mlp.c_fc.weight"])
    logits_V = policy.logits(params, policy.hidden(params, np.arange(5)[None], np.ones((1, 5))))[0, -1]
    assert logits_V[97:].max() < logits_V[:97].max()  # ids that were never seen are not the most likely


WEIGHTS = {name: PARITY.with_name(name).read_bytes() for name in ("config.json", "model.safetensors")}


def test_pretrained_weights_can_come_from_the_hub(config, tmp_path, hub_server):
    """The revision that is named, and from then on without a look at the network."""
    commit = hub_server.add("who/what", WEIGHTS, revision="v1")
    hub_server.add("who/what", {"config.json": "{}", "model.safetensors": b""})
    expected = pretrained(config, tmp_path, characters=95)._policy_init()
    for revision in "v1", commit:
        steps = pretrained(config, tmp_path, characters=95, init=f"who/what@{revision}")
        jax.tree.map(np.testing.assert_array_equal, steps._policy_init(), expected)
    asked = len(hub_server.asked)
    steps = pretrained(config, tmp_path, characters=95, init="who/what@v1")
    assert steps._policy_init() and len(hub_server.asked) == asked


def test_weights_that_cannot_be_downloaded_are_refused_before_the_data_are_read(config, tmp_path, hub_server):
    """In one line: what to download and where to put it."""
    steps = pretrained(config, tmp_path, characters=95, init="who/what@v1")
    Path(steps.config.data.sft).unlink()
    hub_server.down = httpx2.ConnectError("no network")
    message = error(steps.all)
    assert message.startswith("model.init: who/what@v1: no such file or folder, not downloaded before, and the hub ")
    assert message.endswith(
        "download config.json and model.safetensors, or config.json and model.safetensors.index.json and "
        "model-*.safetensors of https://huggingface.co/who/what (v1) into a folder and give its path"
    )
    assert not (tmp_path / "run").exists()


def test_weights_that_are_a_pickle_are_not_taken(config, tmp_path, hub_server):
    hub_server.add("who/what", {"config.json": "{}", "pytorch_model.bin": b"never read"})
    message = error(pretrained(config, tmp_path, characters=95, init="who/what")._policy_init)
    assert message.startswith("model.init: who/what: expected config.json and model.safetensors, or ")
    assert message.endswith("on the hub, there is config.json, pytorch_model.bin")
    assert not [path for path in hub_server.asked if path.endswith(".bin")]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    message = error(pretrained(config, tmp_path, characters=95, init=str(tmp_path / "model"))._policy_init)
    assert "loading a pickle can run any code" in message


def test_pretrained_weights_of_gpt_neox(config, tmp_path):
    """From a folder. Both tables of a token id get the rows that the checkpoint lacks."""
    sizes = {"heads": 2, "head_size": 16, "width": 32, "init": str(PARITY.parents[1] / "neox_parity")}
    sizes |= neox.NEOX | {"context": 32}
    steps = pretrained(config, tmp_path, characters=90, **sizes)
    params = steps._policy_init()
    for name in "wte", "unembed":
        table_VD = params[name]["embedding"]
        assert table_VD.shape == (steps.setup.tokenizer.vocab_size, 32)
        np.testing.assert_allclose(
            table_VD[97:], np.tile(table_VD[:97].mean(axis=0), (len(table_VD) - 97, 1)), rtol=1e-6
        )


def test_pretrained_weights_of_other_sizes_are_refused(config, tmp_path):
    steps = pretrained(config, tmp_path, characters=90, heads=1, head_size=24)
    expected = f"{PARITY.with_name('config.json')}: expected model.heads = 3 (not 1), model.head_size = 8 (not 24)"
    assert error(steps._policy_init) == f"model.init: {expected}"


def test_pretrained_weights_of_a_larger_vocabulary_are_refused(config, tmp_path):
    steps = pretrained(config, tmp_path, characters=50)
    assert "97" in error(steps._policy_init)


def test_random_weights_are_of_the_seed(config, tmp_path):
    first, again, other = (
        stages(dataclasses.replace(config, seed=seed), tmp_path / name)._policy_init()
        for seed, name in [(1, "a"), (1, "b"), (2, "c")]
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["wte"]["embedding"] != other["wte"]["embedding"]).all()


# What is known before anything is trained


@pytest.mark.parametrize("copies", [1, 3])
def test_references_without_a_spread_are_refused_before_anything_is_trained(copies, config, tmp_path):
    """The reward model is normalized by them: one held-out row, or several equal ones, have no standard deviation."""
    rows = [{"prompt": f"one {i}", "label": "same", "chosen": "one", "rejected": "same"} for i in range(20)]
    train, held_out = batches.split(rows, 0.5, config.seed)
    path = write_rows(tmp_path / "rows.jsonl", [*train[:3], *copies * held_out[:1]])
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    data = {"source": "files", "sft": path, "preferences": pairs, "held_out": 0.5}
    one = {name: {"batch": 1} for name in ("sft", "reward", "ppo")}
    steps = stages(changed(config, data=data, **one), tmp_path / "run")
    assert error(steps.all) == (
        "data.sft: expected at least 2 different held-out rows, to normalize the reward model by; "
        f"got 1 in {copies} rows"
    )
    assert not (tmp_path / "run" / "sft").exists()
