"""Summarization with RLHF: fine-tuning, reward model, PPO.

    python experiments/ppo_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo

:tiny (the default)  a 0.9M-parameter GPT-2 on a generated world of posts, whose true reward is known. 2 CPU cores:
                     6 minutes, 2 GB; gold .67 -> .94, win rate .78 over SFT, exact KL 1.2 nats (seed 1)
:files               the same small model on your rows: --config.data.sft=FILE --config.data.preferences=FILE
                     (and --config.data.prompts=FILE), with GPT-2's tokenizer from --config.text.path=FOLDER, or gpt2
                     to download it; the rows, too, can be downloaded: --config.data.source=hub
                     --config.data.sft=trl-lib/tldr --config.data.columns.label=completion
                     --config.data.preferences=openai/summarize_from_feedback/comparisons --config.data.skip_bad=true
:gpt2                the published recipe of GPT-2 124M on Reddit TL;DR (arXiv 2403.17031), from local files

Every field is a flag: --config.ppo.kl_coef=0.1
"""

import dataclasses

from ml_collections import ConfigDict

from rlhf_jax.algorithms import ppo, preference, supervised
from rlhf_jax.config import Config, Evaluation, Text
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.models import gpt2


def get_config(arg="tiny"):
    """The config of an argument, with every field in it."""
    arguments = {"tiny": tiny, "files": files, "gpt2": recipe}
    if arg not in arguments:
        raise InputError(f"--config=...:{arg}: expected {', '.join(arguments)}")
    return ConfigDict(dataclasses.asdict(arguments[arg]()))


def tiny():
    """The embedded task."""
    return Config(
        text=Text(kind="bpe", vocab_size=800),
        data=sources.Config(prompt_length=56, response_length=22),
        model=gpt2.preset("micro", heads=4, head_size=32, context=80, init_std=0.08),
        sft=supervised.Config(
            lr=2e-3, warmup=100, adam_b2=0.95, steps=600, batch=32, loss_on="response", eval_every=200
        ),
        reward=preference.Config(lr=1e-3, warmup=20, adam_b2=0.95, steps=150, batch=32, eval_every=50),
        ppo=ppo.Config(lr=3e-4, steps=50, batch=64, epochs=2, temperature=1.0, eval_every=10),
        evaluation=Evaluation(prompts=512, batch=256, temperature=1.0),
    )


def files():
    """Rows in files, a small model from random weights: sizes for some hundreds of posts on a CPU.

    Most of the time goes into GPT-2's vocabulary of 50,258: a fine-tuning step of 8 rows takes a second on 2 cores.
    """
    return Config(
        data=sources.Config(source="files", prompt_length=128),
        model=gpt2.preset("micro", layers=2, heads=4, head_size=32, context=192, init_std=0.08),
        sft=supervised.Config(lr=2e-3, warmup=50, adam_b2=0.95, steps=250, batch=8, loss_on="response", eval_every=50),
        reward=preference.Config(lr=1e-3, warmup=20, adam_b2=0.95, steps=120, batch=16, eval_every=20),
        ppo=ppo.Config(lr=5e-4, steps=30, batch=32, epochs=2, temperature=1.0, kl_coef=0.005, eval_every=10),
        evaluation=Evaluation(prompts=128, batch=16, temperature=1.0),
    )


def recipe():
    """GPT-2 124M: every default is the recipe's; only the model and the places of the files are named."""
    return Config(
        text=Text(path="gpt2"),
        data=sources.Config(source="files", sft="tldr/sft.jsonl", preferences="tldr/preferences.jsonl"),
        model=gpt2.preset("gpt2", init="gpt2/model.safetensors"),
    )
