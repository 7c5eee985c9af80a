"""Times one iteration of PPO, or of the article's policy gradient, phase by phase.

    python experiments/benchmark.py --shape=tiny --batch=64
    python experiments/benchmark.py --shape=gpt2 --iterations=3 --peer="other/python other.py gpt2 4" --out=gpt2.json

Shapes: tiny, gpt2 and gpt2-tldr are PPO (four models, 4 epochs of one minibatch) with 128 + 32, 256 + 48 and 512 + 53
tokens; tweets and stories are the article's. A peer is a command whose last line is JSON with "seconds_per_iteration".
With a peer, both programs run in turn for some rounds, and the ratio is printed. The last line here is such JSON, too.
"""

import json
import os
from pathlib import Path

from launch import flags, start

from rlhf_jax import command
from rlhf_jax.commands import benchmark
from rlhf_jax.errors import InputError, OutOfMemory
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

SHAPE = flags.DEFINE_string("shape", None, f"One of {', '.join(benchmark.SHAPES)}.")
ITERATIONS = flags.DEFINE_integer("iterations", 5, "Timed iterations per round; one before them is not timed.")
PEER = flags.DEFINE_string("peer", None, "Command of another program, run in turn with ours.")
ROUNDS = flags.DEFINE_integer("rounds", 2, "Rounds of both programs, with --peer.")
BATCH = flags.DEFINE_integer("batch", 0, "Episodes per iteration; 0: the shape's own.")
DTYPE = flags.DEFINE_string("dtype", "float32", f"Type of the activations: {' or '.join(benchmark.DTYPES)}.")
FUSED = flags.DEFINE_bool("fused", False, "Use cuDNN's attention: on an NVIDIA GPU, in bfloat16.")
OUT = flags.DEFINE_string("out", None, "JSON file to write all results to.")

HEADLINE = ("shape", "device", "seconds_per_iteration", "episodes_per_s", "response_tokens_per_s")


def main():
    peer, rounds = (), 1
    if PEER.value is not None:
        peer, rounds = benchmark.parse_peer(PEER.value), ROUNDS.value
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is shared with the peer
    elif flags.FLAGS["rounds"].present:
        raise InputError(f"rounds: {ROUNDS.value} has no effect without --peer")
    sharding.devices()
    shape = benchmark.shape(SHAPE.value, DTYPE.value, BATCH.value, fused=FUSED.value)
    out = Path(OUT.value).expanduser().absolute() if OUT.value else None
    if out and (not out.parent.is_dir() or out.is_dir()):
        raise InputError(f"out: expected a file in a folder that exists, got {OUT.value}")
    with Reporter() as reporter:
        try:
            result = benchmark.measure(shape, iterations=ITERATIONS.value, rounds=rounds, peer=peer, reporter=reporter)
        except (MemoryError, RuntimeError) as error:
            if not command.out_of_memory(error):
                raise
            less = f"--batch={shape.algorithm.batch} is too large for shape {shape.name} here"
            raise OutOfMemory(f"out of memory: {less} ({error})") from error
        benchmark.show(result, reporter)
    if out:
        metrics.summarize(out, result)
    print(json.dumps({name: result[name] for name in HEADLINE}))


if __name__ == "__main__":
    start(main, "shape")
