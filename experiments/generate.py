"""Completes prompts with a finished run.

    python experiments/generate.py --workdir=runs/demo --prompt="SUBREDDIT: r/advice ...TL;DR:" --n=4
    python experiments/generate.py --workdir=runs/demo --prompts=prompts.jsonl --out=summaries.jsonl --scores

The file of prompts is JSONL, JSON, CSV or Parquet with a column `prompt`; its other columns are kept. The same command
continues an interrupted one. Without --out the completions are printed. --prompt="" begins a text (tweets, stories).
"""

import dataclasses

from launch import WORKDIR, flags, start

from rlhf_jax.commands import generate
from rlhf_jax.report.console import Reporter

DEFAULT = generate.Settings()
PROMPT = flags.DEFINE_string("prompt", None, "One prompt.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of prompts.")
OUT = flags.DEFINE_string("out", None, "JSONL file to write: new, or begun by the same command.")
flags.DEFINE_string("stage", DEFAULT.stage, "Whose policy: ppo, sft, ...; default: the last finished one.")
flags.DEFINE_integer("n", DEFAULT.n, "Completions of each prompt.")
flags.DEFINE_integer("max_tokens", DEFAULT.max_tokens, "Tokens of a completion, EOS included; 0: as in the run.")
flags.DEFINE_float("temperature", DEFAULT.temperature, "0: the most likely token.")
flags.DEFINE_integer("top_k", DEFAULT.top_k, "Sample from the k most likely tokens; 0: from all.")
flags.DEFINE_float("top_p", DEFAULT.top_p, "Sample from the most likely tokens of this probability; 1: from all.")
flags.DEFINE_integer("seed", DEFAULT.seed, "The same seed gives the same completions.")
flags.DEFINE_bool("scores", DEFAULT.scores, "Write the reward model's score of each completion.")
flags.DEFINE_bool("logprobs", DEFAULT.logprobs, "Write the ids and the log-probs of the tokens.")
flags.DEFINE_integer("batch", DEFAULT.batch, "Completions generated at a time.")


def main():
    names = [field.name for field in dataclasses.fields(generate.Settings)]
    settings = generate.Settings(**{name: flags.FLAGS[name].value for name in names})
    rows = generate.rows_of(PROMPT.value, PROMPTS.value)
    with Reporter() as reporter:
        results = generate.generate(WORKDIR.value, rows, settings, out=OUT.value, reporter=reporter)
        if not OUT.value:
            reporter.samples(results)


if __name__ == "__main__":
    start(main, "workdir")
