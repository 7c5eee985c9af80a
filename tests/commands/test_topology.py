"""Plans for TPUs, as far as they go without libtpu: what is counted, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.commands import benchmark, topology
from rlhf_jax.config import Config
from rlhf_jax.models import decoder
from rlhf_jax.training import sharding
from tests.support import Recorder, changed, error


def test_a_topology_is_a_chip_and_a_number():
    chip, count = topology.parse("v5e:4x4")
    assert (chip.memory, count) == (16, 16)
    assert topology.parse("v5p:2x2x2")[1] == 8


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:0x4", "v9:2x2", "v5e:2", "local"])
def test_an_unknown_topology_lists_the_known_ones(name):
    message = error(topology.parse, name)
    assert message.startswith("--topology: expected one such as v5e:2x2|2x4|") and message.endswith(f"got {name!r}")


def test_trips_by_hand():
    """A product of 2 x 3 x 4 is 48 FLOPs: in a scan of 5, in a while within a while, and in the costlier branch."""
    a, b = jnp.ones((2, 3)), jnp.ones((3, 4))

    def product(x):
        return x + jnp.sum(a @ b)

    def inner(x):
        return jax.lax.while_loop(lambda x: x < 3, product, x)

    programs = {
        (48, 5 * 48): lambda x: jax.lax.scan(lambda x, _: (product(x), None), x, length=5)[0],
        (96, 7 * (48 + 9 * 48)): lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: product(inner(x)), x),
        (96, 96): lambda x: jax.lax.cond(x > 0, product, lambda x: product(product(x)), x),
    }
    for expected, program in programs.items():
        assert topology.trips(jax.make_jaxpr(program)(1.0).jaxpr, (7, 9)) == expected


def test_the_products_of_an_iteration_are_those_of_the_cost_model():
    """All epochs, slices, chunks and tokens are counted. Our attention computes the masked half of the scores too."""
    model = decoder.Config(layers=3, heads=4, head_size=64, width=256, vocab_size=997, context=32)
    config = ppo.Config(batch=8, epochs=3, minibatches=2, microbatches=2)
    shape = benchmark.Shape("counted", model, prompt=24, response=8, algorithm=config)
    programs = benchmark.Timed(shape, chunk=16).programs()
    found = {
        name: topology.trips(function.trace(*args).jaxpr.jaxpr, (shape.response - 1,))[1]
        for name, (function, args) in programs.items()
    }
    expected = benchmark.flops(shape)
    assert 1 <= found["draw"] / (expected["prefill"] + expected["decode"]) < 1.15
    assert 1 <= (found["judge"] + found["reward"]) / expected["score"] < 1.15
    assert 1 <= found["update"] / expected["update"] < 1.15


def test_a_deep_model_is_on_the_line_through_two_shallow_ones(monkeypatch):
    """Bytes and FLOPs are; what was spent on compiling is the sum, and numbers of chips stay whole."""

    def plans(several, *_):
        for config in several:
            peak = 100 + 7 * config.model.layers
            counts = {"peak": peak, "compile_seconds": 3.0}
            yield {"state": {"optimizer": peak}, "programs": {"update": counts}, "chips": 4, "steps": 9}

    monkeypatch.setattr(topology, "plans", plans)
    found = topology.shallow(changed(Config(), model={"layers": 48}), 800, "v5e:2x2", (2, 4))
    counts = {"peak": 436, "compile_seconds": 6.0}
    assert found == {"state": {"optimizer": 436}, "programs": {"update": counts}, "chips": 4, "steps": 9}


def test_each_point_of_a_scaling_has_its_mesh_and_batch(monkeypatch):
    """Weak scaling has the batch and the lanes on each device. One device is compiled once."""
    compiled = []

    def plans(several, ids, most):
        compiled.extend(several)
        for config in several:
            flops = config.ppo.batch / (config.mesh.data * config.mesh.fsdp)
            yield {"state": {}, "programs": {"update": {"flops": flops}}, "chips": most}

    monkeypatch.setattr(topology, "plans", plans)
    points = list(topology.scaling(changed(Config(), ppo={"batch": 64, "lanes": 16}), 50, 3))
    assert [(point["devices"], point["scaling"], point["mesh"]) for point in points] == [
        (devices, kind, axis) for devices in (1, 2) for kind in ("strong", "weak") for axis in ("data", "fsdp")
    ]
    found = [(config.mesh.data, config.mesh.fsdp, config.ppo.batch, config.ppo.lanes) for config in compiled]
    assert found == [(1, 1, 64, 16), (2, 1, 64, 16), (1, 2, 64, 16), (2, 1, 128, 32), (1, 2, 128, 32)]
    assert [topology.divided(point, points[0]) for point in points] == [{"update": 1.0}] * 8
    twice = {"scaling": "strong", "devices": 2, "programs": points[0]["programs"]}  # as much as one alone
    assert topology.divided(twice, points[0]) == {"update": 2.0}


def test_work_is_divided_among_eight_cpu_devices():
    """At most 1.25 eighths of the FLOPs of one; and gradients, at least, are sent."""
    config = changed(
        Config(),
        algorithm="policy_gradient",
        data={"prompt_length": 24, "response_length": 8},
        model={"layers": 1, "heads": 2, "head_size": 32, "width": 64, "vocab_size": 97, "context": 32},
        reward={"kind": "sentiment"},
        policy_gradient={"batch": 64},
    )
    meshes = sharding.Config(data=1), sharding.Config(data=1, fsdp=8)
    one, eight = topology.plans([dataclasses.replace(config, mesh=mesh) for mesh in meshes], 97, 8)
    assert (one["chips"], eight["chips"]) == (1, 8)
    point = {"scaling": "strong", "devices": 8, "programs": eight["programs"]}
    shares = topology.divided(point, one)
    assert shares.keys() == {"draw", "judge", "update"} and max(shares.values()) <= 1.25, shares
    assert min(shares.values()) > 0.9
    assert [planned["programs"]["update"]["collectives"] > 0 for planned in (one, eight)] == [False, True]
    assert eight["state"]["optimizer"] < one["state"]["optimizer"] / 4


PROGRAM = """HloModule jit_learn
%body (p: f32[8,4]) -> f32[8,4] {
  %ag = bf16[8,4]{1,0} all-gather(bf16[2,4]{1,0} %p), dimensions={0}
  %ar.start = f32[16]{0} all-reduce-start(f32[16]{0} %x), to_apply=%sum
  ROOT %ar.done = f32[16]{0} all-reduce-done(f32[16]{0} %ar.start)
}
ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %two = (f32[3]{0}, s32[]) all-reduce(f32[3]{0} %a, s32[] %b), to_apply=%sum
  ROOT %w = f32[8,4]{1,0} while(f32[8,4]{1,0} %p), condition=%c, body=%body
}
"""


def test_what_is_sent_by_hand():
    assert topology.sent(PROGRAM) == (3 * 4 + 4, 8 * 4 * 2 + 16 * 4)


def test_the_table_of_a_plan():
    """The longest of three parts, at the peaks; a price for all chips and iterations."""
    counts = {
        "peak": 8 * 2**30,
        "flops": 197e12,
        "traffic": 819e9 / 2,
        "collectives": 200e9 / 4,
        "compile_seconds": 1.0,
    }
    planned = {"state": {"parameters": 2**30}, "programs": {"update": counts}, "chips": 4, "steps": 10}
    chip = topology.CHIPS["v5e"]
    assert topology.seconds(counts, chip) == {"products": 1.0, "memory": 0.5, "links": 0.25}
    _, (_, [program]), (_, summary) = topology.rows(planned, chip, price=3.6)
    assert program[5:7] == (1.0, "products")
    assert [value for _, value in summary] == pytest.approx([0.5, 1.0, 0.004, 0.04])


@pytest.mark.parametrize(
    ("peaks", "state", "changes", "words"),
    [
        ({"draw": 1, "update": 16}, 1, {}, ""),
        ({"draw": 1, "update": 17}, 9, {}, "update needs 17.0 GiB of a chip's 16; change first --config.mesh.fsdp"),
        ({"draw": 1, "update": 17}, 1, {}, "--config.model.remat=true"),
        ({"draw": 1, "update": 17}, 1, {"model": {"remat": True}}, "--config.ppo.microbatches (more than 1)"),
        ({"draw": 20, "update": 17}, 1, {}, "--config.ppo.lanes (less than 512)"),
    ],
)
def test_what_to_change_first(peaks, state, changes, words):
    programs = {name: {"peak": size * 2**30} for name, size in peaks.items()}
    planned = {"state": {"parameters": state * 2**30}, "programs": programs}
    line = topology.advice(planned, topology.CHIPS["v5e"], changed(Config(), **changes))
    assert words in line and bool(line) == bool(words)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    assert "pip install rlhf_jax[tpu]" in error(topology._chips, "v5e:2x2")


@pytest.mark.parametrize(
    ("peak", "start", "found"),
    [
        (lambda batch: 2 + batch / 100, 64, (1392, 1400)),  # 15.92 and 16 GiB
        (lambda batch: 2 + batch / 100, 4096, (1392, 1400)),
        (lambda batch: 2 + (batch / 100) ** 1.3, 64, (760, 768)),  # 15.97 and 16.14
        (lambda batch: 17, 64, (0, 8)),
        (lambda batch: 3 + batch, 1, (8, 16)),
    ],
)
def test_the_largest_batch_is_searched(peak, start, found):
    tried = []
    assert topology.search(lambda batch: tried.append(batch) or peak(batch), 8, start, 15.99) == found
    assert len(tried) <= 8 and len(set(tried)) == len(tried)


def test_a_batch_that_always_fits_has_no_end():
    assert topology.search(lambda batch: 1, 8, 8, 16, most=4) == (64, 0)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "ppo.batch = 1600 fits; 1616 does not"),  # a hundredth of a GiB an episode, 16 chips of 16 GiB
        ({"lanes": 96}, "ppo.batch = 1536 fits; 1632 does not"),
        ({"microbatches": 10}, "ppo.batch = 1600 fits; 1760 does not"),
    ],
    ids=["chips", "lanes", "slices"],
)
def test_the_largest_batch_divides_as_the_config_needs(parts, said, monkeypatch):
    def plan(config, ids, name):
        assert (ids, name) == (800, "v5e:4x4")
        return {"programs": {"draw": {"peak": 2**30}, "update": {"peak": config.ppo.batch * 2**30 // 100}}}

    monkeypatch.setattr(topology, "plan", plan)
    config = changed(Config(), ppo={"batch": 960, **parts})
    assert topology.largest_batch(config, 800, "v5e:4x4", Recorder()) == said
