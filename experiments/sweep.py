"""One config with other values in some fields, run after run; a table, a picture and the config of the best.

    python experiments/sweep.py --config=ppo_summarize --workdir=runs/kl --sweep="ppo.kl_coef=.02,.05,.1 seed=1:3"
    python experiments/sweep.py ... --sweep="ppo.lr=loguniform(1e-6,1e-4) ppo.clip=.1,.2" --samples=4
    python experiments/sweep.py ... --sweep=FILE.py --index=$SLURM_ARRAY_TASK_ID     # one run of a job array

The same command continues a stopped sweep. A stage that another run has finished with the same config is not repeated.
"""

from launch import WORKDIR, flags, read_config, start

from rlhf_jax.commands import sweep
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

SWEEP = flags.DEFINE_string("sweep", "", "FIELD=A,B,C FIRST:LAST loguniform(A,B), with spaces between; or a file.")
SAMPLES = flags.DEFINE_integer("samples", 1, "Draws of the random fields.", lower_bound=1)
METRIC = flags.DEFINE_string("metric", "", "Number of the summary that ranks the runs; default: the task's truth.")
LEAST = flags.DEFINE_boolean("least", False, "Whether a smaller number is better.")
INDEX = flags.DEFINE_integer("index", None, "Train only this run, from 0.", lower_bound=0)


def main():
    config, _ = read_config()
    runs = sweep.assignments(SWEEP.value, SAMPLES.value)
    devices = len(sharding.devices())
    how = {"metric": METRIC.value, "least": LEAST.value, "index": INDEX.value, "devices": devices}
    with Reporter() as reporter:
        sweep.sweep(config, WORKDIR.value, runs, reporter, **how)


if __name__ == "__main__":
    start(main, "config", "workdir")
