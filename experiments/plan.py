"""Predicts the memory of a config's reinforcement learning, before anything is downloaded or allocated.

    python experiments/plan.py --config=configs/ppo_summarize.py:gpt2 --config.ppo.microbatches=64 --devices=8
    python experiments/plan.py --config=configs/pg_tweets.py

The programs are compiled for this machine, and XLA reports their memory: a minute for GPT-2 on 2 CPU cores. Programs
for a CPU need more memory than those for a GPU or TPU, which fuse more and compute in bfloat16 without widening it. A
character tokenizer counts as printable ASCII.
"""

from launch import flags, read_config, start

from rlhf_jax import config as configs
from rlhf_jax.commands import benchmark, memory
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the batch.", lower_bound=1)
IDS = {"gpt2": 50_258, "char": benchmark.CHARACTERS.vocab_size}  # by kind of tokenizer; gpt2: its own, and PAD


def main():
    config, given = read_config()
    configs.check(config, devices=DEVICES.value, files=False)
    notes = configs.check_given(config, given)
    sharding.devices()
    ids = IDS.get(config.text.kind, config.text.vocab_size)
    with Reporter() as reporter:
        for note in notes:
            reporter.note(note)
        sizes = memory.rl(config, ids, DEVICES.value)
        header = (f"{config.algorithm}, per device", "GiB")
        reporter.table(header, [(name, size / 2**30) for name, size in sizes.items()])


if __name__ == "__main__":
    start(main, "config")
