"""Trains the algorithms on one device and on meshes of eight; prints how far apart they end and what it costs, as JSON.

test_sharding.py runs it with eight virtual CPU devices: the number must be set before JAX starts. Each program is
compiled once for a mesh; what runs is what is counted.
"""

import dataclasses
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generate
from rlhf_jax.algorithms import dpo, grpo, ppo, preference, supervised
from rlhf_jax.commands import memory
from rlhf_jax.models import decoder, heads
from rlhf_jax.rollout import Apply
from rlhf_jax.stages.rl import Iteration
from rlhf_jax.training import optim, sharding

B, P, R, V, PAD, EOS = 64, 4, 5, 24, 0, 1
SIZES = decoder.Config(layers=1, heads=2, head_size=8, width=16, context=P + R, vocab_size=V)
APPLY = Apply(heads.LanguageModel(SIZES, chunk=8), heads.ScalarModel(SIZES))
PPO = ppo.Config(batch=B, steps=9, lr=1e-3, epochs=2, minibatches=2, lanes=B // 2)
CONFIGS = {
    "sft": (supervised, supervised.Config(batch=B, steps=9, lr=1e-3, microbatches=2)),
    "reward": (preference, preference.Config(batch=B, steps=9, lr=1e-3, microbatches=2)),
    "dpo": (dpo, dpo.Config(batch=B, steps=9, lr=1e-3, microbatches=2)),
    "grpo": (grpo, grpo.Config(batch=B, steps=9, lr=1e-3, group=2, epochs=1, microbatches=2, kl="exact")),
    "ppo": (ppo, PPO),
    "ppo, all at once": (ppo, dataclasses.replace(PPO, lanes=0)),  # the tokens are the same
}
MESHES = {  # data, fsdp, tensor
    "1,1,1": ("sft", "reward", "dpo", "grpo", "ppo"),
    "8,1,1": ("ppo",),
    "2,4,1": ("sft", "reward", "dpo", "grpo", "ppo"),
    "4,1,2": ("ppo, all at once",),
}
COLLECTIVES = r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def main():
    found = {}
    for name, algorithms in MESHES.items():
        data, fsdp, tensor = map(int, name.split(","))
        devices = jax.devices()[: data * fsdp * tensor]
        mesh = sharding.mesh(sharding.Config(data=data, fsdp=fsdp, tensor=tensor), devices)
        found[name] = Trained(mesh).all(algorithms)
    alone = found.pop("1,1,1")
    report = {name: compare(alone, trained) for name, trained in found.items()}
    four = Trained(sharding.mesh(sharding.Config(fsdp=4), jax.devices()[:4])).update()
    report["fsdp of 4"] = {what: size / alone.costs["ppo update"][what] for what, size in four.items()}
    report["completions"] = len({tuple(row) for row in alone.results["ppo response_BR"].tolist()})
    print(json.dumps(report))


class Trained:
    """What two steps of each algorithm leave on a mesh."""

    def __init__(self, mesh):
        self.mesh, self.jit = mesh, partial(sharding.jit, mesh=mesh)
        self.results, self.costs, self.inner, self.moved = {}, {}, {}, {}

    def all(self, names):
        policy, value, data = inputs()
        data = sharding.shard(data, self.mesh)
        for name in names:
            algorithm, config = CONFIGS[name]
            if hasattr(config, "epochs"):
                self.sampled(name.split(",")[0], algorithm, config, policy, value, data)
            else:
                self.supervised(name, algorithm, config, value if name == "reward" else policy, data)
        return self

    def compiled(self, name, function, *args):
        """The compiled program, counted."""
        program = function.lower(*args).compile()
        memory = program.memory_analysis()
        text = program.as_text()
        inner = text[: text.index("\nENTRY")]  # loops, and what they call
        self.inner[name] = len(re.findall(COLLECTIVES, inner))
        self.costs[name] = {
            "flops": program.cost_analysis()["flops"],
            "arguments": memory.argument_size_in_bytes,
            "temp": memory.temp_size_in_bytes,
        }
        return program

    def leave(self, name, state, before, numbers):
        trained = {"parameters": (state.policy, state.reward, state.value), "optimizer": state.optimizer}
        self.results |= {f"{name} {what}": jax.tree.map(np.asarray, tree) for what, tree in trained.items()}
        self.results[f"{name} metrics"] = {key: float(value) for key, value in numbers.items()}
        self.moved[name] = sum(jax.tree.leaves(jax.tree.map(lambda x, where: x.sharding != where, state, before)))

    def supervised(self, name, algorithm, config, params, data):
        tx = optim.adamw(config, config.steps)
        state = sharding.place(algorithm.init(params, jax.random.key(1), tx=tx), self.mesh)
        before = jax.tree.map(lambda x: x.sharding, state)
        parts = {"config": config, "apply": APPLY, "tx": tx, "guard": "stop"}
        step = self.compiled(name, self.jit(partial(algorithm.step, **parts)), state, data)
        for _ in range(2):
            state, numbers = step(state, data)
        self.leave(name, state, before, numbers)

    def sampled(self, name, algorithm, config, policy, value, data):
        iteration = self.iteration(algorithm, config)
        prompts = (data["prompt_BP"], data["prompt_mask_BP"])
        state = iteration.begin(policy, jax.random.key(1), value=value)
        state = sharding.place(state, self.mesh)
        before = jax.tree.map(lambda x: x.sharding, state)
        programs = {}

        def run(program, function, *args):
            if program not in programs:
                programs[program] = self.compiled(f"{name} {program}", function, *args)
            return programs[program](*args)

        for _ in range(2):
            drawn = run("draw", iteration.sample, state, *prompts)
            judged = run("judge", iteration.judge, state, *prompts, drawn)
            score_B = sharding.shard(np.sin(np.asarray(drawn.response_BR).sum(axis=1), dtype=np.float32), self.mesh)
            state, numbers = run("update", iteration.learn, state, judged.replace(score_B=score_B))
        self.results[f"{name} response_BR"] = np.asarray(drawn.response_BR)
        self.leave(name, state, before, numbers)

    def iteration(self, algorithm, config):
        options = {field: getattr(config, field) for field in ("temperature", "lanes", "widths", "group")}
        sampling = generate.Sampling(max_tokens=R, eos_id=EOS, pad_id=PAD, **options)
        return Iteration(algorithm, config, APPLY, sampling, "stop", self.jit)

    def update(self):
        """What PPO's update costs; nothing runs."""
        iteration, (policy, value, data) = self.iteration(ppo, PPO), inputs()
        state = jax.eval_shape(lambda: iteration.begin(policy, jax.random.key(1), value=value))
        state, prompts = memory.placed(state, self.mesh), (data["prompt_BP"], data["prompt_mask_BP"])
        function, (state, scored) = iteration.programs(state, prompts, Sentiment)["update"]
        self.compiled("update", function, state, memory.placed(scored, self.mesh, rows=True))
        return self.costs["update"]


class Sentiment:
    """A reward that is computed on the host."""

    on_host = True


def compare(alone, other):
    """How far apart two Trained are, and what each device of the other computes and holds, as a share of the one's."""
    report = {"moved": other.moved, "tokens": 0, "metrics": {}, "arrays": {}, "share": {}, "inner": other.inner}
    for name, theirs in other.results.items():
        ours = alone.results[name]
        if name.endswith("response_BR"):
            report["tokens"] += int((ours != theirs).sum())
        elif name.endswith("metrics"):
            for key, value in ours.items():  # KLs are nearly 0
                limit = 1e-5 * abs(value) + (1e-6 if "kl" in key else 1e-7)
                report["metrics"][f"{name} {key}"] = abs(value - theirs[key]) / limit
        else:
            pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
            for (path, x), y in pairs:
                where = f"{name} {jax.tree_util.keystr(path)}"
                # What adds the same to both scores of a pair cancels: its gradient is 0, and what is computed rounding.
                cancels = name.startswith("reward") and any(
                    part in where for part in ("['head']['bias']", "['ln_f']['bias']")
                )
                # So does a key's bias: it adds the same to a query's scores of all keys.
                cancels = cancels or "['qkv']['bias']" in where
                limit = 1e-5 * (1 if cancels else np.abs(x).max())
                report["arrays"][where] = float(np.abs(x - y).max() / max(limit, 1e-12))
    for name, cost in other.costs.items():
        report["share"][name] = {what: size / alone.costs[name][what] for what, size in cost.items()}
    for what in ("metrics", "arrays"):  # the worst ones
        report[what] = dict(sorted(report[what].items(), key=lambda pair: -pair[1])[:3])
    return report


def inputs():
    """(policy, reward or value model, data for every algorithm): pairs of equal prompts, responses of 1 to 5 tokens."""
    policy = APPLY.policy.init(jax.random.key(2))
    policy = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), policy)
    value = APPLY.scalar.init(jax.random.key(3), policy)
    mask_BP = jnp.arange(P) >= (jnp.arange(B) // 2 % P)[:, None]
    data = {"prompt_BP": jnp.where(mask_BP, jnp.array([5, 2, 3, 4]), PAD), "index_B": jnp.arange(B)}
    data["prompt_mask_BP"] = mask_BP
    for key, name in enumerate(("response", "chosen", "rejected")):
        length_B1 = jax.random.randint(jax.random.key(key), (B, 1), 1, R + 1)
        data[f"{name}_mask_BR"] = jnp.arange(R) < length_B1
        ids_BR = jax.random.randint(jax.random.key(10 + key), (B, R), 1, V)
        data[f"{name}_BR"] = jnp.where(data[f"{name}_mask_BR"], ids_BR, PAD)
    data |= {"chosen_ref_B": -jnp.ones(B), "rejected_ref_B": -2 * jnp.ones(B)}
    return policy, value, data


if __name__ == "__main__":
    main()
