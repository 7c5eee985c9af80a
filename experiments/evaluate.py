"""Evaluates a stage of a finished run: its texts, its reward model and its win rate, with 95% intervals.

    python experiments/evaluate.py --workdir=runs/demo
    python experiments/evaluate.py --workdir=runs/demo --stage=sft --against=reference --rows=0
    python experiments/evaluate.py --workdir=runs/demo --judge="python judge.py"
    python experiments/evaluate.py --workdir=runs/demo --judge=runs/other           # by the reward model of another run
    python experiments/evaluate.py --workdir=exported --data=rows.jsonl --judge=runs/demo
    python experiments/evaluate.py --workdir=runs/demo --endpoint=http://127.0.0.1:8000/v1 --model=NAME

Results are in WORKDIR/evaluation/STAGE.json. The same command goes on where it was interrupted, and asks a program or
an endpoint only what it has not answered yet. WORKDIR may be a folder that export_hf.py or transformers wrote.

A program reads a line of JSON, {"prompt", "a", "b"}, and answers {"winner": "a", "b" or "tie"}. An endpoint's key is
read from the environment variable RLHF_JAX_JUDGE_KEY.
"""

import dataclasses

from launch import WORKDIR, flags, start

from rlhf_jax.commands import evaluate, report
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

DEFAULT = evaluate.Settings()
DATA = flags.DEFINE_string("data", None, "File of rows with a prompt, and perhaps a label; default: the run's own.")
ENDPOINT = flags.DEFINE_string("endpoint", None, "URL of an OpenAI-compatible judge.")
MODEL = flags.DEFINE_string("model", None, "Its model.")
flags.DEFINE_string("stage", DEFAULT.stage, "Whose policy: ppo, sft, ...; default: the last finished one.")
flags.DEFINE_string(
    "against", DEFAULT.against, "A stage, another run or model, or reference; default: the stage before."
)
flags.DEFINE_string(
    "judge",
    DEFAULT.judge,
    "learned, judge, gold, sentiment, rouge, FILE.py:FUNCTION, a reward model's folder, a command.",
)
flags.DEFINE_integer("rows", DEFAULT.rows, "Most held-out rows; 0: all.")
flags.DEFINE_float("temperature", DEFAULT.temperature, "0: the most likely token; -1: the temperature of the run.")
flags.DEFINE_integer("seed", DEFAULT.seed, "The same seed gives the same completions and intervals.")


def main():
    names = [field.name for field in dataclasses.fields(evaluate.Settings)]
    settings = evaluate.Settings(**{name: flags.FLAGS[name].value for name in names})
    if (ENDPOINT.value is None) != (MODEL.value is None):
        raise InputError("endpoint: expected --endpoint and --model, or neither")
    endpoint = (ENDPOINT.value, MODEL.value) if ENDPOINT.value else None
    sharding.devices()
    with Reporter() as reporter:
        result = evaluate.evaluate(WORKDIR.value, settings, data=DATA.value, endpoint=endpoint, reporter=reporter)
        evaluate.show(result, reporter)
        if path := report.again(WORKDIR.value):
            reporter.note(f"also in {path}")


if __name__ == "__main__":
    start(main, "workdir")
