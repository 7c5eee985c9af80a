import dataclasses
import json
from pathlib import Path

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import families, hf_config
from rlhf_jax.models.families import neox

HERE = Path(__file__).parent
GPT2 = families.preset("gpt2", vocab_size=50_257)
PYTHIA = families.preset("pythia-1b", vocab_size=50_304)
IDS = {"eos_id": 0, "pad_id": 1}

# As published: of GPT-2 and, with the names that transformers 4 used for rotary positions, of Pythia 1B.
GPT2_JSON = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "layer_norm_epsilon": 1e-5,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
PYTHIA_JSON = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 16,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
TYPES = "gpt2 or gpt_neox or llama or mistral or qwen2 or qwen3"
FULL_ROTARY = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}


def write(folder, record):
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def error(function, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_configs_are_the_presets(tmp_path):
    assert hf_config.read(write(tmp_path, GPT2_JSON)) == GPT2
    assert hf_config.read(write(tmp_path, PYTHIA_JSON)) == PYTHIA


def test_names_of_transformers_5(tmp_path):
    """One object for rotary positions; it takes precedence over the two fields."""
    config = hf_config.read(write(tmp_path, PYTHIA_JSON | {"rope_parameters": FULL_ROTARY}))
    assert config == dataclasses.replace(PYTHIA, rotary_share=1.0, rotary_base=500.0)


@pytest.mark.parametrize(
    "config",
    [
        GPT2,
        dataclasses.replace(GPT2, tied=False, exact_gelu=True, norm_eps=1e-6),
        PYTHIA,
        dataclasses.replace(PYTHIA, tied=True, exact_gelu=False, parallel_residual=False, rotary_base=50.0),
    ],
)
@pytest.mark.parametrize("record", [hf_config.language_model, hf_config.scalar_model])
def test_what_is_written_is_read(config, record, tmp_path):
    assert hf_config.read(write(tmp_path, record(config, **IDS))) == config


def test_tokens_and_the_single_score():
    record = hf_config.scalar_model(GPT2, eos_id=50_256, pad_id=7)
    assert (record["bos_token_id"], record["eos_token_id"], record["pad_token_id"]) == (50_256, 50_256, 7)
    assert record["architectures"] == ["GPT2ForSequenceClassification"] and len(record["id2label"]) == 1


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model_type": "bert"}, f'model_type: expected {TYPES}, got "bert"'),
        ({"model_type": None}, f"model_type: expected {TYPES}, got null"),
        (
            {"architectures": ["GPT2ForTokenClassification"]},
            'architectures: expected ["GPT2LMHeadModel"] or ["GPT2ForSequenceClassification"] or ["GPT2Model"], '
            'got ["GPT2ForTokenClassification"]',
        ),
        (
            {"activation_function": "relu"},
            'activation_function: expected gelu_new or gelu_pytorch_tanh or gelu, got "relu"',
        ),
        ({"scale_attn_weights": False}, "scale_attn_weights: expected true, got false"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected false, got true"),
        ({"add_cross_attention": True}, "add_cross_attention: expected false, got true"),
        ({"n_inner": 0}, "n_inner: expected a whole number above 0, got 0"),
        ({"n_head": 7}, "n_head: expected a divisor of n_embd, got 7"),
        ({"n_layer": 0}, "n_layer: expected a whole number above 0, got 0"),
        ({"n_positions": "1k"}, 'n_positions: expected a whole number above 0, got "1k"'),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: expected a number above 0, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
        ({"activation_function": []}, "activation_function: expected gelu_new or gelu_pytorch_tanh or gelu, got []"),
        ({"n_layer": 10**400}, f"n_layer: expected a whole number above 0, got 1{'0' * 76}..."),
        ({"layer_norm_epsilon": 10**400}, f"layer_norm_epsilon: expected a number above 0, got 1{'0' * 76}..."),
    ],
)
def test_what_we_compute_differently_is_refused(change, expected, tmp_path):
    assert error(hf_config.read, write(tmp_path, GPT2_JSON | change)) == f"{tmp_path / 'config.json'}: {expected}"


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"intermediate_size": "8k"}, 'intermediate_size: expected a whole number above 0, got "8k"'),
        ({"attention_bias": False}, "attention_bias: expected true, got false"),
        ({"hidden_act": "silu"}, 'hidden_act: expected gelu_new or gelu_pytorch_tanh or gelu, got "silu"'),
        ({"use_parallel_residual": None}, "use_parallel_residual: expected true or false, got null"),
        ({"rotary_pct": 0}, "partial_rotary_factor: expected a number above 0, got 0"),
        ({"rotary_pct": 3 / 256}, f"partial_rotary_factor: expected {neox.EVEN}, got {3 / 256}"),
        ({"rotary_pct": 1.5}, f"partial_rotary_factor: expected {neox.EVEN}, got 1.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'type: expected "default", got "linear"'),
        ({"rope_parameters": 10_000}, "rope_parameters: expected an object"),
        ({"rope_parameters": FULL_ROTARY | {"rope_type": "yarn"}}, 'rope_type: expected "default", got "yarn"'),
    ],
)
def test_what_we_compute_differently_is_refused_for_gpt_neox(change, expected, tmp_path):
    assert error(hf_config.read, write(tmp_path, PYTHIA_JSON | change)) == f"{tmp_path / 'config.json'}: {expected}"


