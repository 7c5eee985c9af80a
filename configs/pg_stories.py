"""Tiny stories: a small GPT-2 learns to write stories from random weights, then happy ones, then happier ones.

    python experiments/pg_stories.py --config=configs/pg_stories.py --workdir=runs/stories

:made (the default)  stories generated from a seed
:stories             real stories: --config.data.path=stories.txt, with <|endoftext|> between them. 2 CPU cores: 8 to
                     14 minutes; mean VADER .53 -> .88 at 3.6 nats (seed 1).
                     To download them (10 MB; the split train has 1 GB, and needs more in memory):
                     --config.data.source=hub --config.data.split=validation --config.data.skip_bad=true

Every field is a flag: --config.algorithm=ppo, --config.seeds=8, --config.reward=path/to/file.py:function
"""

import dataclasses

from ml_collections import ConfigDict

from rlhf_jax import alarms
from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient
from rlhf_jax.config import Evaluation, Reward, Supervised, Text
from rlhf_jax.data import corpus
from rlhf_jax.errors import InputError
from rlhf_jax.models.families import preset


def get_config(arg="made"):
    """The config of an argument, with every field in it."""
    arguments = {"made": made, "stories": stories}
    if arg not in arguments:
        raise InputError(f"--config=...:{arg}: expected {', '.join(arguments)}")
    return ConfigDict(configs.tree(arguments[arg]()))


def stories():
    """The article's sizes: 64 tokens, 64 samples an iteration. Its learning rate, 1e-5, changes little in 100 steps."""
    adam = dict(schedule="cosine", warmup=50, adam_b2=0.95, loss_on="all")
    return configs.write(
        text=Text(kind="bpe", vocab_size=1_024),
        data=corpus.Config(kind="stories", source="file", length=64),
        model=preset("micro", heads=4, head_size=32, context=64, init_std=0.08),
        pretrain=Supervised(**adam, lr=1e-3, steps=1_500, batch=32, eval_every=500),
        sft=Supervised(**adam, lr=5e-4, steps=200, batch=32, eval_every=100),
        reward=Reward(kind="sentiment", lr=1e-3, warmup=20, adam_b2=0.95, steps=150, batch=32, eval_every=50),
        **configs.policies(
            lr=1e-4,
            steps=100,
            batch=64,
            temperature=1.0,
            kl_coef=0.03,
            value_init="zero",
            missing_eos="subtract",
            missing_eos_penalty=0.0,  # a story that is cut at 63 tokens is not worse
            ended=False,
            eval_every=10,
        )
        | {
            "policy_gradient": policy_gradient.Config(
                lr=5e-5, schedule="linear", steps=100, batch=64, kl_coef=0.03, eval_every=20
            )
        },
        alarms=alarms.Config(repeat_rate=0.15),  # half of all openings of 60 words repeat a word four times
        evaluation=Evaluation(prompts=512, batch=256, temperature=1.0, result="best"),
    )


def made():
    """The same on generated stories, which need fewer steps."""
    config = stories()
    return dataclasses.replace(
        config,
        text=Text(kind="bpe", vocab_size=400),
        data=dataclasses.replace(config.data, source="made"),
        pretrain=dataclasses.replace(config.pretrain, steps=400, eval_every=200),
        sft=dataclasses.replace(config.sft, steps=100),
        policy_gradient=dataclasses.replace(config.policy_gradient, steps=50),
    )
