"""Times one iteration of reinforcement learning, and compares it with the time that its arithmetic needs.

The functions that are timed are those of the stages (stages/rl.py: Iteration), on random weights and random tokens, on
one device. No response ends early. An iteration is sampling (prefill, decode), scoring (judge, then the reward) and the
update, each awaited before the next. The reward is learned; that of the article's policy gradient is the sentiment of
texts.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from rlhf_jax import generate, jsonfile, rollout, text
from rlhf_jax.algorithms import POLICY, grpo, policy, policy_gradient, ppo, rloo
from rlhf_jax.errors import InputError
from rlhf_jax.models import cost, decoder, families, heads
from rlhf_jax.report import metrics
from rlhf_jax.report.console import Silent
from rlhf_jax.rewards import function, learned
from rlhf_jax.stages import rl
from rlhf_jax.text import char
from rlhf_jax.training import guard

DTYPES = ("float32", "bfloat16")
PHASES = ("prefill", "decode", "score", "update")
CHARACTERS = char.CharTokenizer("".join(map(chr, range(32, 127))))  # printable ASCII
PRODUCT_SIZE = {"cpu": 2_048}  # rows of the square matrices whose product is timed, about .1 s
LARGE_PRODUCT = 8_192  # rows on other devices, about 2 ms
COPIED = {"cpu": 16 * 2**20}  # float32 numbers whose copy is timed, about .02 s
MANY_COPIED = 512 * 2**20  # on other devices
TIMES = 9  # repetitions of each timed product and copy
TAIL = 300  # characters of a failed peer's output that are shown


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of an iteration. Batch, epochs, minibatches and microbatches are in the algorithm's config."""

    name: str
    model: decoder.Config
    prompt: int  # tokens of a prompt
    response: int  # tokens of a response
    algorithm: policy.Config


