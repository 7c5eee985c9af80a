"""Counts by hand, times by a clock that is ours, peers that are commands of one line, and one whole measurement."""

import dataclasses
import json
import math
import runpy
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import rollout
from rlhf_jax.algorithms import policy_gradient, ppo
from rlhf_jax.commands import benchmark
from rlhf_jax.errors import InputError
from rlhf_jax.models import decoder
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Reporter, Silent
from rlhf_jax.rewards import function
from rlhf_jax.training import guard

CONFIGS = Path(__file__).parents[2] / "configs"
HAND = decoder.Config(layers=1, heads=1, head_size=2, width=3, context=4, vocab_size=5)
SMALL = decoder.Config(layers=1, heads=2, head_size=4, width=8, context=9, vocab_size=benchmark.CHARACTERS.vocab_size)
ALGORITHMS = {"ppo": ppo.Config(batch=4, microbatches=2), "pg": policy_gradient.Config(batch=4)}


# Counts


def test_flops_by_hand():
    """tests/models/test_cost.py: 24 FLOPs for a token's keys and values, 168 for a query, 8 for a pair, 30 for a
    projection on the vocabulary, 6 for a score or a value. Two prompt tokens and two of the response."""
    prefill = 2 * 24 + 168 + 2 * 8
    decode = 2 * 30 + (24 + 168 + 3 * 8)  # two tokens are drawn, and one of them is read
    hidden = 4 * 24 + 2 * 168 + (2 + 3) * 8  # of the tokens before those two
    value = hidden + 2 * 6
    reward = 4 * 24 + 168 + 4 * 8 + 6
    score, update = hidden + 2 * 2 * 30 + value + reward, 3 * 2 * (hidden + 2 * 30 + value)
    expected = {"prefill": 2 * prefill, "decode": 2 * decode, "score": 2 * score, "update": 2 * update}
    shape = benchmark.Shape("hand", HAND, 2, 2, ppo.Config(batch=2, epochs=2))
    assert benchmark.flops(shape) == expected | {"iteration": sum(expected.values())}
    score, update = hidden + 2 * 2 * 30, 3 * (hidden + 2 * 30)
    expected |= {"score": 2 * score, "update": 2 * update}
    shape = benchmark.Shape("hand", HAND, 2, 2, policy_gradient.Config(batch=2))
    assert benchmark.flops(shape) == expected | {"iteration": sum(expected.values())}


@pytest.mark.parametrize(("name", "arg"), [("tweets", "article"), ("stories", "made")])
def test_the_writing_shapes_are_those_of_the_configs(name, arg):
    """But for the vocabulary of stories, which is of characters here."""
    config, shape = runpy.run_path(CONFIGS / f"pg_{name}.py")["get_config"](arg), benchmark.shape(name)
    assert dataclasses.asdict(shape.model) == {**config.model, "vocab_size": benchmark.CHARACTERS.vocab_size}
    assert (shape.prompt, shape.prompt + shape.response) == (1, config.data.length)
    for field in "batch", "epochs", "microbatches", "temperature", "reward_to_go", "baseline":
        assert getattr(shape.algorithm, field) == config.policy_gradient[field]


def test_a_shape_has_the_type_that_is_asked_for():
    assert benchmark.shape("tiny").model.dtype == "float32"
    half = benchmark.shape("tiny", "bfloat16")
    assert half.model == dataclasses.replace(benchmark.shape("tiny").model, dtype="bfloat16")
    with pytest.raises(InputError, match="shape: expected tiny, tiny-rloo, tiny-grpo, gpt2, .*; got 'huge'"):
        benchmark.shape("huge")
    with pytest.raises(InputError, match="dtype: expected float32 or bfloat16, got 'float16'"):
        benchmark.shape("tiny", "float16")


@pytest.mark.parametrize(("dtype", "backend"), [("float32", "gpu"), ("bfloat16", "cpu")])
def test_fused_attention_that_would_not_be_is_refused(dtype, backend, monkeypatch):
    """Numbers of another kernel must not pass for its own."""
    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: backend)
    with pytest.raises(
        InputError, match=f"fused: expected dtype bfloat16 on an NVIDIA GPU, got {dtype} on a {backend}"
    ):
        benchmark.shape("tiny", dtype, fused=True)


