"""Says which stage of a finished run is at fault, from its recorded numbers and the ranges of healthy runs.

    python experiments/doctor.py --workdir=runs/demo

After `experiments/evaluate.py` it also judges the reward model against the length of the texts, and its calibration.
"""

from launch import WORKDIR, start

from rlhf_jax.commands import doctor
from rlhf_jax.report.console import Reporter


def main():
    findings = doctor.examine(WORKDIR.value)
    with Reporter() as reporter:
        doctor.show(findings, reporter)


if __name__ == "__main__":
    start(main, "workdir")
