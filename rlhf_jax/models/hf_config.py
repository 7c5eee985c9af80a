"""config.json of transformers <-> our Config, for GPT-2 and GPT-NeoX. What we would compute differently is refused.

A padded vocabulary (model.vocab_size above the tokenizer's) keeps its padded rows: config.json has the number of rows
of the embedding, the exported model is the same function, and the tokenizer uses the first ids.
"""

import json
from pathlib import Path

from rlhf_jax import jsonfile
from rlhf_jax.errors import InputError, listed, short
from rlhf_jax.fields import LARGEST
from rlhf_jax.models import decoder
from rlhf_jax.models.hf_layout import model_type

FILE = "config.json"
PADDING = 256  # a model must have fewer than this many ids beyond those of the checkpoint it starts from

# {our field: theirs}, by architecture. _gpt2 and _neox read the other fields.
FIELDS = {
    "gpt2": {
        "layers": "n_layer",
        "heads": "n_head",
        "width": "n_embd",
        "context": "n_positions",
        "vocab_size": "vocab_size",
        "norm_eps": "layer_norm_epsilon",
        "init_std": "initializer_range",
    },
    "gpt_neox": {
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "width": "hidden_size",
        "context": "max_position_embeddings",
        "vocab_size": "vocab_size",
        "norm_eps": "layer_norm_eps",
        "init_std": "initializer_range",
    },
}
DEFAULTS = {"norm_eps": 1e-5, "init_std": 0.02}  # transformers' values if these are absent
GELU = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu": True}  # whether an activation is the exact GELU
ARCHITECTURES = {
    "gpt2": {
        "language_model": "GPT2LMHeadModel",
        "scalar_model": "GPT2ForSequenceClassification",
        "trunk": "GPT2Model",
    },
    "gpt_neox": {
        "language_model": "GPTNeoXForCausalLM",
        "scalar_model": "GPTNeoXForSequenceClassification",
        "trunk": "GPTNeoXModel",
    },
}
EVEN = "a share of the head that is an even number of its entries, 2 or more"


def read(folder):
    """The Config in a folder's config.json. InputError names the file, each wrong field, and what was expected.

    Dropout is not read: it belongs to the training, not to the model.
    """
    path = Path(folder, FILE)
    fields = _Fields(jsonfile.read(path, "the config.json of transformers"))
    kind = fields.one_of("model_type", *FIELDS)
    config = {"gpt2": _gpt2, "gpt_neox": _neox}[kind](fields) if not fields.problems else None
    if fields.problems:
        raise InputError(f"{path}: {listed(fields.problems, '; ')}")
    return config


def compare(folder, config):
    """Raises InputError, naming each field that must change, if the checkpoint in `folder` does not fit config."""
    theirs = read(folder)
    names = ["layers", "heads", "head_size", "width", "rotary_share", "rotary_base", "parallel_residual"]
    names += ["exact_gelu", "tied", "norm_eps"]
    wrong = {name: repr(getattr(theirs, name)) for name in names if getattr(theirs, name) != getattr(config, name)}
    if config.context > theirs.context or (config.context < theirs.context and not theirs.rotary_share):
        wrong["context"] = f"{theirs.context}{' or less' if theirs.rotary_share else ''}"
    if not theirs.vocab_size <= config.vocab_size < theirs.vocab_size + PADDING:
        wrong["vocab_size"] = f"{theirs.vocab_size} to {theirs.vocab_size + PADDING - 1}"
    if wrong:
        changes = (f"model.{name} = {expected} (not {getattr(config, name)!r})" for name, expected in wrong.items())
        raise InputError(f"{Path(folder, FILE)}: expected {listed(changes)}")


def language_model(config, *, eos_id, pad_id):
    """config.json of a language model, as a dict. Raises InputError if transformers has no such architecture."""
    return _record(config, "language_model", eos_id, pad_id)


def scalar_model(config, *, eos_id, pad_id):
    """config.json of a reward model, as a dict. transformers reads the score at the last token that is not pad_id."""
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}  # one label; transformers' default is two
    return _record(config, "scalar_model", eos_id, pad_id) | labels


def _gpt2(fields):
    fields.fixed("n_inner", None, 4 * fields.size("n_embd"))
    fields.fixed("scale_attn_weights", True)
    fields.fixed("scale_attn_by_inverse_layer_idx", False)
    fields.fixed("add_cross_attention", False)
    return _config(
        fields,
        exact_gelu=GELU.get(fields.one_of("activation_function", *GELU, default="gelu_new")),
        tied=fields.flag("tie_word_embeddings", True),
    )