def test_fused_attention_is_of_the_shape(monkeypatch):
    monkeypatch.setattr(benchmark.jax, "default_backend", lambda: "gpu")
    assert benchmark.shape("tiny", "bfloat16", fused=True).model.fuses


# Clock


def test_what_is_timed(monkeypatch):
    """One iteration that is not counted and two that are. Prefill is timed alone, before the iteration begins."""
    clock, calls = [0], []

    def takes(name, seconds, result):
        def function(*args):
            clock[0] += seconds[len(calls) // 4]
            calls.append((name, *args))
            return result

        return function

    timed = types.SimpleNamespace(
        prefill=takes("prefill", [90, 1, 2], "cache"),
        sample=takes("sample", [90, 3, 5], "drawn"),
        score=takes("score", [90, 4, 4], "scored"),
        learn=takes("learn", [90, 5, 9], ("next", {})),
    )
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    state, rows = benchmark._time(timed, "first", ("prompts", "mask"), 2)
    assert state == "next"
    assert rows == [
        {"prefill": 1, "decode": 2, "score": 4, "update": 5, "iteration": 12},
        {"prefill": 2, "decode": 3, "score": 4, "update": 9, "iteration": 18},
    ]
    assert calls[:5] == [
        ("prefill", "first", "prompts", "mask"),
        ("sample", "first", "prompts", "mask"),
        ("score", "first", ("prompts", "mask"), "drawn"),
        ("learn", "first", "scored"),
        ("prefill", "next", "prompts", "mask"),
    ]


def test_seconds_become_rates():
    """Batch 2, 2 + 2 tokens; the median of 1, 2 and 9 seconds is 2; a step reads 153 numbers and 2 x 4 x 3 cached."""
    shape = benchmark.Shape("hand", HAND, 2, 2, policy_gradient.Config(batch=2))
    rows = [dict.fromkeys((*benchmark.PHASES, "iteration"), seconds) for seconds in (1, 9, 2)]
    result = benchmark._result(shape, rows, benchmark.Rates(product=100.0, copy=59.0))
    assert result["phases"]["iteration"]["seconds"] == {"median": 2, "min": 1, "max": 9}
    assert [result["phases"][name]["tokens_per_s"] for name in ("prefill", "decode", "score", "update")] == [2, 2, 4, 4]
    flops = benchmark.flops(shape)
    assert result["phases"]["update"]["flops_per_s"] == flops["update"] / 2
    assert result["phases"]["update"]["of_product_rate"] == flops["update"] / 200
    assert result["arithmetic_seconds"] == flops["iteration"] / 100
    told = [result[name] for name in ("seconds_per_iteration", "episodes_per_s", "response_tokens_per_s")]
    assert told == [2, 1, 2]
    assert result["decode"] == {"bytes_per_step": 4 * (153 + 24), "bytes_per_s": 2 * 177, "of_copy_rate": 6}


# Peer


def python(code):
    return [sys.executable, "-c", code]


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_the_peer_runs_in_turn_with_ours(tmp_path):
    """It takes 3 seconds an iteration, then 8, as it says; we take 2 each time: 1.5 and 4 times as long."""
    log, reporter = tmp_path / "log", Notes()
    code = f"log = open({str(log)!r}, 'a+'); log.seek(0); n = log.read().count('peer'); log.write('peer '); "
    peer = python(code + "print('hello'); print('{\"seconds_per_iteration\": %d}' % (3, 8)[n])")

    def ours():
        with open(log, "a") as file:
            file.write("ours ")
        return 2.0

    compared = benchmark.in_turn(ours, peer, 2, reporter)
    assert log.read_text() == "ours peer ours peer "
    assert compared["ours"] == [2, 2] and compared["seconds_per_iteration"] == [3, 8]
    assert compared["ratios"] == [1.5, 4] and compared["ratio"] == 2.75
    assert benchmark.parse_peer(compared["command"]) == peer
    assert reporter.notes == [
        "round 1 of 2: 2 s an iteration, the peer 3 s: 1.50 times as long",
        "round 2 of 2: 2 s an iteration, the peer 8 s: 4.00 times as long",
    ]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import sys; print('{\"seconds_per_iteration\": 1}'); sys.exit('out of memory')", "code 1, .*out of memory"),
        ("import sys; sys.stderr.write('no\\n  GPU')", "code 0, its last line '', its errors end with: no GPU$"),
        ("print('{\"seconds_per_iteration\": 1}'); print('bye')", "its last line 'bye'"),
        ("print('[1]')", "its last line '.1.'"),
        ("print('{\"seconds\": 1}')", "seconds_per_iteration"),
        ("print('{\"seconds_per_iteration\": 0}')", "seconds_per_iteration"),
        ("print('{\"seconds_per_iteration\": NaN}')", "seconds_per_iteration"),
        ("print('{\"seconds_per_iteration\": null}')", "seconds_per_iteration"),
    ],
)
def test_a_peer_that_fails_or_says_no_seconds_is_one_line(code, told):
    with pytest.raises(InputError, match=told) as caught:
        benchmark.peer_seconds(python(code))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("peer: expected ")