def test_every_problem_is_in_one_line(tmp_path):
    record = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 4, "activation_function": "relu"}
    message = error(hf_config.read, write(tmp_path, record))
    for field in "activation_function", "n_positions", "vocab_size":
        assert f"{field}: expected" in message


@pytest.mark.parametrize("content", [None, "{", "[]", '"gpt2"'])
def test_a_missing_or_damaged_file_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert error(hf_config.read, tmp_path).startswith(f"{tmp_path / 'config.json'}: expected ")


def test_sizes_that_differ_are_all_named(tmp_path):
    write(tmp_path, GPT2_JSON)
    hf_config.compare(tmp_path, GPT2)
    hf_config.compare(tmp_path, dataclasses.replace(GPT2, init_std=0.1, dropout=0.5, init="x", dtype="bfloat16"))
    hf_config.compare(tmp_path, dataclasses.replace(GPT2, vocab_size=50_257 + 255))
    wrong = dataclasses.replace(GPT2, heads=6, head_size=128, context=512, vocab_size=50_000, rotary_share=0.25)
    assert error(hf_config.compare, tmp_path, wrong) == (
        f"{tmp_path / 'config.json'}: expected model.heads = 12 (not 6), model.head_size = 64 (not 128), "
        "model.rotary_share = 0.0 (not 0.25), model.context = 1024 (not 512), "
        "model.vocab_size = 50257 to 50512 (not 50000)"
    )


def test_rotary_positions_may_be_fewer(tmp_path):
    """No array has a row per position; more positions than in training are refused."""
    write(tmp_path, PYTHIA_JSON)
    hf_config.compare(tmp_path, dataclasses.replace(PYTHIA, context=512))
    message = error(hf_config.compare, tmp_path, dataclasses.replace(PYTHIA, context=4096))
    assert message.endswith("expected model.context = 2048 or less (not 4096)")


@pytest.mark.parametrize(
    "config, ids, expected",
    [
        (
            families.preset("micro", vocab_size=50),
            IDS,
            "model.head_size: expected model.width / model.heads = 128 / 3, as in transformers, got 48",
        ),
        (dataclasses.replace(GPT2, parallel_residual=True), IDS, "model.parallel_residual: expected False (gpt2 of "),
        (GPT2, {"eos_id": 0, "pad_id": 50_257}, "pad_id: expected one of the 50257 ids of the model, got 50257"),
        (GPT2, {"eos_id": -1, "pad_id": 0}, "eos_id: expected one of the 50257 ids of the model, got -1"),
    ],
)
def test_models_that_transformers_lacks_are_not_written(config, ids, expected):
    assert error(hf_config.language_model, config, **ids).startswith(expected)


@pytest.mark.parametrize("name", ["gpt2_parity", "neox_parity", "neox_sequential_parity"])
def test_our_record_agrees_with_theirs(name):
    """Fields that both write are equal, except names of tokens and the form of rotary positions."""
    theirs = json.loads((HERE / name / "config.json").read_text())
    ours = hf_config.language_model(hf_config.read(HERE / name), **IDS)
    drop = {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    differ = {field for field in ours.keys() & theirs.keys() if ours[field] != theirs[field]} - drop
    assert differ == {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert ours.keys() - theirs.keys() <= {"rotary_pct", "rotary_emb_base"}