def _learned(name, layers, heads, width, vocab_size, prompt, response, algorithm=ppo, **config):
    """An iteration with a learned reward."""
    sizes = {"layers": layers, "heads": heads, "head_size": width // heads, "width": width, "vocab_size": vocab_size}
    model = decoder.Config(**sizes, context=prompt + response)
    return Shape(name, model, prompt, response, algorithm.Config(**config))


def _article(name, length, **algorithm):
    """The article's policy gradient on `length` characters, of which the first is the prompt."""
    sizes = {"heads": 4, "head_size": 32, "context": length, "vocab_size": CHARACTERS.vocab_size, "init_std": 0.08}
    return Shape(name, families.preset("micro", **sizes), 1, length - 1, policy_gradient.Config(**algorithm))


SHAPES = {
    shape.name: shape
    for shape in (
        _learned("tiny", 4, 4, 128, 2_048, 128, 32, batch=32),
        _learned("tiny-rloo", 4, 4, 128, 2_048, 128, 32, rloo, batch=32),
        _learned("tiny-grpo", 4, 4, 128, 2_048, 128, 32, grpo, batch=32),
        _learned("gpt2", 12, 12, 768, 50_257, 256, 48, batch=4),
        # 16 GB; 100 GB without microbatches
        _learned("gpt2-tldr", 12, 12, 768, 50_257, 512, 53, batch=64, microbatches=8),
        _article("tweets", 32, batch=32, reward_to_go=False, baseline="none"),
        _article("stories", 64, batch=64),
    )
}


def shape(name, dtype="float32", batch=0, *, fused=False):
    """The named Shape with activations of `dtype`, `batch` episodes (0: its own) and, if `fused`, cuDNN's attention.

    Raises InputError for an unknown name or type, or a batch or attention that is not possible.
    """
    if name not in SHAPES:
        raise InputError(f"shape: expected {', '.join(SHAPES)}; got {name!r}")
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    known = SHAPES[name]
    config, slices = known.algorithm, known.algorithm.minibatches * known.algorithm.microbatches
    if batch < 0 or batch % slices:
        raise InputError(f"batch: expected a multiple of {slices}, got {batch}")
    config = dataclasses.replace(config, batch=batch or config.batch)
    model = dataclasses.replace(known.model, dtype=dtype, fused=fused)
    if fused and not model.fuses:
        raise InputError(f"fused: expected dtype bfloat16 on an NVIDIA GPU, got {dtype} on a {jax.default_backend()}")
    return dataclasses.replace(known, model=model, algorithm=config)


def algorithm_of(config):
    """The algorithm of a section of the config."""
    return next(each for each in POLICY.values() if type(config) is each.Config)


def has_reward(config):
    """Whether the reward is a reward model; the article's policy gradient has the sentiment of texts."""
    return algorithm_of(config) is not policy_gradient


class Timed:
    """The functions that are timed, and the arrays that they start from."""

    def __init__(self, shape, chunk=heads.LanguageModel.chunk):
        self.shape, config = shape, shape.algorithm
        apply = rollout.Apply(heads.LanguageModel(shape.model, chunk), heads.ScalarModel(shape.model))
        sampling = generate.Sampling(
            max_tokens=shape.response,
            eos_id=shape.model.vocab_size,  # never sampled
            pad_id=0,
            temperature=config.temperature,
            group=config.group,
        )
        self.iteration = rl.Iteration(algorithm_of(config), config, apply, sampling)
        self.reward = learned.Learned(apply, None, sampling) if has_reward(config) else function.load("sentiment")
        self.prefill, self.sample, self.learn = jax.jit(self._prefill), self.iteration.sample, self.iteration.learn

    def begin(self, key):
        """(state before the first step, (prompt_BP, prompt_mask_BP))."""
        shape, apply = self.shape, self.iteration.apply
        policy_key, reward_key, prompt_key, key = jax.random.split(key, 4)
        policy = jax.jit(apply.policy.init)(policy_key)
        size, ids = (shape.algorithm.batch, shape.prompt), shape.model.vocab_size
        prompt_BP = jax.random.randint(prompt_key, size, 0, ids, jnp.int32)
        prompt_BP = jnp.repeat(prompt_BP[:: shape.algorithm.group], shape.algorithm.group, axis=0)
        reward = None if self.reward.on_host else apply.scalar.init(reward_key, policy)
        state = self.iteration.begin(policy, key, value=reward, reward=reward)
        return state, (prompt_BP, jnp.ones_like(prompt_BP, bool))

    def _prefill(self, state, prompt_BP, mask_BP):
        slots = self.shape.prompt + self.shape.response
        group = self.shape.algorithm.group
        return self.iteration.apply.policy.prefill(state.policy, prompt_BP[::group], mask_BP[::group], slots)

    def score(self, state, prompts, drawn):
        """The scored Rollout."""
        return self.iteration.score(state, prompts, drawn, self.reward, (), _texts)[0]

    def programs(self):
        """{name: (function, the shapes of its arguments)}, without computing anything."""
        state, prompts = jax.eval_shape(self.begin, jax.random.key(0))
        prefill = {"prefill": (self.prefill, (state, *prompts))}
        return prefill | self.iteration.programs(state, prompts, self.reward)


_texts = functools.partial(text.responses, CHARACTERS)


def flops(shape):
    """{phase: FLOPs of its matrix products, "iteration": their sum}; models/cost.py defines what is counted.

    Decoding computes the logits of every response token and reads all but the last. Scoring computes the reference's
    hidden states and both models' logits, the reward model and, with PPO, the value model. The prompt of a group is
    read once.
    """
    model, config = shape.model, shape.algorithm
    P, R, T = shape.prompt, shape.response, shape.prompt + shape.response
    logits = R * cost.logits(model)
    hidden = cost.trunk(model, T, P - 1, R)  # before each response token
    counts = {
        "prefill": cost.trunk(model, P, P - 1, 1) / config.group,
        "decode": logits + sum(cost.step(model, seen) for seen in range(P, T - 1)),
        "score": hidden + 2 * logits,
        "update": hidden + logits,
    }
    if has_reward(config):
        counts["score"] += cost.trunk(model, T, T - 1, 1) + cost.scalar(model)
    if algorithm_of(config).NEEDS_VALUE:
        values = hidden + R * cost.scalar(model)
        counts["score"] += values
        counts["update"] += values
    counts["update"] *= 3 * config.epochs  # forward and backward
    counts = {phase: config.batch * count for phase, count in counts.items()}
    return counts | {"iteration": sum(counts.values())}


def measure(shape, *, iterations, rounds=1, peer=(), reporter=None):
    """Measures `iterations` iterations in each of `rounds` rounds: a nested dict, which `show` prints.

    peer is the command of another program, as a list; it runs after each of our rounds (see `peer_seconds`). The
    process's compiled functions are cleared, so that compile times are real. Raises InputError for a number below 1 or
    a peer that fails, and NonFinite for an update that is not finite.
    """
    for name, value in (("iterations", iterations), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    reporter = reporter or Silent()
    timed = Timed(shape)
    device = rates(shape.model.dtype)
    speed = f"a large matrix product runs at {device.product / 1e9:.0f} GFLOP/s, a copy at {device.copy / 1e9:.0f} GB/s"
    reporter.note(f"{shape.name}: {_described(shape)}; {speed}")
    with _empty_cache():
        programs = compile_times(timed.programs())
        reporter.note(f"compiled in {sum(program['compile_seconds'] for program in programs.values()):.1f} s")
        state, prompts = timed.begin(jax.random.key(0))
        rows = []

        def ours():
            nonlocal state
            state, seconds = _time(timed, state, prompts, iterations)
            rows.extend(seconds)
            return statistics.median(row["iteration"] for row in seconds)

        compared = in_turn(ours, peer, rounds, reporter)
    if int(state.skipped):
        raise guard.NonFinite(f"{shape.name}: the update is not finite")
    result = _result(shape, rows, device) | {"programs": programs, "memory": _memory()} | metrics.environment()
    return result | ({"peer": compared} if peer else {})


def _described(shape):
    model, config = shape.model, shape.algorithm
    sizes = f"{config.batch} x ({shape.prompt} + {shape.response}) tokens, {model.layers} layers of {model.width}"
    parts = f"{config.microbatches} microbatches, " if config.microbatches > 1 else ""
    return f"{sizes}, {parts}{model.dtype} on {jax.default_backend()}"


class Rates(NamedTuple):
    """Rates that the device reaches in simple programs."""

    product: float  # FLOPs per second of a large square matrix product
    copy: float  # bytes per second, reads and writes, of the copy of a large array


def rates(dtype):
    """The Rates of this device: medians of TIMES runs."""
    size = PRODUCT_SIZE.get(jax.default_backend(), LARGE_PRODUCT)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = 2 * size**3 / _median_seconds(jnp.matmul, x, x)
    x = jnp.zeros(COPIED.get(jax.default_backend(), MANY_COPIED), jnp.float32)
    return Rates(product, 2 * x.nbytes / _median_seconds(jnp.negative, x))


def _median_seconds(function, *args):
    function = jax.jit(function)
    jax.block_until_ready(function(*args))
    return statistics.median(_seconds(function, *args)[0] for _ in range(TIMES))


def _seconds(function, *args):
    """(seconds until the result was computed, the result)."""
    began = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - began, result


@contextlib.contextmanager
def _empty_cache():
    """Uses an empty persistent compilation cache, and restores the configuration afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        ours = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in ours}
        try:
            _configure(ours)
            yield
        finally:
            _configure(before)


def _configure(values):
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # the folder is read once, by the first compilation


def compile_times(programs):
    """{name: {"compile_seconds", "compile_seconds_cached" as at a second start, "temp_bytes" of temporary arrays}}.

    programs as Timed.programs gives them. Tracing and lowering are in both times.
    """
    times: dict[str, dict[str, float]] = {name: {} for name in programs}
    for kind in "compile_seconds", "compile_seconds_cached":
        jax.clear_caches()  # what is left is the persistent cache
        for name, (compiled, args) in programs.items():
            began = time.perf_counter()
            program = compiled.lower(*args).compile()
            times[name][kind] = time.perf_counter() - began
            if memory := program.memory_analysis():  # not every backend has it
                times[name]["temp_bytes"] = memory.temp_size_in_bytes
    return times


def _time(timed, state, prompts, count):
    """(state, rows of seconds) of `count` iterations; one more before them is not counted."""
    rows = []
    for _ in range(count + 1):
        prefill = _seconds(timed.prefill, state, *prompts)[0]
        began = time.perf_counter()
        draw, drawn = _seconds(timed.sample, state, *prompts)
        score, scored = _seconds(timed.score, state, prompts, drawn)
        update, (state, _) = _seconds(timed.learn, state, scored)
        whole = time.perf_counter() - began
        seconds = {"prefill": prefill, "decode": draw - prefill, "score": score, "update": update}
        rows.append(seconds | {"iteration": whole})
    return state, rows[1:]


def _result(shape, rows, device):
    """The rates that follow from the seconds. tokens_per_s counts each token that a phase reads or writes once."""
    config, counts = shape.algorithm, flops(shape)
    P, R, T = shape.prompt, shape.response, shape.prompt + shape.response
    tokens = {"prefill": P, "decode": R}
    phases = {}
    for name in (*PHASES, "iteration"):
        seconds = [row[name] for row in rows]
        median = statistics.median(seconds)
        phases[name] = {
            "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
            "tokens_per_s": config.batch * tokens.get(name, T) / median,
            "episodes_per_s": config.batch / median,
            "flops": counts[name],
            "flops_per_s": counts[name] / median,
            "of_product_rate": counts[name] / median / device.product,
        }
    steps = [cost.step_bytes(shape.model, config.batch, seen + 1) for seen in range(P, T - 1)]
    bytes_per_s = sum(steps) / phases["decode"]["seconds"]["median"]
    median = phases["iteration"]["seconds"]["median"]
    return {
        "shape": shape.name,
        "sizes": dataclasses.asdict(shape),
        "device": jax.default_backend(),
        "dtype": shape.model.dtype,
        "iterations": len(rows),
        "seconds_per_iteration": median,
        "episodes_per_s": config.batch / median,
        "response_tokens_per_s": config.batch * R / median,
        "product_flops_per_s": device.product,
        "copy_bytes_per_s": device.copy,
        "arithmetic_seconds": counts["iteration"] / device.product,
        "phases": phases,
        "decode": {
            "bytes_per_step": statistics.mean(steps),
            "bytes_per_s": bytes_per_s,
            "of_copy_rate": bytes_per_s / device.copy,
        },
    }


def _memory():
    """Peak memory until now: {"process_peak_bytes", and "device_peak_bytes" if the device counts it}."""
    process, device = metrics.peak_memory()
    return {"process_peak_bytes": process} | ({} if device is None else {"device_peak_bytes": device})


def in_turn(ours, peer, rounds, reporter):
    """Seconds per iteration in alternating rounds of ours and the peer's, so that load on the machine affects both.

    ours() runs one of our rounds and returns its seconds. A ratio is the peer's seconds over ours. Without a peer only
    our rounds run.
    """
    seconds: dict[str, list[float]] = {"seconds_per_iteration": [], "ours": [], "ratios": []}
    for i in range(rounds):
        our = ours()
        seconds["ours"].append(our)
        message = f"round {i + 1} of {rounds}: {our:.4g} s an iteration"
        if peer:
            their = peer_seconds(peer)
            seconds["seconds_per_iteration"].append(their)
            seconds["ratios"].append(their / our)
            message += f", the peer {their:.4g} s: {their / our:.2f} times as long"
        reporter.note(message)
    compared = {"command": shlex.join(peer)} | seconds
    return compared | {"ratio": statistics.median(seconds["ratios"])} if peer else compared


def parse_peer(line):
    """Splits a command line into the list that `measure` takes. Raises InputError if there is no such program."""
    try:
        command = shlex.split(line)
    except ValueError as error:
        raise InputError(f"peer: expected a command, got {line!r} ({error})") from None
    if not command or not shutil.which(command[0]):
        raise InputError(f"peer: expected a program that exists, got {line!r}")
    return command


def peer_seconds(command):
    """Runs another program and returns the seconds per iteration that it reports.

    The last line that it prints must be a JSON object with "seconds_per_iteration". Raises InputError, with the end of
    its error output, if it fails or prints no such line.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        seconds = float(jsonfile.parse(last)["seconds_per_iteration"])
    except (ValueError, TypeError, KeyError):
        seconds = math.nan
    if done.returncode == 0 and 0 < seconds < math.inf:
        return seconds
    output = f"exit code {done.returncode}, its last line {last[:TAIL]!r}"
    if errors := " ".join(done.stderr.split()):
        output += f", its errors end with: {errors[-TAIL:]}"
    raise InputError(f'peer: expected {shlex.join(command)} to print JSON with "seconds_per_iteration"; {output}')


def show(result, reporter):
    """Prints the result as tables and a few lines."""
    phases = result["phases"]
    header = ("", "seconds", "min", "max", "tokens/s", "episodes/s", "GFLOP", "GFLOP/s", "/ product's")
    reporter.table(header, [(name, *_row(phases[name])) for name in phases])
    reporter.table(
        ("program", "compile s", "cached s", "temporary MB"),
        [(name, *_program(program)) for name, program in result["programs"].items()],
    )
    decode, memory, seconds = result["decode"], result["memory"], result["seconds_per_iteration"]
    reporter.note(
        f"decode reads at least {decode['bytes_per_step'] / 1e6:.4g} MB a step: {decode['bytes_per_s'] / 1e9:.3g} GB/s"
        f", {decode['of_copy_rate']:.3g} of the copy's rate"
    )
    reporter.note(
        f"at the rate of the large product ({result['product_flops_per_s'] / 1e9:.0f} GFLOP/s) an iteration would take "
        f"{result['arithmetic_seconds']:.3g} s; it takes {seconds:.4g}, {seconds / result['arithmetic_seconds']:.3g} "
        "times that"
    )
    peaks = (f"{name.split('_')[0]} {size / 1e6:.0f} MB" for name, size in memory.items())
    reporter.note(f"peak memory: {', '.join(peaks)}")
    if peer := result.get("peer"):
        ratios = ", ".join(f"{ratio:.2f}" for ratio in peer["ratios"])
        reporter.note(f"the peer takes {peer['ratio']:.2f} times as long (rounds: {ratios})")


def _row(phase):
    seconds = phase["seconds"]
    times = (seconds["median"], seconds["min"], seconds["max"])
    return *times, phase["tokens_per_s"], phase["episodes_per_s"], *_rates(phase)


def _rates(phase):
    return phase["flops"] / 1e9, phase["flops_per_s"] / 1e9, phase["of_product_rate"]


def _program(program):
    temp = program.get("temp_bytes")
    return program["compile_seconds"], program["compile_seconds_cached"], None if temp is None else temp / 1e6
