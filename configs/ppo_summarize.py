"""Summarization with RLHF: fine-tuning, reward model, PPO.

    python experiments/ppo_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo

:tiny (the default)  a GPT-2 of 0.9M parameters on a generated world of posts, whose true reward is known. 2 CPU cores:
                     6 minutes, 2 GB; gold .65 -> .92, win rate .79 over SFT, exact KL 1.2 nats (seed 1)
:files               the same small model on your rows: --config.data.sft=FILE --config.data.preferences=FILE
                     (and --config.data.prompts=FILE). GPT-2's tokenizer comes from --config.text.path=FOLDER, or from
                     the hub with --config.text.path=gpt2. To download rows too: --config.data.source=hub
                     --config.data.sft=trl-lib/tldr --config.data.columns.label=completion
                     --config.data.preferences=openai/summarize_from_feedback/comparisons --config.data.skip_bad=true
:gpt2, :gpt2-medium, :gpt2-large, :gpt2-xl   the published recipe on Reddit TL;DR (arXiv 2403.17031; see `published`).
                     Weights, tokenizer and posts come from the hub, or from --config.model.init=FOLDER
                     --config.text.path=FOLDER
:gpt2-2019           the same with the controls of the first recipe (arXiv 1909.08593; see `first`)
:pythia-160m         the model of the published recipe itself. To compare: at --config.ppo.lr=1e-5 the paper's first
                     update has approx KL 1.6e-7, .0029, .0056, .0081 and clip fraction 0, .025, .051, .073 (means over
                     the epochs so far). Ours are in ppo/summary.json: ppo/..._first_update
:smollm2             a real pretrained model, SmolLM2-135M-Instruct, on some hundreds of posts: --config.data.sft=FILE
                     --config.data.preferences=FILE. Weights and tokenizer come from the hub, or from
                     --config.model.init=FOLDER --config.text.path=FOLDER
:qwen2.5-0.5b, :qwen3-0.6b, :llama-3.2-1b   the published recipe with these models in bfloat16, for one GPU

Memory of PPO on one device in GiB. XLA reports it for programs compiled for a CPU; a GPU needs less:
    python experiments/plan.py --config=configs/ppo_summarize.py:gpt2 --config.ppo.widths=1 [--config.model.remat=true]

                 state    draw   judge   update, with remat
    gpt2           3.7     7.1     6.7     28.7         9.9
    gpt2-medium   10.6    19.1    14.5        -        25.3
    pythia-160m    4.3     7.7     7.9        -        10.8
    smollm2        4.0     4.4     4.8      8.6         6.0
    qwen2.5-0.5b  14.7    18.0    26.0        -        27.1
    qwen3-0.6b    17.8    26.5    29.9        -        33.6
    llama-3.2-1b  36.8    44.6    53.9        -        65.2

Every field is a flag: --config.ppo.kl_coef=0.1
"""

import dataclasses

from ml_collections import ConfigDict

from rlhf_jax import config as configs
from rlhf_jax.algorithms import dpo, policy_gradient, ppo
from rlhf_jax.config import Config, Evaluation, Reward, Supervised, Text, Trace
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.models.families import preset

POSTS, PAIRS, EPISODES = 116_722, 92_800, 1_000_000  # posts and pairs: one epoch

GPT2_LENGTHS = dict(response_length=48, pair_length=153)  # the published ones, counted in GPT-2's tokens
PYTHIA_LENGTHS = dict(response_length=53, pair_length=169)


def get_config(arg="tiny"):
    """The config of an argument, with every field in it."""
    arguments = {
        "tiny": tiny,
        "files": files,
        "gpt2": lambda: published("openai-community/gpt2", preset("gpt2"), **GPT2_LENGTHS),
        "gpt2-medium": lambda: published("openai-community/gpt2-medium", preset("gpt2-medium"), **GPT2_LENGTHS),
        "gpt2-large": lambda: published("openai-community/gpt2-large", preset("gpt2-large"), **GPT2_LENGTHS),
        "gpt2-xl": lambda: published("openai-community/gpt2-xl", preset("gpt2-xl"), **GPT2_LENGTHS),
        "gpt2-2019": lambda: first("openai-community/gpt2", preset("gpt2"), **GPT2_LENGTHS),
        "pythia-160m": lambda: published(
            "EleutherAI/pythia-160m", preset("pythia-160m", vocab_size=50_304), **PYTHIA_LENGTHS
        ),
        "smollm2": smollm2,
        "llama-3.2-1b": lambda: instructed(
            "meta-llama/Llama-3.2-1B-Instruct", preset("llama-3.2-1b", vocab_size=128_256)
        ),
        "qwen2.5-0.5b": lambda: instructed("Qwen/Qwen2.5-0.5B-Instruct", preset("qwen2.5-0.5b")),
        "qwen3-0.6b": lambda: instructed("Qwen/Qwen3-0.6B", preset("qwen3-0.6b")),
    }
    if arg not in arguments:
        raise InputError(f"--config=...:{arg}: expected {', '.join(arguments)}")
    return ConfigDict(configs.tree(arguments[arg]()))


def tiny():
    """The embedded task."""
    return Config(
        text=Text(kind="bpe", vocab_size=800),
        data=sources.Config(prompt_length=56, response_length=22),
        model=preset("micro", heads=4, head_size=32, context=80, init_std=0.08),
        sft=Supervised(lr=2e-3, warmup=100, adam_b2=0.95, steps=600, batch=32, loss_on="response", eval_every=200),
        reward=Reward(lr=1e-3, warmup=20, adam_b2=0.95, steps=150, batch=32, eval_every=50),
        **configs.policies(lr=3e-4, steps=50, batch=64, epochs=2, temperature=1.0, eval_every=10)
        | {"policy_gradient": policy_gradient.Config()},
        dpo=dpo.Config(lr=5e-5, steps=100, batch=32, beta=0.5, sft_coef=1.0, eval_every=25),
        evaluation=Evaluation(prompts=512, batch=256, temperature=1.0),
        trace=Trace(every=10),
    )


