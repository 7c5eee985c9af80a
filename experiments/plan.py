"""Predicts the memory of a config's reinforcement learning, before anything is downloaded or allocated.

    python experiments/plan.py --config=configs/ppo_summarize.py:gpt2 --config.ppo.microbatches=64 --devices=8
    python experiments/plan.py --config=configs/pg_tweets.py
    python experiments/plan.py --config=configs/ppo_summarize.py:gpt2 --config.mesh.fsdp=4 --topology=v5e:4x4
    python experiments/plan.py --config=configs/ppo_summarize.py --devices=8 --scaling=runs/scaling

The programs are compiled for this machine, and XLA reports their memory: a minute for GPT-2 on 2 CPU cores. Programs
for a CPU need more memory than those for a GPU or TPU, which fuse more and compute in bfloat16 without widening it. A
character tokenizer counts as printable ASCII.

With --topology they are compiled for Cloud TPUs that are not there (pip install rlhf_jax[tpu]), on the mesh of the
config: memory, work and messages of a chip, and the least seconds that its published peaks allow. --largest searches
the largest batch that fits: up to eight are compiled. --depths=2,4 compiles models of two and four layers, and reads
the numbers of all layers off the line through theirs.

With --scaling, programs are compiled for 1, 2, 4, ... virtual CPU devices, up to --devices, with the config's batch
shared by all (strong scaling) or on each (weak), along data and along fsdp. The folder gets scaling.json and .png.
"""

import json
from pathlib import Path

from launch import flags, read_config, start

from rlhf_jax import config as configs
from rlhf_jax.commands import benchmark, memory, topology
from rlhf_jax.errors import InputError
from rlhf_jax.report import plots
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import sharding

DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share the batch.", lower_bound=1)
TOPOLOGY = flags.DEFINE_string("topology", "", "Cloud TPUs to compile for, such as v5e:4x4.")
LARGEST = flags.DEFINE_boolean("largest", False, "Search the largest batch that fits, for --topology; compiles often.")
DEPTHS = flags.DEFINE_list("depths", [], "Two numbers of layers to compile in place of all, for --topology.")
SCALING = flags.DEFINE_string("scaling", "", "Folder for counts of a device among 1, 2, 4, ..., up to --devices.")
PRICE = flags.DEFINE_float("price", 0.0, "Price of a chip and hour, for --topology.", lower_bound=0.0)
IDS = {"gpt2": 50_258, "char": benchmark.CHARACTERS.vocab_size}  # by kind of tokenizer; gpt2: its own, and PAD


def main():
    config, given = read_config()
    chip, devices = topology.parse(TOPOLOGY.value) if TOPOLOGY.value else (None, DEVICES.value)
    if chip and DEVICES.value != 1:
        raise InputError("--devices: expected none with --topology, which has its number of chips")
    for name, given_too in (("price", PRICE.value), ("largest", LARGEST.value), ("depths", DEPTHS.value)):
        if given_too and not chip:
            raise InputError(f"--{name}: expected none without --topology")
    if chip and SCALING.value:
        raise InputError("--scaling: expected none with --topology, as it compiles for CPU devices")
    if SCALING.value and config.mesh != sharding.Config():
        raise InputError("mesh: expected none with --scaling, which has each of data and fsdp in turn")
    if LARGEST.value and DEPTHS.value:
        raise InputError("--largest: expected none with --depths, as it compiles all layers")
    depths = sorted({int(layers) for layers in DEPTHS.value if layers.isdecimal()})
    if DEPTHS.value and not (len(DEPTHS.value) == len(depths) == 2 and 1 <= depths[0] < config.model.layers):
        expected = f"two numbers of layers, the first below model.layers = {config.model.layers}"
        raise InputError(f"--depths: expected {expected}; got {','.join(DEPTHS.value)}")
    configs.check(config, devices=devices, files=False)
    notes = configs.check_given(config, given)
    if not chip and not SCALING.value:
        sharding.devices()
    ids = IDS.get(config.text.kind, config.text.vocab_size)
    with Reporter() as reporter:
        for note in notes:
            reporter.note(note)
        if chip:
            if depths:
                planned = topology.shallow(config, ids, TOPOLOGY.value, depths)
                found = " and ".join(map(str, depths))
                reporter.note(f"estimated: {config.model.layers} layers on the line through {found}")
            else:
                planned = topology.plan(config, ids, TOPOLOGY.value)
            for header, rows in topology.rows(planned, chip, PRICE.value):
                reporter.table(header, rows)
            if line := topology.advice(planned, chip, config):
                reporter.note(line)
            if LARGEST.value:
                reporter.note(topology.largest_batch(config, ids, TOPOLOGY.value, reporter))
            return
        if SCALING.value:
            folder, points = Path(SCALING.value).expanduser(), []
            folder.mkdir(parents=True, exist_ok=True)
            for point in topology.scaling(config, ids, devices):
                points.append(point)
                (folder / "scaling.json").write_text(json.dumps({"points": points}))
                shares = topology.divided(point, points[0])
                shares = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
                reporter.note(f"{point['scaling']}, {point['mesh']} {point['devices']}: FLOPs, of a share: {shares}")
            plots.scaling(points, folder / "scaling.png")
            return
        sizes = memory.rl(config, ids, DEVICES.value)
        header = (f"{config.algorithm}, per device", "GiB")
        reporter.table(header, [(name, size / 2**30) for name, size in sizes.items()])


if __name__ == "__main__":
    start(main, "config")
