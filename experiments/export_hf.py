"""Exports a finished stage of a run as a folder that transformers loads: weights, tokenizer, model card.

    python experiments/export_hf.py --workdir=runs/demo --out=exported/policy
    python experiments/export_hf.py --workdir=runs/demo --out=exported/reward --stage=reward

The default stage is the last finished one with a policy. The folder must be new or empty.
"""

from absl import app, flags, logging
from launch import WORKDIR, leave, parser

from rlhf_jax.commands.export import export
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter

OUT = flags.DEFINE_string("out", None, "Folder to write, new or empty.")
STAGE = flags.DEFINE_string("stage", "", "ppo, policy_gradient, rl, reward, sft or pretrain.")


def main(_):
    logging.set_verbosity(logging.FATAL)  # Orbax logs every file it reads; its errors are raised as well
    try:
        stage = export(WORKDIR.value, OUT.value, STAGE.value)
    except InputError as error:
        leave(error)
    with Reporter() as reporter:
        reporter.note(f"{stage}: written to {OUT.value}")


if __name__ == "__main__":
    app.run(main, flags_parser=parser("workdir", "out"))