def files():
    """Rows from files and a small model with random weights: sizes for some hundreds of posts on a CPU.

    GPT-2's vocabulary of 50,258 tokens takes most of the time: a fine-tuning step of 8 rows takes a second on 2 cores.
    """
    return Config(
        data=sources.Config(source="files", prompt_length=128),
        model=preset("micro", layers=2, heads=4, head_size=32, context=192, init_std=0.08),
        sft=Supervised(lr=2e-3, warmup=50, adam_b2=0.95, steps=250, batch=8, loss_on="response", eval_every=50),
        reward=Reward(lr=1e-3, warmup=20, adam_b2=0.95, steps=120, batch=16, eval_every=20),
        ppo=ppo.Config(lr=5e-4, steps=30, batch=32, epochs=2, temperature=1.0, kl_coef=0.005, eval_every=10),
        evaluation=Evaluation(prompts=128, batch=16, temperature=1.0),
    )


def published(place, model, *, response_length, pair_length):
    """Summaries of TL;DR posts with PPO (arXiv 2403.17031), from weights and a tokenizer on the hub.

    As in the paper: posts are cut at their last newline; PAD is not EOS; a summary is a space, its text and EOS. The
    reward head starts as N(0, 1 / sqrt(D + 1)), and after its training references score 0 on average. Weight decay is
    AdamW's default, and gradients are not clipped. Not in the paper: references also score standard deviation 1.
    """
    adam = dict(lr=3e-6, adam_eps=1e-5, weight_decay=0.01, max_grad_norm=0.0)
    return Config(
        text=Text(path=place),
        data=sources.Config(
            source="hub",
            sft="trl-lib/tldr",
            columns=sources.Columns(label="completion"),
            preferences="openai/summarize_from_feedback/comparisons",
            held_out_split="validation",
            skip_bad=True,
            prompt_length=512,
            response_length=response_length,
            pair_length=pair_length,
        ),
        model=dataclasses.replace(model, init=place),
        sft=Supervised(
            **adam, schedule="cosine", steps=POSTS // 128, batch=128, loss_on="all", eval_every=300, microbatches=8
        ),
        reward=Reward(
            **adam, schedule="cosine", steps=PAIRS // 64, batch=64, eval_every=0, microbatches=8
        ),  # evaluated once: there are as many held-out pairs as training pairs
        ppo=ppo.Config(
            **adam,
            schedule="linear",
            steps=EPISODES // 512,
            batch=512,
            epochs=4,
            minibatches=1,
            microbatches=32,
            lanes=64,
            widths=4,
            temperature=0.7,
            kl_coef=0.05,
            gamma=1.0,
            lam=0.95,
            clip=0.2,
            value_clip=0.2,
            value_coef=0.1,
            value_init="reward",
            missing_eos="replace",
            missing_eos_penalty=1.0,
            whiten_rewards=False,
            whiten_advantages=True,
            trace_epochs=True,
        ),
        evaluation=Evaluation(temperature=0.01),
    )


def smollm2():
    """SmolLM2-135M-Instruct on some hundreds of posts: sizes for 2 CPU cores.

    An update on a row of 437 tokens takes about 2.4 s there. Slices of two rows take a third of the memory of a whole
    batch, and less time. A reward model of so few pairs is no value model to start from: its explained variance was -4
    to -11. The model's rows are padded from 49,153 to 49,280, a multiple of 128, for GPUs.
    """
    adam = dict(adam_b2=0.95, warmup=5, weight_decay=0.01)
    slices = dict(batch=8, microbatches=4)
    rollout = dict(batch=16, microbatches=8, epochs=1, widths=4, temperature=0.7, value_init="zero")
    place = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return Config(
        text=Text(path=place),
        data=sources.Config(source="files", prompt_length=384, response_length=53, pair_length=56),
        model=preset("smollm2-135m", vocab_size=49_280, init=place),
        sft=Supervised(**adam, **slices, lr=5e-5, steps=92, loss_on="response", eval_every=46),
        reward=Reward(**adam, **slices, lr=2e-5, steps=48, eval_every=24),
        ppo=ppo.Config(**adam, **rollout, lr=1e-5, steps=30, eval_every=10),
        evaluation=Evaluation(prompts=82, batch=16, temperature=0.01),
    )


def instructed(place, model):
    """`published` with a model that follows instructions: bfloat16, for one GPU."""
    config = published(place, dataclasses.replace(model, dtype="bfloat16"), response_length=53, pair_length=169)
    return dataclasses.replace(config, evaluation=Evaluation(prompts=512, temperature=0.01))


def first(place, model, **lengths):
    """`published` with the controls of the main experiments of lm-human-preferences (arXiv 1909.08593).

    These are an adaptive KL coefficient, whitened rewards, a value model with a zero head, and a reward model that is
    normalized before its training too. The references normalize it here, the policy's samples there. Sizes and learning
    rates stay those of `published`.
    """
    config = published(place, model, **lengths)
    control = dict(kl_coef=0.15, kl_target=6.0, kl_horizon=10_000, value_init="zero", whiten_rewards=True)
    return dataclasses.replace(
        config,
        reward=dataclasses.replace(config.reward, normalize_before=True),
        ppo=dataclasses.replace(config.ppo, **control),
    )
