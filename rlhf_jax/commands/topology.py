"""What an iteration of RL costs on Cloud TPUs that are not there; nothing is allocated or run.

The real programs are compiled by libtpu (the extra [tpu]) for the topology and the config's mesh: in a child process,
as libtpu takes signals and prints. XLA reports the memory and the work of a chip, and its program has the collectives.

XLA counts the body of a loop once. Products are counted from our own program, with and without the loops' trips; the
ratio corrects XLA's FLOPs, its bytes, and the collectives within loops. With fsdp, XLA makes loops of its own for TPUs
(a product with each part of a weight, while the next is on its way) and counts them once too: FLOPs are then a chip's
share of our products, but bytes and collectives are too few. Seconds are a roofline: the longest of what the products,
the memory and the links need at their published peaks, so a real program takes longer. The memory traffic of sampling
is that of models/cost.py: every weight and the cache, at every token.
"""

from rlhf_jax import command

if __name__ == "__main__":
    command.begin()  # the imports below take seconds

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from jax.experimental import topologies

from rlhf_jax import config as configs
from rlhf_jax import tasks
from rlhf_jax.commands import memory
from rlhf_jax.errors import BAD_INPUT, InputError
from rlhf_jax.models import cost
from rlhf_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of a chip (cloud.google.com/tpu/docs, system architecture)."""

    flops: float  # a second, in bfloat16
    memory: float  # GiB
    bandwidth: float  # of the memory, bytes a second
    links: float  # of the chip's links to others, bytes a second and direction
    topologies: tuple[str, ...]  # examples


_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v5e": Chip(197e12, 16, 819e9, 200e9, _2D),
    "v6e": Chip(918e12, 32, 1_638e9, 400e9, _2D),
    "v5p": Chip(459e12, 95, 2_765e9, 600e9, ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "8x8x8")),
}
# libtpu asks no metadata server, and other processes may have it loaded.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


def parse(topology):
    """(Chip, number of chips) of a topology such as v5e:4x4. InputError lists what there is."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        known = ", ".join(f"{kind}:{'|'.join(chip.topologies)}" for kind, chip in CHIPS.items())
        raise InputError(f"--topology: expected one such as {known}; got {topology!r}")
    return CHIPS[kind], math.prod(map(int, shape.split("x")))


def plan(config, vocab_size, topology):
    """{"state": bytes by kind, "programs": {name: counts of a chip}, "chips"}; vocab_size as in memory.rl."""
    [planned] = plans([config], vocab_size, topology)
    return planned


