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
# As published: of Llama 3.2 1B, Mistral 7B v0.1, Qwen2.5 0.5B and Qwen3 0.6B, without what is not read.
LLAMA_JSON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
MISTRAL_JSON = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN2_JSON = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_JSON = QWEN2_JSON | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
LLAMA, MISTRAL = families.preset("llama-3.2-1b", vocab_size=128_256), families.preset("mistral-7b-v0.1")
QWEN2, QWEN3 = families.preset("qwen2.5-0.5b"), families.preset("qwen3-0.6b")
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
    # 0 stands for four times the width.
    assert hf_config.read(write(tmp_path, LLAMA_JSON)) == dataclasses.replace(LLAMA, feed_forward_size=0)
    hf_config.compare(tmp_path, LLAMA)
    assert hf_config.read(write(tmp_path, MISTRAL_JSON)) == dataclasses.replace(MISTRAL, vocab_size=32_000)
    assert hf_config.read(write(tmp_path, QWEN2_JSON)) == QWEN2
    assert hf_config.read(write(tmp_path, QWEN3_JSON)) == QWEN3


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
        dataclasses.replace(GPT2, feed_forward_size=100),
        dataclasses.replace(LLAMA, feed_forward_size=100, biases="attention", head_size=16),
        dataclasses.replace(QWEN3, biases="attention", kv_heads=0, tied=False),
        dataclasses.replace(QWEN2, window=100, rotary_factor=2.0, rotary_context=77, rotary_slow=2.0, rotary_fast=3.0),
        dataclasses.replace(MISTRAL, vocab_size=9),
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


@pytest.mark.parametrize(
    "record, change, expected",
    [
        (LLAMA_JSON, {"hidden_act": "gelu"}, 'hidden_act: expected "silu", got "gelu"'),
        (LLAMA_JSON, {"num_key_value_heads": 5}, "num_key_value_heads: expected a divisor of num_attention_heads = 32"),
        (LLAMA_JSON, {"head_dim": 0}, "head_dim: expected a whole number above 0, got 0"),
        (LLAMA_JSON, {"mlp_bias": True}, "mlp_bias: expected false where attention_bias is, got true"),
        (LLAMA_JSON, {"rope_scaling": {"rope_type": "yarn"}}, 'rope_type: expected "default" or "llama3", got "yarn"'),
        (LLAMA_JSON, {"rope_scaling": {"type": "linear"}}, 'type: expected "default" or "llama3", got "linear"'),
        (LLAMA_JSON, {"rope_scaling": {"rope_type": "llama3"}}, "factor: expected a number above 0, got null"),
        (
            LLAMA_JSON,
            {"rope_scaling": LLAMA_JSON["rope_scaling"] | {"low_freq_factor": 4}},
            "high_freq_factor: expected more than low_freq_factor, got 4.0",
        ),
        (MISTRAL_JSON, {"sliding_window": 0}, "sliding_window: expected a whole number above 0, got 0"),
        (
            QWEN2_JSON,
            {"use_sliding_window": True},
            "max_window_layers: expected 0 where use_sliding_window is true, got 24",
        ),
        (
            QWEN3_JSON,
            {"use_sliding_window": True, "layer_types": ["full_attention"], "num_hidden_layers": 1},
            'layer_types: expected ["sliding_attention"], got ["full_attention"]',
        ),
        (
            LLAMA_JSON,
            {"quantization_config": {"bits": 4}},
            "quantization_config: expected none: only weights in float32, float16 or bfloat16 are read",
        ),
    ],
)
def test_what_we_compute_differently_is_refused_for_llama(record, change, expected, tmp_path):
    message = error(hf_config.read, write(tmp_path, record | change))
    assert message.startswith(f"{tmp_path / 'config.json'}: {expected}")


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
        (dataclasses.replace(LLAMA, qk_norm=True, biases="qkv"), IDS, "model.qk_norm: expected False (qwen2 of "),
        (dataclasses.replace(LLAMA, feed_forward="gelu"), IDS, "model.feed_forward: expected swiglu (llama of "),
        (GPT2, {"eos_id": 0, "pad_id": 50_257}, "pad_id: expected one of the 50257 ids of the model, got 50257"),
        (GPT2, {"eos_id": -1, "pad_id": 0}, "eos_id: expected one of the 50257 ids of the model, got -1"),
    ],
)
def test_models_that_transformers_lacks_are_not_written(config, ids, expected):
    assert error(hf_config.language_model, config, **ids).startswith(expected)


FOLDERS = ("gpt2", "neox", "neox_sequential", "llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("name", [f"{name}_parity" for name in FOLDERS])
def test_our_record_agrees_with_theirs(name):
    """Fields that both write are equal, except names of tokens and the form of rotary positions."""
    theirs = json.loads((HERE / name / "config.json").read_text())
    ours = hf_config.language_model(hf_config.read(HERE / name), **IDS)
    drop = {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    differ = {field for field in ours.keys() & theirs.keys() if ours[field] != theirs[field]} - drop
    assert differ == {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert ours.keys() - theirs.keys() <= {"rotary_pct", "rotary_emb_base", "rope_theta", "rope_scaling", "head_dim"}
