"""The README.md of an exported model: what it is, its recipe and its metrics. It names data and shows no rows."""

import dataclasses
from pathlib import Path

from rlhf_jax import config as configs
from rlhf_jax import hub
from rlhf_jax.data.tldr import format_query
from rlhf_jax.text import bpe

WHAT = {
    "pretrain": "a language model, pretrained",
    "sft": "a policy after supervised fine-tuning",
    "reward": "a reward model, trained on preference pairs",
    "judge": "a reward model that judges another one, trained on other preference pairs",
    "rl": "a policy after reinforcement learning",
}
# Config fields left out: those that do not change a run's results, and those in the card's section `Data`.
QUIET = ("eval_every", "save_every", "microbatches", "remat", "top_k", "top_p", "init", "path")

READS = {"versions": dict, "machine": dict, "seconds": int | float}  # fields of the summary.json, and their types

POLICY = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer({prompt!r}, return_tensors="pt")
written = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(written, skip_special_tokens=True))
"""
REWARD = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
text = {prompt!r} + " {completion}" + tokenizer.eos_token
print(model(**tokenizer(text, return_tensors="pt")).logits[0, 0])
"""
PROMPTS = {"write": bpe.EOS, "summarize": format_query("...", "...", "..."), "prompts": "..."}


def card(config, stage, summary):
    """The text of the card of a run's finished stage; summary is what its summary.json holds."""
    use = REWARD if stage in configs.REWARD_MODELS else POLICY
    measured = [(f"`{name}`", _number(value)) for name, value in summary.items() if name.startswith(f"{stage}/")]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    machine = summary["machine"]
    return "\n".join(
        [
            *_header(config, stage),
            f"# {_what(config, stage)}",
            "",
            "Made with rlhf_jax. `FOLDER` is the folder of this file:",
            "",
            "```python",
            use.format(prompt=PROMPTS[config.task], completion=_completion(config)) + "```",
            "",
            _reading(config, stage),
            "",
            "## Recipe",
            "",
            *_table(("config", "value"), _recipe(config, stage)),
            "",
            "## Data",
            "",
            *(f"- {name}: {value}" for name, value in _data(config)),
            "",
            "## Measured",
            "",
            "On held-out rows (`summary.json` of the stage).",
            "",
            *_table(("number", "value"), [row for row in measured if row[1]]),
            "",
            f"{summary['seconds']} seconds on {machine.get('devices')} x {machine.get('device_kind')}; {versions}.",
            "",
        ]
    )


def _recipe(config, stage):
    """What the stage's result depends on, a section of the config a row."""
    for name in configs.sections(config, stage):
        value = getattr(config, name)
        if name == "data":
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field: value for field, value in dataclasses.asdict(value).items() if field not in QUIET}
            values = ", ".join(f"{field} {value}" for field, value in fields.items())
        else:
            values = Path(str(value)).name + (", this is the first" if name == "seeds" and value > 1 else "")
        yield f"`{name}`", values


def _what(config, stage):
    if stage in WHAT:
        what = WHAT[stage]
    else:
        by = "against a learned reward" if config.learned else f"against the reward {Path(config.reward.kind).name}"
        by = by if config.sampled else "on preference pairs"
        what = f"a policy after {config.algorithm.replace('_', ' ')} {by}"
    return what[0].upper() + what[1:]


def _header(config, stage):
    """The metadata that the hub reads."""
    tag = "text-classification" if stage in configs.REWARD_MODELS else "text-generation"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {tag}", f"tags: [rlhf_jax, {stage}]"]
    if _on_hub(config.model.init):
        lines.append(f"base_model: {config.model.init.partition('@')[0]}")
    return [*lines, "---"]


def _reading(config, stage):
    tokens = "PAD and EOS are different tokens. "
    if stage in configs.REWARD_MODELS:
        return tokens + "Scores are read at EOS, the last token; pad on the right. References score 0 on average."
    begins = f"the prompt, padded on the left; {_completion(config)} begins with a space"
    return f"{tokens}A text begins with {'EOS alone' if config.task == 'write' else begins}, and ends with EOS."


def _completion(config):
    return "a summary" if config.task == "summarize" else "a completion"


def _data(config):
    data = config.data
    if config.task == "write":
        made = {"made": f"{data.made} {data.kind}, written by rlhf_jax (seed {data.made_seed})"}
        yield "texts", made.get(data.source) or f"{data.kind}, {_name(data.path) or 'the published set'}"
    elif data.source == "world":
        yield "posts, summaries and preferences", f"generated by rlhf_jax (seed {data.world_seed})"
    else:
        prompts = data.prompts or data.sft
        labels = "summaries" if config.task == "summarize" else "demonstrations"
        rows = ((labels, data.sft), ("preferences", data.preferences), ("prompts", prompts))
        yield from ((name, _name(value)) for name, value in rows if value)
    if config.model.init:
        yield "weights to start from", _name(config.model.init)
    if config.text.path:
        yield "tokenizer", _name(config.text.path)


def _name(place):
    """A name on the hub unchanged; only the last part of a local path, which nobody else has."""
    return place if not place or _on_hub(place) else Path(place).name


def _on_hub(place):
    return bool(place) and not Path(place).exists() and hub.is_name("/".join(place.partition("@")[0].split("/")[:2]))


def _number(value):
    """The value as text; empty unless it is a number or a list of numbers."""
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _table(head, rows):
    return [f"| {a} | {b} |" for a, b in (head, ("---", "---"), *rows)]
