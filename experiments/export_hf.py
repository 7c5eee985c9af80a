"""Exports a finished stage of a run as a folder that transformers loads: weights, tokenizer, model card.

    python experiments/export_hf.py --workdir=runs/demo --out=exported/policy
    python experiments/export_hf.py --workdir=runs/demo --out=exported/reward --stage=reward
    python experiments/export_hf.py --workdir=runs/lora --out=exported/adapter --adapter

The default stage is the last finished one with a policy. The folder must be new or empty.
"""

from launch import WORKDIR, flags, start

from rlhf_jax.commands.export import export
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

OUT = flags.DEFINE_string("out", None, "Folder to write, new or empty.")
STAGE = flags.DEFINE_string("stage", "", "ppo, policy_gradient, rl, reward, sft or pretrain.")
ADAPTER = flags.DEFINE_bool("adapter", False, "Write a policy's adapters, as a folder for peft, not merged.")


def main():
    sharding.devices()
    stage = export(WORKDIR.value, OUT.value, STAGE.value, ADAPTER.value)
    with Reporter() as reporter:
        reporter.note(f"{stage}: written to {OUT.value}")


if __name__ == "__main__":
    start(main, "workdir", "out")