def plans(several, vocab_size, topology):
    """Yields the `plan` of each config, from one process. topology: or a number of virtual CPU devices.

    A mesh of fewer CPU devices has the first of them.
    """
    environment = os.environ | ENVIRONMENT
    if isinstance(topology, int):
        # Nothing is run: LLVM need not optimize what XLA has counted.
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={topology}"
        environment |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    else:
        parse(topology)
    request = {"configs": list(map(configs.tree, several)), "vocab_size": vocab_size, "topology": topology}
    line = [sys.executable, "-m", "rlhf_jax.commands.topology"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(line, stderr=errors, **pipes) as child:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        yield from (json.loads(said) for said in child.stdout if said.startswith('{"state"'))
        if child.wait():
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {child.returncode}"]
            raise InputError(lines[-1].removeprefix("InputError: "))


def seconds(counts, chip):
    """{"products", "memory", "links": seconds} of a program at the chip's peaks; the longest is the estimate."""
    return {
        "products": counts["flops"] / chip.flops,
        "memory": counts["traffic"] / chip.bandwidth,
        "links": counts["collectives"] / chip.links,
    }


def rows(planned, chip, price=0.0):
    """The tables of a plan: [(header, rows)]. price: of a chip and hour."""
    gib = [(f"{name}, per chip", size / 2**30) for name, size in planned["state"].items()]
    tables: list[Any] = [(("memory", "GiB"), gib)]
    programs, total = [], 0.0
    for name, counts in planned["programs"].items():
        parts = seconds(counts, chip)
        longest = max(parts, key=lambda part: parts[part])
        total += parts[longest]
        numbers = (counts["peak"] / 2**30, counts["flops"] / 1e12, counts["traffic"] / 1e9, counts["collectives"] / 1e6)
        programs.append((name, *numbers, parts[longest], longest, counts["compile_seconds"]))
    header = ("program, per chip", "peak GiB", "TFLOP", "GB read", "MB sent", "seconds", "limited by", "compiled in s")
    tables.append((header, programs))
    fullest = max(counts["peak"] for counts in planned["programs"].values()) / 2**30
    chips = planned["chips"]
    summary = [
        ("memory of the fullest program, of the chip's GiB", fullest / chip.memory),
        ("seconds of an iteration, at least", total),
    ]
    if price:
        summary.append(("price of an iteration, at least", total / 3600 * chips * price))
        summary.append(("price of all iterations, at least", planned["steps"] * total / 3600 * chips * price))
    tables.append(((f"{chips} chips", ""), summary))
    return tables


def advice(planned, chip, config):
    """What to change first where the fullest program does not fit a chip, in one line; or nothing."""
    programs, section = planned["programs"], config.algorithm
    fullest = max(programs, key=lambda name: programs[name]["peak"])
    if programs[fullest]["peak"] <= chip.memory * 2**30:
        return ""
    if sum(planned["state"].values()) > programs[fullest]["peak"] / 2:
        first = "--config.mesh.fsdp (more), as parameters and optimizer are most of it"
    elif fullest == "update" and not config.model.remat:
        first = "--config.model.remat=true, as the update keeps every layer's activations"
    elif fullest == "update":
        first = f"--config.{section}.microbatches (more than {config.rl.microbatches})"
    else:
        first = f"--config.{section}.lanes (less than {config.rl.lanes or config.rl.batch})"
    size = programs[fullest]["peak"] / 2**30
    return f"does not fit: {fullest} needs {size:.1f} GiB of a chip's {chip.memory:g}; change first {first}"


def largest_batch(config, vocab_size, topology, reporter):
    """A line about the largest batch of the algorithm whose programs fit a chip; each that is tried is compiled."""
    chip, chips = parse(topology)
    section, (data, fsdp, _) = config.rl, config.mesh.shape(chips)
    slices = getattr(section, "minibatches", 1) * section.microbatches
    unit = math.lcm(slices * data * fsdp, section.group * data * fsdp, section.lanes or 1)

    def peak(batch):
        """GiB of the fullest program."""
        changed = dataclasses.replace(config, **{config.algorithm: dataclasses.replace(section, batch=batch)})
        programs = plan(changed, vocab_size, topology)["programs"]
        found = max(counts["peak"] for counts in programs.values()) / 2**30
        reporter.note(f"{config.algorithm}.batch = {batch}: {found:.2f} GiB of {chip.memory:g}")
        return found

    fits, does_not = search(peak, unit, section.batch, chip.memory)
    if not fits:
        return f"{config.algorithm}.batch = {does_not} does not fit; a smaller one is no multiple of {unit}"
    more = f"; {does_not} does not" if does_not else ", and there may be larger ones"
    return f"{config.algorithm}.batch = {fits} fits{more}"


def search(peak, unit, start, limit, most=8):
    """(the largest multiple of `unit` that is known to have a peak(batch) <= limit, the smallest known to have more).

    0 where there is none. A peak grows about linearly with the batch, so each guess is where the line through the two
    last ones meets the limit. At most `most` are tried.
    """
    known: dict[int, float] = {}  # by units
    fits, does_not, guess = 0, 0, max(start // unit, 1)
    while len(known) < most and not (does_not and does_not - fits == 1):
        known[guess] = peak(guess * unit)
        if known[guess] <= limit:
            fits = max(fits, guess)
        else:
            does_not = min(does_not or guess, guess)
        guess = 2 * guess if known[guess] <= limit else guess // 2
        if len(known) > 1:
            (b, y), (a, x) = list(known.items())[-1:-3:-1]
            slope = (y - x) / (b - a)
            guess = int(b + (limit - y) / slope) if slope > 0 else guess
        guess = max(fits + 1, min(guess, does_not - 1 if does_not else 8 * fits))
    return fits * unit, does_not * unit


def shallow(config, vocab_size, topology, depths):
    """`plan` of all layers, from those of two depths: every number lies on the line through its two.

    Programs of few layers compile in a fraction of the time. All layers cost the same, so FLOPs, bytes and messages are
    those of the whole program; a deeper one may have its peak of memory elsewhere.
    """
    few, more = depths
    models = (dataclasses.replace(config.model, layers=layers) for layers in depths)
    low, high = plans([dataclasses.replace(config, model=model) for model in models], vocab_size, topology)
    share = (config.model.layers - few) / (more - few)

    def line(low, high):
        return {name: low[name] + share * (high[name] - low[name]) for name in low}

    programs = {}
    for name, first in low["programs"].items():
        second = high["programs"][name]
        spent = {"compile_seconds": first["compile_seconds"] + second["compile_seconds"]}
        programs[name] = line(first, second) | spent
    return low | {"state": line(low["state"], high["state"]), "programs": programs}


def scaling(config, vocab_size, most):
    """What a device has to do among 1, 2, 4, ... and at most `most` virtual CPU devices; compiled, not run.

    Yields {"scaling", "mesh", "devices", "programs": as in `plan`}. strong: all devices share the config's batch; weak:
    each has one of its own. mesh: the axis, data or fsdp, that has all of them.
    """
    section = config.rl
    points, several = [], []
    for power, kind, axis in itertools.product(range(most.bit_length()), ("strong", "weak"), ("data", "fsdp")):
        devices = 2**power
        points.append({"scaling": kind, "mesh": axis, "devices": devices})
        times = devices if kind == "weak" else 1
        changed = dataclasses.replace(section, batch=section.batch * times, lanes=section.lanes * times)
        mesh = sharding.Config(**{"data": 1, axis: devices})
        several.append(dataclasses.replace(config, mesh=mesh, **{config.algorithm: changed}))
    planned, known = plans(list(dict.fromkeys(several)), vocab_size, most), {}  # one device is the same four times
    for point, each in zip(points, several, strict=True):
        if each not in known:
            known[each] = next(planned)["programs"]
        yield point | {"programs": known[each]}


def divided(point, alone):
    """{program: FLOPs of a device over its share of those of one device alone}, of points of `scaling`.

    1: the work is divided, and nothing is done twice.
    """
    share = point["devices"] if point["scaling"] == "strong" else 1
    return {
        name: counts["flops"] * share / alone["programs"][name]["flops"] for name, counts in point["programs"].items()
    }


def trips(jaxpr, whiles, depth=0):
    """(FLOPs of the products of a program with each loop body once, and with its trips).

    whiles: trips of a while loop within so many others. Of the branches of a conditional the costliest counts.
    """
    once = total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            flops = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes)
            once, total = once + flops, total + flops
            continue
        if name == "cond":
            found = [trips(branch.jaxpr, whiles, depth) for branch in params["branches"]]
            first, second = max(found, key=lambda pair: pair[1])
            once, total = once + first, total + second
            continue
        times = {"scan": params.get("length", 1), "while": whiles[min(depth, len(whiles) - 1)]}.get(name, 1)
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    first, second = trips(inner, whiles, depth + (name == "while"))
                    once, total = once + first, total + times * second
    return once, total


def sent(program):
    """(bytes of the results of collectives outside of loops, and within them once) of a compiled program's text."""
    outside = inside = 0.0
    at_top = False
    names = "|".join(COLLECTIVES)
    for line in program.splitlines():
        if line.startswith(("ENTRY", "%")) or (line and not line.startswith((" ", "}"))):
            at_top = line.startswith("ENTRY")
        # An asynchronous one has its operands in the type of its start: the end has its result alone.
        found = re.search(rf"= (.*?) (?:{names})(-start|-done)?\(", line)
        if not found or found[2] == "-start":
            continue
        size = 0.0
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
            size += math.prod(map(int, filter(None, shape.split(",")))) * BYTES.get(kind, 4)
        outside, inside = (outside + size, inside) if at_top else (outside, inside + size)
    return outside, inside


def _chips(topology):
    """The devices of a topology of TPUs."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputError("--topology: expected libtpu, which is not installed; pip install rlhf_jax[tpu]") from None
    chip, _ = parse(topology)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu's own, of any kind
        known = "|".join(chip.topologies)
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"--topology: expected one such as {known}, got {topology!r} ({reason})") from None


def _compile(config, vocab_size, topology):
    """What `plan` returns, computed in this process."""
    devices = jax.devices()[: config.mesh.data * config.mesh.fsdp] if isinstance(topology, int) else _chips(topology)
    mesh = sharding.mesh(config.mesh, devices)
    section, task = config.rl, tasks.load(config)
    state, base, programs = memory.compiled(config, vocab_size, section, mesh)
    N, R, lanes, group = section.batch, task.response_length, section.lanes, section.group
    whiles: tuple[float, ...] = (R - 1,)
    if 0 < lanes < N:  # prompts are read a quarter of the lanes at a time, and every lane decodes R tokens
        entered = max(lanes // 4, group)
        whiles = (N / entered, R * entered / lanes)
    parameters = (state.policy, state.reference, state.value, state.reward, base)
    kinds = {"parameters": _share(parameters), "optimizer": _share(state.optimizer)}
    found: dict[str, Any] = {}
    for name, (function, args) in programs.items():
        began = time.monotonic()
        traced = function.trace(*args)
        program = traced.lower().compile()
        once, total = trips(traced.jaxpr.jaxpr, whiles)
        memory_of, counted = program.memory_analysis(), program.cost_analysis()
        outside, inside = sent(program.as_text())
        peak = memory_of.argument_size_in_bytes + memory_of.temp_size_in_bytes
        peak += memory_of.output_size_in_bytes - memory_of.alias_size_in_bytes
        ratio = total / max(once, 1)
        least = 0 if isinstance(topology, int) else total / len(devices)  # XLA makes no such loops for CPUs
        traffic = counted.get("bytes accessed", 0) * ratio
        if name == "draw":
            rows = (lanes or N) // sharding.shards(mesh)
            model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
            read = cost.step_bytes(model, rows, task.prompt_length + R // 2) / config.mesh.tensor
            traffic = max(traffic, read * R * N / (lanes or N))
        found[name] = {
            "peak": peak,
            "flops": max(counted["flops"] * ratio, least),
            "flops_once": counted["flops"],
            "traffic": traffic,
            "collectives": outside + inside * ratio,
            "compile_seconds": time.monotonic() - began,
        }
    return {"state": kinds, "programs": found, "chips": len(devices), "steps": section.steps}


def _share(tree):
    """Bytes of a tree on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def main():
    """The child: reads a request from stdin, and writes each plan as a line of JSON to stdout."""
    request = json.loads(sys.stdin.read())
    for config in map(configs.parse, request["configs"]):
        found = _compile(config, request["vocab_size"], request["topology"])
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.stderr.write(f"\nInputError: {error}\n")
        sys.exit(BAD_INPUT)