@pytest.mark.parametrize("line", ["", "no-such-program --fast", "'half a quote"])
def test_a_peer_that_is_not_there_is_told_before_anything_runs(line):
    with pytest.raises(InputError, match="peer: expected a "):
        benchmark.parse_peer(line)


# All of it


@pytest.fixture(scope="module")
def measured():
    """One counted iteration of the smallest model, beside a peer that takes an hour: (result, notes)."""
    shape = benchmark.Shape("small", SMALL, 4, 5, ALGORITHMS["ppo"])
    peer, notes = python("print('{\"seconds_per_iteration\": 3600}')"), Notes()
    cache = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "PRODUCT_SIZE", {"cpu": 64})
        result = benchmark.measure(shape, iterations=1, rounds=1, peer=peer, reporter=notes)
    assert jax.config.jax_compilation_cache_dir == cache
    return result, notes.notes


def numbers(tree):
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


def test_everything_is_there_and_finite(measured, tmp_path):
    result, notes = measured
    metrics.summarize(tmp_path / "out.json", result)
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "machine", "sizes", "shape", "device", "dtype", "peer", "memory"} <= result.keys()
    assert result["phases"].keys() == {"prefill", "decode", "score", "update", "iteration"}
    assert result["programs"].keys() == {"prefill", "draw", "judge", "reward", "update"}
    for program in result["programs"].values():
        assert program.keys() == {"compile_seconds", "compile_seconds_cached", "temp_bytes"}
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["product_flops_per_s"] > 0 and result["memory"]["process_peak_bytes"] > 1e8
    assert result["peer"]["ratio"] == pytest.approx(3600 / result["seconds_per_iteration"])
    assert notes[0].startswith("small: 4 x (4 + 5) tokens, 1 layers of 8, 2 microbatches, float32 on ")
    assert result["sizes"]["algorithm"]["microbatches"] == 2


def test_the_phases_are_the_iteration(measured):
    """Of one iteration the median is its own; what is between the phases is little."""
    phases = {name: phase["seconds"]["median"] for name, phase in measured[0]["phases"].items()}
    whole = phases.pop("iteration")
    assert 0.5 * whole < sum(phases.values()) <= whole


def test_each_program_is_compiled_and_then_found(compilations):
    """Nothing is there at first; the second time nothing is left in the process, and the program is read."""
    found = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    double = jax.jit(lambda x: 2 * x)
    programs = {"double": (double, (jax.ShapeDtypeStruct((3,), np.float32),))}
    jax.monitoring.register_event_listener(listen)
    with benchmark._empty_cache():
        folder = Path(jax.config.jax_compilation_cache_dir)
        assert not list(folder.iterdir())
        with compilations() as names:
            times = benchmark.compile_times(programs)
        assert len(list(folder.glob("*-cache"))) == 1
    jax.monitoring.unregister_event_listener(listen)
    assert names == ["<lambda>"] * 2 and len(found) == 1
    assert 0 < times["double"]["compile_seconds"] < 9 and 0 < times["double"]["compile_seconds_cached"] < 9


def test_the_cache_saves_what_the_compiler_does(measured):
    update = measured[0]["programs"]["update"]
    assert update["compile_seconds_cached"] < 0.8 * update["compile_seconds"]


def test_it_is_shown(measured, capsys):
    with Reporter() as reporter:
        benchmark.show(measured[0], reporter)
    told = capsys.readouterr().out
    for word in "prefill", "iteration", "MB a step", "GFLOP/s) an iteration would take", "peak memory: process":
        assert word in told
    assert f"the peer takes {measured[0]['peer']['ratio']:.2f} times as long" in told


