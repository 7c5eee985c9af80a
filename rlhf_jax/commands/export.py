"""Exports a finished stage as a folder that transformers loads: model, tokenizer, model card. Needs no torch."""

import dataclasses
from pathlib import Path

from rlhf_jax import checkpoint, jsonfile, pretrained, text
from rlhf_jax import config as configs
from rlhf_jax.commands import model_card
from rlhf_jax.errors import InputError
from rlhf_jax.models import hf, peft
from rlhf_jax.text import hf as text_hf


def export(workdir, out, stage="", adapter=False):
    """Writes the result of a stage of the run in `workdir` to `out`, a new or an empty folder; returns the stage.

    A stage's result is its policy. Stage `reward` has a reward model, written as a ...ForSequenceClassification with
    one label and right padding. The default is the last finished stage with a policy. Of a run with several seeds, the
    first seed is exported. adapter: a policy's adapters (lora) as a folder for peft, instead of a model in which they
    are merged. Raises InputError, before anything is written, if the workdir, stage, model or folder is not suitable.
    """
    workdir, out = Path(workdir).expanduser(), Path(out).expanduser()
    hf.check_folder(out)
    config = configs.read(workdir)
    stage = _stage(workdir, config, stage)
    place = configs.place(config, workdir, stage) / stage
    summary = _summary(place / "summary.json")
    tokenizer = text.load(workdir / "text")
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or tokenizer.vocab_size)
    beside = text_hf.to_hf(tokenizer) | {"README.md": model_card.card(config, stage, summary)}
    if adapter:
        return _adapter(config, model, stage, place, out, beside)
    params = pretrained.whole(
        checkpoint.load(place)["reward" if stage in configs.REWARD_MODELS else "policy"], config, model, place
    )
    ids = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    if stage in configs.REWARD_MODELS:
        # Without position ids, transformers counts positions from the left edge, padding included.
        beside["tokenizer_config.json"] |= {"padding_side": "right"}
        hf.save_scalar(out, params, model, **ids, beside=beside)
    else:
        hf.save(out, params, model, **ids, generation=_generation(config, model, tokenizer), beside=beside)
    return stage


def _adapter(config, model, stage, place, out, beside):
    """Writes the adapters of a stage's policy."""
    if not config.lora.rank or stage in configs.REWARD_MODELS:
        expected = "a run with adapters (lora.rank)" if stage not in configs.REWARD_MODELS else "a stage with a policy"
        raise InputError(f"adapter: expected {expected}, got {stage}; without this flag, the whole model is exported")
    adapters = checkpoint.load(place)["policy"]
    peft.save(out, adapters, model, config.lora, base=config.model.init, beside=beside)
    return stage


def _summary(path):
    """What the model card reads."""
    again = f"; remove {path} and run the training command again, to make it again"
    summary = jsonfile.read(path, "the summary of a stage", again)
    if not all(isinstance(summary.get(name), kind) for name, kind in model_card.READS.items()):
        raise InputError(f"{path}: expected {', '.join(model_card.READS)}{again}")
    return summary


def _stage(workdir, config, requested):
    names = configs.stages(config)
    if requested and requested not in names:
        raise InputError(f"stage: expected {' or '.join(names)}, got {requested!r}")
    finished = [name for name in names if (configs.place(config, workdir, name) / name / "summary.json").exists()]
    if requested and requested not in finished:
        expected = ", ".join(finished) or "there is none"
        raise InputError(f"stage: expected a finished one ({expected}), got {requested!r}")
    policies = [name for name in finished if name not in configs.REWARD_MODELS]
    if not requested and not policies:
        raise InputError(f"workdir: expected a finished stage in {workdir}; there is none yet")
    return requested or policies[-1]


def _generation(config, model, tokenizer):
    """Settings with which `generate` samples as the run's evaluation does."""
    temperature = config.evaluation.temperature
    # The default top_k of transformers is 50.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    beyond = list(range(tokenizer.vocab_size, model.vocab_size))  # ids that the tokenizer does not have
    ends = {"eos_token_id": list(tokenizer.eos_ids)} if len(tokenizer.eos_ids) > 1 else {}
    sampling |= {"max_new_tokens": config.data.response_length}
    return ends | sampling | ({"suppress_tokens": beyond} if beyond else {})
