"""Trains every algorithm for two steps on one device and on all there are, and prints how far apart they end, as JSON.

test_sharding.py runs it with eight virtual CPU devices: the number must be set before JAX starts.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import generate, rollout
from rlhf_jax.algorithms import grpo, ppo, preference, supervised
from rlhf_jax.algorithms import policy as policy_algorithm
from rlhf_jax.models import decoder, heads
from rlhf_jax.rollout import Apply
from rlhf_jax.training import sharding

B, P, R, V, PAD, EOS = 16, 4, 5, 13, 0, 1
SIZES = decoder.Config(layers=1, heads=2, head_size=4, width=8, context=P + R, vocab_size=V)
APPLY = Apply(heads.LanguageModel(SIZES, chunk=10), heads.ScalarModel(SIZES))
TX = optax.sgd(0.1)  # plain steps: a difference in a gradient is not scaled away
SAMPLING = generate.Sampling(max_tokens=R, eos_id=EOS, pad_id=PAD, temperature=0.7, lanes=B // 2)
PPO = ppo.Config(epochs=2, minibatches=2, microbatches=2)
GRPO = grpo.Config(group=2, epochs=2, minibatches=2, microbatches=2, kl="exact")


def main():
    mesh = sharding.mesh()
    alone = train(lambda state: state, lambda batch: batch)
    together = train(partial(sharding.replicate, mesh=mesh), partial(sharding.shard, mesh=mesh))
    apart = {name: distance(alone[name], together[name]) for name in alone}
    apart["completions"] = len({tuple(row) for row in np.asarray(together["response_BR"]).tolist()})
    apart["rows a device"] = [len(part.data) for part in sharding.shard(jnp.zeros(B), mesh).addressable_shards]
    print(json.dumps(apart))


def train(place_state, place_batch):
    """What training leaves, by name. `place_*` lay the arrays over devices."""
    policy, value, data = inputs()
    results = {}

    def run(name, step, state, config):
        step = jax.jit(partial(step, config=config, apply=APPLY, tx=TX, guard="stop"))
        state = place_state(state)
        for _ in range(2):
            state, metrics = jax.block_until_ready(step(state, place_batch(data)))
        results[f"{name} metrics"] = metrics
        results[f"{name} parameters"] = (state.policy, state.reward)

    run("sft", supervised.step, supervised.init(policy, jax.random.key(1), tx=TX), supervised.Config(microbatches=2))
    run("reward", preference.step, preference.init(value, jax.random.key(1), tx=TX), preference.Config(microbatches=2))

    def iterate(state, batch, algorithm, config):
        keys_B = jax.random.split(jax.random.fold_in(state.step_key, 0), B)
        prompts = (batch["prompt_BP"], batch["prompt_mask_BP"], keys_B)
        drawn = rollout.draw(APPLY, state.policy, *prompts, SAMPLING)
        judged = rollout.judge(APPLY, state, *prompts[:2], drawn, SAMPLING)
        scored = judged.replace(score_B=rollout.score(APPLY, state.reward, judged, SAMPLING))
        parts = {"config": config, "apply": APPLY, "tx": TX, "guard": "stop"}
        return *policy_algorithm.step(algorithm, state, scored, **parts), drawn.response_BR

    for name, algorithm, config in ("grpo", grpo, GRPO), ("ppo", ppo, PPO):
        models = {"value": value if algorithm.NEEDS_VALUE else None, "reward": value}
        state = place_state(policy_algorithm.init(policy, jax.random.key(1), config=config, tx=TX, **models))
        step = jax.jit(partial(iterate, algorithm=algorithm, config=config))
        for _ in range(2):
            state, metrics, response_BR = jax.block_until_ready(step(state, place_batch(data)))
        results |= {f"{name} metrics": metrics, f"{name} parameters": (state.policy, state.value)}
    return results | {"response_BR": response_BR}


def inputs():
    """(policy, reward or value model, data for every algorithm): equal prompts, responses of 1 to 5 tokens."""
    policy = APPLY.policy.init(jax.random.key(2))
    policy = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), policy)
    value = APPLY.scalar.init(jax.random.key(3), policy)
    data = {"prompt_BP": jnp.tile(jnp.array([[PAD, 2, 3, 4]]), (B, 1)), "index_B": jnp.arange(B)}
    data["prompt_mask_BP"] = data["prompt_BP"] != PAD
    for key, name in enumerate(("response", "chosen", "rejected")):
        length_B1 = jax.random.randint(jax.random.key(key), (B, 1), 1, R + 1)
        data[f"{name}_mask_BR"] = jnp.arange(R) < length_B1
        ids_BR = jax.random.randint(jax.random.key(10 + key), (B, R), 1, V)
        data[f"{name}_BR"] = jnp.where(data[f"{name}_mask_BR"], ids_BR, PAD)
    return policy, value, data


def distance(one, other):
    """The largest difference in any array."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), one, other)
    return float(max(jax.tree.leaves(differences)))


if __name__ == "__main__":
    main()
