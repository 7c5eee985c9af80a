"""Finished runs side by side: config fields that differ, numbers with intervals, curves in one picture.

    python experiments/compare.py runs/demo runs/other/rloo --out=compare.png

A run is the folder of a stage (runs/demo/ppo), or a workdir: all of its algorithms. Beside the picture are the same
tables as a page and as Markdown (compare.html, compare.md). Runs that differ in their seed alone are one row together;
an algorithm with 2 tasks or more of 5 seeds each is an interquartile mean.
"""

from launch import flags, start

from rlhf_jax.commands import compare
from rlhf_jax.report.console import Reporter

OUT = flags.DEFINE_string(
    "out", "compare.png", "Picture to write: the curves over iterations, samples, seconds and KL."
)


def main(places):
    with Reporter() as reporter:
        compare.compare(places, OUT.value, reporter)


if __name__ == "__main__":
    start(main, arguments="RUN")
