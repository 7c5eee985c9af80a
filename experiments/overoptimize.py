"""The over-optimization study: best-of-n and PPO at several KL coefficients, learned reward and gold over sqrt(KL).

    python experiments/overoptimize.py --config=configs/ppo_summarize.py --workdir=runs/over

Fine-tuning and the reward model are trained in WORKDIR where they are not finished there, then PPO for each
coefficient and seed. The numbers are in WORKDIR/overoptimization/summary.json, the picture is beside them. The same
command continues an interrupted one.
"""

import dataclasses

from launch import flags, launch

from rlhf_jax.commands import overoptimize

DEFAULT = overoptimize.Settings()
flags.DEFINE_string("kl_coefs", DEFAULT.kl_coefs, "KL coefficients of PPO, with commas.")
flags.DEFINE_integer("seeds", DEFAULT.seeds, "Runs of PPO for each coefficient.")
flags.DEFINE_integer("n", DEFAULT.n, "Largest n of best-of-n.")
flags.DEFINE_integer("samples", DEFAULT.samples, "Samples of a prompt, at least n.")
flags.DEFINE_string("pairs", DEFAULT.pairs, "Numbers of pairs of further reward models, with commas; empty: none.")
flags.DEFINE_integer("prompts", DEFAULT.prompts, "Held-out prompts of best-of-n.")


def study(config, workdir, reporter, only=None, given=None):
    names = [field.name for field in dataclasses.fields(overoptimize.Settings)]
    settings = overoptimize.Settings(**{name: flags.FLAGS[name].value for name in names})
    overoptimize.show(overoptimize.study(config, workdir, settings, reporter), reporter)


if __name__ == "__main__":
    launch(task="summarize", job=study)
