"""Predicts the memory of a config's reinforcement learning, before anything is downloaded or allocated.

    python experiments/plan.py --config=configs/ppo_summarize.py:gpt2 --config.ppo.microbatches=64 --devices=8
    python experiments/plan.py --config=configs/pg_tweets.py

The programs are compiled for this machine, and XLA reports their memory: a minute for GPT-2 on 2 CPU cores. Programs
for a CPU need more memory than those for a GPU or TPU, which fuse more and compute in bfloat16 without widening it. A
character tokenizer counts as printable ASCII.
"""

from absl import app, flags
from launch import CONFIG, leave, parser

from rlhf_jax import config as configs
from rlhf_jax.commands import benchmark, memory
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter

DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the batch.", lower_bound=1)
IDS = {"gpt2": 50_258, "char": benchmark.CHARACTERS.vocab_size}  # by kind of tokenizer; gpt2: its own, and PAD


def main(_):
    try:
        config = configs.parse(CONFIG.value.to_dict())
        configs.check(config, devices=DEVICES.value, files=False)
        ids = IDS.get(config.text.kind, config.text.vocab_size)
        with Reporter() as reporter:
            sizes = memory.rl(config, ids, DEVICES.value)
            header = (f"{config.algorithm}, per device", "GiB")
            reporter.table(header, [(name, size / 2**30) for name, size in sizes.items()])
    except InputError as error:
        leave(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parser("config"))