@pytest.mark.parametrize("name", ["ppo", "pg"])
def test_an_iteration_learns_as_a_stage_does(name):
    """The reward of the article's is that of its texts, all is finite, and the policy moves."""
    timed = benchmark.Timed(benchmark.Shape("small", SMALL, 4, 5, ALGORITHMS[name]))
    state, prompts = timed.begin(jax.random.key(0))
    before = np.asarray(state.policy["wte"]["embedding"])
    drawn = timed.sample(state, *prompts)
    if name == "pg":
        timed.reward = function.Function(lambda texts: [len(text) for text in texts], "length")
    scored = timed.score(state, prompts, drawn)
    if name == "ppo":
        expected_B = rollout.score(timed.iteration.apply, state.reward, scored, timed.iteration.sampling)
        np.testing.assert_allclose(scored.score_B, expected_B, rtol=1e-5, atol=1e-6)
    else:
        ids = [row.tolist() for row in np.asarray(drawn.response_BR)]
        assert scored.score_B.tolist() == [len(benchmark.CHARACTERS.decode(row).strip()) for row in ids]
    assert np.isfinite(scored.score_B).all() and np.isfinite(scored.kl_exact_BR).all()
    state, told = timed.learn(state, scored)
    assert (int(state.step), int(state.skipped)) == (1, 0)
    assert np.abs(np.asarray(state.policy["wte"]["embedding"]) - before).max() > 0
    assert all(np.isfinite(value) for value in told.values())


def test_no_response_ends_early():
    """Nor would it of a vocabulary of two, whichever of them were the one that ends it."""
    two = dataclasses.replace(SMALL, vocab_size=2)
    timed = benchmark.Timed(benchmark.Shape("two", two, 4, 5, ALGORITHMS["ppo"]))
    state, prompts = timed.begin(jax.random.key(0))
    drawn = timed.sample(state, *prompts)
    assert set(np.unique(drawn.response_BR)) == {0, 1} and drawn.mask_BR.all() and not drawn.done_B.any()


def test_the_article_is_rewarded_by_its_sentiment():
    timed = benchmark.Timed(benchmark.Shape("small", SMALL, 4, 5, ALGORITHMS["pg"]))
    state, prompts = timed.begin(jax.random.key(0))
    happy = benchmark.CHARACTERS.encode("happy")
    drawn = timed.sample(state, *prompts).replace(response_BR=np.array([happy] * 4, np.int32))
    np.testing.assert_allclose(timed.score(state, prompts, drawn).score_B, [0.5719] * 4)


def test_the_memory_of_a_device_that_counts_it(monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7, "bytes_in_use": 3})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert benchmark._memory()["device_peak_bytes"] == 7
    device.memory_stats = lambda: None
    assert benchmark._memory().keys() == {"process_peak_bytes"}


def test_what_is_not_finite_is_no_measurement(monkeypatch):
    monkeypatch.setattr(benchmark, "PRODUCT_SIZE", {"cpu": 64})
    monkeypatch.setattr(benchmark, "compile_times", lambda programs: {})
    left_out = types.SimpleNamespace(skipped=1)
    monkeypatch.setattr(benchmark, "_time", lambda *args: (left_out, [{"iteration": 1.0}]))
    with pytest.raises(guard.NonFinite, match="small: the update is not finite"):
        benchmark.measure(benchmark.Shape("small", SMALL, 4, 5, ALGORITHMS["pg"]), iterations=1)


@pytest.mark.parametrize(("name", "value"), [("iterations", 0), ("rounds", -1)])
def test_a_number_that_cannot_be(name, value):
    with pytest.raises(InputError, match=f"{name}: expected at least 1, got {value}"):
        benchmark.measure(benchmark.shape("tiny"), **{"iterations": 1, "rounds": 1, name: value})


def test_another_batch():
    assert benchmark.shape("tiny", batch=64).algorithm.batch == 64
    assert benchmark.shape("tiny").algorithm.batch == 32
    with pytest.raises(InputError, match="batch: expected a multiple of 8, got 12"):
        benchmark.shape("gpt2-tldr", batch=12)
