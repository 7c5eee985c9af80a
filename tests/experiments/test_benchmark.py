"""The benchmark as a person runs it, on a model that compiles in seconds."""

import json
import shlex
import sys

import pytest

SCRIPT = "experiments/benchmark.py"
# The same command with one more shape.
SMALL = """
import runpy
from rlhf_jax.commands import benchmark
from rlhf_jax.algorithms import policy_gradient
from rlhf_jax.models import decoder
sizes = {"vocab_size": benchmark.CHARACTERS.vocab_size, "context": 9}
model = decoder.Config(layers=1, heads=1, head_size=4, width=8, **sizes)
benchmark.SHAPES["small"] = benchmark.Shape("small", model, 4, 5, policy_gradient.Config(batch=4))
benchmark.PRODUCT_SIZE["cpu"] = 64
%s
runpy.run_path("experiments/benchmark.py", run_name="__main__")
"""


# What takes seconds, left out.
NOTHING = """
benchmark.compile_times = lambda programs: {}
benchmark._time = lambda timed, state, *_: (state, [{"iteration": 1.0}])
"""


@pytest.fixture
def small(tmp_path):
    """small(what else is changed) -> the command."""

    def small(changes=""):
        (tmp_path / "small.py").write_text(SMALL % changes)
        return str(tmp_path / "small.py")

    return small


def peer(code):
    return f"--peer={shlex.join([sys.executable, '-c', code])}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "shape"),
        (["--shape=huge"], "shape: expected tiny, tiny-rloo, tiny-grpo, gpt2, gpt2-tldr, tweets, stories; got 'huge'"),
        (["--shape=tiny", "--iterations=0"], "iterations: expected at least 1, got 0"),
        (["--shape=tiny", "--iterations=some"], "iterations"),
        (["--shape=tiny", "--rounds=0", "--peer=true"], "rounds: expected at least 1, got 0"),
        (["--shape=tiny", "--dtype=int8"], "dtype: expected float32 or bfloat16, got 'int8'"),
        (["--shape=tiny", "--peer=no-such-program"], "peer: expected a program that exists"),
        (["--shape=tiny", "--peer="], "peer: expected a program that exists"),
        (
            ["--shape=tiny", "--out=nowhere/x"],
            "out: expected a file in a folder that exists, got nowhere/x",
        ),
        (["--shape=tiny", "more"], "more: expected only --flags"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(flags, words, forks):
    result = forks(SCRIPT, *flags)
    assert (result.code, result.err.count("\n"), result.out) == (2, 1, ""), result.err
    assert result.err.startswith("benchmark.py: ") and words in result.err


def test_a_table_then_a_line_as_the_peers(forks, small, tmp_path):
    flags = ["--shape=small", "--iterations=1", "--rounds=1", f"--out={tmp_path / 'out.json'}"]
    result = forks(small(), *flags, peer("print('{\"seconds_per_iteration\": 3600}')"))
    assert result.code == 0 and result.err == "", result.err
    *table, last = result.out.splitlines()
    told, whole = json.loads(last), json.loads((tmp_path / "out.json").read_text())
    assert list(told) == ["shape", "device", "seconds_per_iteration", "episodes_per_s", "response_tokens_per_s"]
    assert told == {name: whole[name] for name in told} and told["shape"] == "small"
    assert whole["peer"]["ratio"] == pytest.approx(3600 / told["seconds_per_iteration"])
    assert [line.split()[0] for line in table if line.startswith("update ")] == ["update"] * 2  # in both tables


def test_a_peer_that_fails_is_one_line(forks, small):
    result = forks(small(NOTHING), "--shape=small", peer("import sys; sys.exit('no memory')"))
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert result.err.startswith("benchmark.py: peer: expected ") and "no memory" in result.err
