"""Says which stage of a run is at fault: fine-tuning, the reward model or reinforcement learning.

    python experiments/doctor.py --workdir=runs/demo
    python experiments/doctor.py --workdir=runs/mine --judge=my_judge.py:score
    python experiments/doctor.py --workdir=runs/demo --best_of=0

Reads what the run has recorded, and what `experiments/evaluate.py` has found. Then it samples the policy that
reinforcement learning began with, and compares the best of 16 by the reward with the judge's opinion. Without a judge
(the embedded world's gold, a hold-out judge, a reward that is a function, or --judge) that part is left out.
"""

from launch import WORKDIR, flags, start

from rlhf_jax.commands import doctor, report
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

BEST_OF = flags.DEFINE_integer("best_of", doctor.N, "Samples of a prompt; 0: nothing is sampled.", lower_bound=0)
PROMPTS = flags.DEFINE_integer("prompts", doctor.PROMPTS, "Held-out prompts to sample.", lower_bound=2)
JUDGE = flags.DEFINE_string(
    "judge", "", "gold, judge, sentiment, rouge, FILE.py:FUNCTION, or the folder of a reward model; default: the run's."
)


def main():
    sharding.devices()
    with Reporter() as reporter:
        findings, trial = doctor.examine(WORKDIR.value), []
        if BEST_OF.value:
            how = {"n": BEST_OF.value, "prompts": PROMPTS.value, "judge": JUDGE.value}
            trial = doctor.best_of(WORKDIR.value, **how, reporter=reporter)
        doctor.show(findings, reporter, trial)
        if path := report.again(WORKDIR.value):
            reporter.note(f"also in {path}")


if __name__ == "__main__":
    start(main, "workdir")
