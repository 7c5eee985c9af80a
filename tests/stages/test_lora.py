"""A run whose stages train adapters of one pretrained base: what it saves, resumes and exports."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import checkpoint
from rlhf_jax import config as configs
from rlhf_jax.algorithms import ppo
from rlhf_jax.commands import export
from rlhf_jax.config import Reward, Supervised
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder, families, hf, hf_config, lora
from rlhf_jax.models.families.llama import LLAMA
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.training import loop
from tests.support import StopsAt, branch, changed, error, last, stages

MODEL = decoder.Config(layers=1, heads=2, kv_heads=1, head_size=8, width=16, feed_forward_size=24, **LLAMA)
MODEL = dataclasses.replace(MODEL, context=96, init_std=0.2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The smallest run on a Llama of one layer, whose weights are in a folder of transformers."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"world_sft": 96, "world_preferences": 64, "world_prompts": 48, "world_held_out": 40}
    often = {"steps": 2, "batch": 4, "eval_every": 0, "save_every": 1}
    config = configs.Config(
        text=configs.Text(kind="bpe", vocab_size=600),
        data=sources.Config(**sizes, cache=str(tmp_path_factory.mktemp("world")), prompt_length=72, response_length=20),
        model=dataclasses.replace(MODEL, init=str(folder / "model")),
        lora=lora.Config(rank=2),
        sft=Supervised(**often, lr=1e-2),
        reward=Reward(**often, lr=1e-2),
        ppo=ppo.Config(**often, lr=1e-2, epochs=2),
        evaluation=configs.Evaluation(prompts=4, batch=4, samples=1),
    )
    tokenizer = stages(changed(config, lora={"rank": 0}, model={"init": ""}), folder / "run").setup.tokenizer
    sized = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    params = jax.jit(LanguageModel(sized).init)(jax.random.key(5))
    hf.save(folder / "model", params, sized, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    steps = stages(config, tmp_path_factory.mktemp("whole"))
    steps.all()
    return steps


def names(tree):
    return {"/".join(map(str, path)) for path in _paths(tree)}


def _paths(tree, before=()):
    for name, value in tree.items():
        yield from _paths(value, (*before, name)) if isinstance(value, dict) else [(*before, name)]


def test_checkpoints_hold_adapters_and_no_base(whole):
    """Policy, reward and value are adapters, and a head; the optimizer's moments are theirs."""
    adapters = {f"h_0/{part}/{leaf}" for part in ("attn/qkv", "attn/out", "mlp/fc", "mlp/proj") for leaf in "ab"}
    head = {"head/kernel", "head/bias"}
    state = last(whole, "ppo")
    assert names(state["policy"]) == adapters
    assert names(state["value"]) == head | {f"trunk/{name}" for name in adapters}
    for name in "sft", "reward":
        field = "policy" if name == "sft" else "reward"
        assert names(checkpoint.load(whole.workdir / name)[field]) == (
            adapters if name == "sft" else head | {f"trunk/{each}" for each in adapters}
        )
    trained = checkpoint.load(whole.workdir / "sft")["policy"]["h_0"]["attn"]["qkv"]["b"]
    assert np.abs(trained).max() > 0 and np.abs(state["policy"]["h_0"]["attn"]["qkv"]["b"] - trained).max() > 0


def test_the_reference_is_the_policy_before_and_stays(whole):
    """invariants 5 and 14: the first KL is 0; the reference is other adapters on the same base."""
    state = whole.make("ppo").state
    reference = checkpoint.load(whole.workdir / "sft")["policy"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.reference), reference)
    base = whole._base.stored
    jax.tree.map(np.testing.assert_array_equal, base, hf.load(whole.config.model.init, whole.setup.apply.policy.config))


def test_a_killed_run_resumes_bit_for_bit(whole, config, tmp_path):
    branch(whole, tmp_path, "sft", "reward")
    with pytest.raises(loop.Stopped):
        stages(config, tmp_path, StopsAt("ppo", 1)).one("ppo")
    again = stages(config, tmp_path)
    again.one("ppo")
    jax.tree.map(np.testing.assert_array_equal, last(again, "ppo"), last(whole, "ppo"))


@pytest.mark.parametrize(("stage", "field"), [("ppo", "policy"), ("reward", "reward")])
def test_an_export_is_merged(stage, field, whole, tmp_path):
    export.export(whole.workdir.path, tmp_path / "out", stage)
    adapters = checkpoint.load(whole.workdir / stage)[field]
    model = hf_config.read(tmp_path / "out")
    assert families.of(model).TYPE == "llama"
    merged = lora.merge(hf.load(whole.config.model.init, model), adapters.get("trunk", adapters), whole.config.lora)
    arrays = hf.read(tmp_path / "out")
    for name in "q_proj", "o_proj":
        path = ("h_0", "attn", "qkv" if name == "q_proj" else "out", "kernel")
        expected = merged[path[0]][path[1]][path[2]][path[3]][:, :16].T
        np.testing.assert_array_equal(arrays[f"model.layers.0.self_attn.{name}.weight"], expected)


def test_adapters_are_exported_for_peft(whole, tmp_path):
    export.export(whole.workdir.path, tmp_path / "out", adapter=True)
    record = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (record["r"], record["base_model_name_or_path"]) == (2, whole.config.model.init)
    arrays = hf.read(tmp_path / "out" / "adapter_model.safetensors")
    assert len(arrays) == 2 * len(("q", "k", "v", "o", "gate", "up", "down"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    message = error(export.export, whole.workdir.path, tmp_path / "other", "reward", adapter=True)
    assert message.startswith("adapter: expected a stage with a policy, got reward")


def test_the_adapters_of_another_base_are_refused(whole, config, tmp_path):
    """Where the file of the base has changed, in Python, by an export, and by a run that continues."""
    path = Path(config.model.init, "model.safetensors")
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-4] + b"\0\0\0\0")
        for use in (
            lambda: rlhf_jax.load(whole.workdir.path),
            lambda: export.export(whole.workdir.path, tmp_path / "out"),
        ):
            assert error(use).startswith(f"model.init: {config.model.init}: expected the base that the adapters in ")
        assert "was made with other contents of model.init" in error(stages, config, whole.workdir.path)
    finally:
        path.write_bytes(before)


def test_loaded_it_writes_what_the_run_does(whole):
    assert len(rlhf_jax.load(whole.workdir.path).generate(["a"], max_tokens=3)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 17}}, "lora.rank: expected at most model.width = 16, got 17"),
        ({"model": {"init": ""}}, "lora.rank: expected 0 where model.init is empty, as adapters stand on a pretrained"),
        ({"lora": {"products": "q_proj"}}, "lora.products: expected some of qkv,out,fc,proj, each once, got 'q_proj'"),
        ({"lora": {"products": "qkv,qkv"}}, "lora.products: expected some of qkv,out,fc,proj, each once"),
        ({"model": {"context": 91}}, "model.context: expected at least data.prompt_length + data.response_length"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, config):
    with pytest.raises(InputError) as caught:
        configs.check(changed(config, **changes))
    assert str(caught.value).startswith(message)
