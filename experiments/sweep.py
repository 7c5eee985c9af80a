"""One config with other values in some fields, run after run; a table, a picture and the config of the best.

    python experiments/sweep.py --config=ppo_summarize --workdir=runs/kl --sweep="ppo.kl_coef=.02,.05,.1 seed=1:3"
    python experiments/sweep.py ... --sweep="ppo.lr=loguniform(1e-6,1e-4) ppo.clip=.1,.2" --samples=4
    python experiments/sweep.py ... --sweep=FILE.py --index=$SLURM_ARRAY_TASK_ID     # one run of a job array
    python experiments/sweep.py ... --processes=4     # runs at once
    python experiments/sweep.py ... --halving=3 --config.ppo.schedule=constant     # the best third goes on

The same command continues a stopped sweep. A stage that another run has finished with the same config is not repeated.
"""

import sys
from pathlib import Path

from launch import WORKDIR, flags, read_config, start

from rlhf_jax.commands import sweep
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

SWEEP = flags.DEFINE_string("sweep", "", "FIELD=A,B,C FIRST:LAST loguniform(A,B), with spaces between; or a file.")
HALVING = flags.DEFINE_integer("halving", 0, "Successive halving: the best 1/N go on with N times the steps; 0: off.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Runs at once on this machine.", lower_bound=1)
SAMPLES = flags.DEFINE_integer("samples", 1, "Draws of the random fields.", lower_bound=1)
METRIC = flags.DEFINE_string("metric", "", "Number of the summary that ranks the runs; default: the task's truth.")
LEAST = flags.DEFINE_boolean("least", False, "Whether a smaller number is better.")
INDEX = flags.DEFINE_integer("index", None, "Train only this run, from 0.", lower_bound=0)


def main():
    config, _ = read_config()
    # Without --sweep: the config file's own function `sweep`.
    runs = sweep.assignments(SWEEP.value or flags.FLAGS["config"].config_filename, SAMPLES.value)
    how = {"metric": METRIC.value, "least": LEAST.value, "index": INDEX.value, "halving": HALVING.value}
    if PROCESSES.value > 1:
        how |= {"processes": PROCESSES.value, "start": begin}
        if INDEX.value is not None:
            raise InputError("--processes: expected none with --index, which is one run")
    else:
        how["devices"] = len(sharding.devices())
    with Reporter() as reporter:
        sweep.sweep(config, WORKDIR.value, runs, reporter, **how)


def begin(index):
    """One run as a process of its own, with its output beside its workdir."""
    import subprocess

    log = sweep.place(Path(WORKDIR.value).expanduser(), index).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, *sys.argv, "--processes=1", f"--index={index}"]
    with open(log, "a") as file:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    start(main, "config", "workdir")