def _neox(fields):
    fields.fixed("intermediate_size", 4 * fields.size("hidden_size"))
    fields.fixed("attention_bias", True)
    # transformers 5 writes one object in place of two older fields.
    record = fields.record
    old = {"rope_theta": record.get("rotary_emb_base", 10_000), "partial_rotary_factor": record.get("rotary_pct", 0.25)}
    new = record.get("rope_parameters") or record.get("rope_scaling") or {}
    if not isinstance(new, dict):
        fields.problems.append("rope_parameters: expected an object")
        new = {}
    rope = _Fields(old | new, fields.problems)
    rope.fixed("rope_type", "default")
    rope.fixed("type", "default")
    config = _config(
        fields,
        rotary_share=rope.number("partial_rotary_factor"),
        rotary_base=rope.number("rope_theta"),
        parallel_residual=fields.flag("use_parallel_residual", True),
        exact_gelu=GELU.get(fields.one_of("hidden_act", *GELU, default="gelu")),
        tied=fields.flag("tie_word_embeddings", False),
    )
    rotated = int(config.head_size * config.rotary_share)
    rope.expect(0 < rotated <= config.head_size and rotated % 2 == 0, "partial_rotary_factor", EVEN)
    return config


def _config(fields, **rest):
    kind = fields.record["model_type"]
    fields.fixed("architectures", *([name] for name in ARCHITECTURES[kind].values()))
    theirs = FIELDS[kind]
    sizes = {ours: fields.size(theirs[ours]) for ours in ("layers", "heads", "width", "context", "vocab_size")}
    fields.expect(sizes["width"] % sizes["heads"] == 0, theirs["heads"], f"a divisor of {theirs['width']}")
    numbers = {ours: fields.number(theirs[ours], default) for ours, default in DEFAULTS.items()}
    return decoder.Config(**sizes, head_size=sizes["width"] // sizes["heads"], **numbers, **rest)


def _record(config, what, eos_id, pad_id):
    kind = model_type(config)
    for name, token in (("eos_id", eos_id), ("pad_id", pad_id)):
        if not 0 <= token < config.vocab_size:
            raise InputError(f"{name}: expected one of the {config.vocab_size} ids of the model, got {token}")
    if config.heads * config.head_size != config.width:
        expected = f"model.width / model.heads = {config.width} / {config.heads}, as in transformers"
        raise InputError(f"model.head_size: expected {expected}, got {config.head_size}")
    if config.parallel_residual and kind == "gpt2":
        raise InputError("model.parallel_residual: expected False where model.rotary_share is 0, as in transformers")
    record = {theirs: getattr(config, ours) for ours, theirs in FIELDS[kind].items()}
    gelu = "gelu" if config.exact_gelu else "gelu_new"
    if kind == "gpt2":
        record |= {"activation_function": gelu, "resid_pdrop": config.dropout, "embd_pdrop": config.dropout}
        record |= {"attn_pdrop": 0.0}
    else:
        record |= {"hidden_act": gelu, "hidden_dropout": config.dropout, "intermediate_size": 4 * config.width}
        record |= {"rotary_pct": config.rotary_share, "rotary_emb_base": config.rotary_base}
        record |= {"use_parallel_residual": config.parallel_residual, "attention_bias": True}
    return record | {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind][what]],
        "tie_word_embeddings": config.tied,
        "dtype": "float32",
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


class _Fields:
    """Reads and checks the fields of a config.json one by one; `problems` collects what is wrong with them."""

    def __init__(self, record, problems=None):
        self.record = record
        self.problems = [] if problems is None else problems

    def expect(self, fine, name, expected):
        if not fine:
            self.problems.append(f"{name}: expected {expected}, got {short(json.dumps(self.record.get(name)))}")
        return fine

    def fixed(self, name, *values):
        """Expects the field to be absent or one of the values."""
        expected = short(" or ".join(json.dumps(value) for value in values), most=200)
        self.expect(name not in self.record or self.record[name] in values, name, expected)

    def one_of(self, name, *choices, default=None):
        value = self.record.get(name, default)
        fine = self.expect(isinstance(value, str) and value in choices, name, " or ".join(choices))
        return value if fine else choices[0]

    def flag(self, name, default):
        value = self.record.get(name, default)
        self.expect(isinstance(value, bool), name, "true or false")
        return value

    def size(self, name):
        value = self.record.get(name)
        return value if self.expect(type(value) is int and 0 < value < LARGEST, name, "a whole number above 0") else 1

    def number(self, name, default=None):
        value = self.record.get(name, default)
        fine = self.expect(type(value) in (int, float) and 0 < value < LARGEST, name, "a number above 0")
        return float(value) if fine else 1.0
