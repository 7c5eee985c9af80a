"""Predicts the memory of a config's PPO, before anything is downloaded or allocated.

    python experiments/plan.py --config=configs/ppo_summarize.py:gpt2 --config.ppo.microbatches=64 --devices=8

PPO's programs are compiled for this machine, and XLA reports their memory: a minute for GPT-2 on 2 CPU cores. Programs
for a CPU need more memory than those for a GPU or TPU, which fuse more and compute in bfloat16 without widening it.
"""

from absl import app, flags
from launch import CONFIG, leave, parser

from rlhf_jax import config as configs
from rlhf_jax.commands import memory
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter

DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the batch.", lower_bound=1)
GPT2_IDS = 50_258  # GPT-2's tokenizer, and PAD


def main(_):
    try:
        config = configs.parse(CONFIG.value.to_dict())
        configs.check(config, devices=DEVICES.value, files=False)
        ids = config.text.vocab_size if config.text.kind == "bpe" else GPT2_IDS
        with Reporter() as reporter:
            sizes = memory.ppo(config, ids, DEVICES.value)
            reporter.table(("PPO, per device", "GiB"), [(name, size / 2**30) for name, size in sizes.items()])
    except InputError as error:
        leave(error)


if __name__ == "__main__":
    app.run(main, flags_parser=parser("config"))
