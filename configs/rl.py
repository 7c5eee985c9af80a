"""Reinforcement learning on your own prompts, with your own reward, from any weights.

    python experiments/rl.py --config=configs/rl.py --workdir=runs/mine \
        --config.data.prompts=prompts.jsonl --config.reward=my_reward.py:score

:small (the default)  a GPT-2 of 0.9M parameters with random weights, on characters: it shows whether prompts and reward
                      fit together. --config.sft.steps=300 --config.data.sft=rows.jsonl fine-tunes it first.
:gpt2                 GPT-2 124M and its tokenizer from the hub, or --config.model.init=FOLDER --config.text.path=FOLDER

Prompts are rows {"prompt", ...} in a JSONL, JSON, CSV or Parquet file, or in a data set on the hub
(--config.data.source=hub --config.data.prompts=OWNER/NAME). The reward is a Python function of the completions, or of
the rows and the completions:

    def score(rows, texts):
        return [float(row["answer"] in text) for row, text in zip(rows, texts)]

--config.algorithm=policy_gradient selects REINFORCE instead of PPO. --config.reward=learned --config.data.sft=FILE
--config.data.preferences=FILE learns the reward from preferences. A prompt of more than data.prompt_length tokens loses
its first tokens; --config.data.cut=right|newline|skip|error selects another rule.
"""

from ml_collections import ConfigDict

from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient
from rlhf_jax.config import Config, Evaluation, Reward, Supervised, Text
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError
from rlhf_jax.models.families import preset


def get_config(arg="small"):
    """The config of an argument, with every field in it."""
    arguments = {"small": small, "gpt2": pretrained}
    if arg not in arguments:
        raise InputError(f"--config=...:{arg}: expected {', '.join(arguments)}")
    return ConfigDict(configs.tree(arguments[arg]()))


def small():
    """Sizes for a CPU: 64 characters of prompt, 32 of completion."""
    adam = dict(adam_b2=0.95, warmup=20, batch=32, eval_every=50)
    rollouts = dict(batch=64, temperature=1.0, kl_coef=0.02, eval_every=10, missing_eos_penalty=0.0)
    return Config(
        task="prompts",
        text=Text(kind="char"),
        data=sources.Config(source="files", prompt_length=64, response_length=32, cut="left"),
        model=preset("micro", heads=4, head_size=32, context=96, init_std=0.08),
        sft=Supervised(**adam, lr=2e-3, steps=0, loss_on="response"),
        reward=Reward(**adam, lr=1e-3, steps=150, kind="sentiment"),
        **configs.policies(**rollouts, lr=3e-4, steps=50, epochs=2, missing_eos="subtract")
        | {"policy_gradient": policy_gradient.Config(**rollouts, lr=3e-4, steps=100)},
        evaluation=Evaluation(prompts=256, batch=256, temperature=1.0),
    )


def pretrained():
    """GPT-2 124M: 128 tokens of prompt, 64 of completion."""
    rollouts = dict(batch=128, microbatches=8, lanes=64, widths=4, temperature=1.0, eval_every=10)
    place = "openai-community/gpt2"
    return Config(
        task="prompts",
        text=Text(path=place),
        data=sources.Config(source="files", prompt_length=128, response_length=64, cut="left"),
        model=preset("gpt2", init=place),
        sft=Supervised(lr=1e-5, steps=0, batch=32, microbatches=4),
        reward=Reward(lr=1e-5, steps=500, batch=32, microbatches=4, kind="sentiment"),
        **configs.policies(**rollouts, lr=1e-6, steps=200, epochs=2)
        | {"policy_gradient": policy_gradient.Config(**rollouts, lr=1e-6, steps=200)},
        evaluation=Evaluation(prompts=256, batch=64, temperature=1.0),
    )
