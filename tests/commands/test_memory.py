import dataclasses

import pytest

from rlhf_jax import config as configs
from rlhf_jax.algorithms import policy_gradient, ppo
from rlhf_jax.commands import memory
from rlhf_jax.config import Config, Evaluation, Reward
from rlhf_jax.data import corpus, sources
from rlhf_jax.models import decoder, lora
from rlhf_jax.training.state import TrainState

CONFIG = Config(
    data=sources.Config(prompt_length=24, response_length=8),
    model=decoder.Config(layers=2, heads=2, head_size=8, width=16, context=32),
    ppo=ppo.Config(batch=32, epochs=1),
)
WRITE = configs.write(
    data=corpus.Config(length=9), model=CONFIG.model, policy_gradient=policy_gradient.Config(batch=32)
)

# Trunk: 50 x 16 + 32 x 16 embeddings, 32 of the last norm, two layers of 16 x 48 + 48, 16 x 16 + 16, 16 x 64 + 64,
# 64 x 16 + 16 and 64 of norms; 17 more of a scalar head.
POLICY = 82 * 16 + 32 + 2 * (768 + 48 + 256 + 16 + 1024 + 64 + 1024 + 16 + 64)
VALUE = POLICY + 17
COUNTS = 4 * 3 + 8 + 4  # step, skipped, applied, key (2 x 4), KL coefficient


def plan(devices=1, model=(), **changes):
    model = dataclasses.replace(CONFIG.model, **dict(model))
    return memory.rl(
        dataclasses.replace(CONFIG, model=model, ppo=dataclasses.replace(CONFIG.ppo, **changes)), 50, devices
    )


@pytest.fixture(scope="module")
def whole():
    return plan()


def test_the_state_by_hand(whole):
    # float32: four models, Adam's moments of two of them and its counts: 2 each (optax counts its schedule too)
    assert whole["state"] == 4 * (3 * (POLICY + VALUE) + 4) + 4 * (POLICY + VALUE) + COUNTS
    assert whole.keys() == {"state", "draw", "judge", "update"}


def test_adapters_share_one_base():
    """The base once, and adapters of rank 2 as policy, reference, value and reward, two with their moments."""
    config = dataclasses.replace(CONFIG, lora=lora.Config(rank=2))
    adapters = 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))  # two layers
    scalar = adapters + 17
    shapes = 4 * (POLICY + 3 * (adapters + scalar) + adapters + scalar + 4) + COUNTS
    planned = memory.rl(config, 50)
    assert planned["state"] == shapes
    assert all(planned[name] > shapes for name in ("draw", "judge", "update"))


def test_what_saves_memory_does(whole):
    """Fewer rows at a time, layers computed again, more devices; and each in its place."""
    assert plan(model={"remat": True})["update"] < 0.8 * whole["update"]
    few = plan(microbatches=8, lanes=4)
    assert few["update"] < 0.6 * whole["update"]
    assert few["draw"] < 0.8 * whole["draw"] and few["judge"] < 0.5 * whole["judge"]
    shared = plan(devices=4)
    assert shared["state"] == whole["state"] and shared["update"] < 0.6 * whole["update"]


def test_a_policy_gradient_has_a_policy_and_a_reference_and_keeps_the_best():
    """Adam's two moments and the reference beside the policy, whose best stays where that is the result."""
    last = dataclasses.replace(WRITE, evaluation=Evaluation(result="last"))
    best, last = memory.rl(WRITE, 50), memory.rl(last, 50)
    assert last["state"] == 4 * (4 * POLICY + 2) + COUNTS
    assert {name: best[name] - last[name] for name in best} == dict.fromkeys(last, 4 * POLICY)
    assert last["state"] < last["draw"] and last["state"] < last["judge"] < last["update"]


def test_each_algorithm_with_each_reward(monkeypatch):
    """PPO has a value model without a reward model; a policy gradient may have a learned reward."""
    monkeypatch.setattr(memory, "_beside", lambda *program: 0)  # the programs are traced, and not compiled
    value = memory.rl(dataclasses.replace(CONFIG, reward=Reward(kind="sentiment")), 50)
    assert value["state"] == 4 * (3 * (POLICY + VALUE) + 4) + 4 * POLICY + COUNTS
    learned = dataclasses.replace(CONFIG, algorithm="policy_gradient", policy_gradient=WRITE.policy_gradient)
    assert memory.rl(learned, 50)["state"] == 4 * (4 * POLICY + VALUE + 2) + COUNTS


def test_a_learned_reward_is_scored_beside_its_completions(monkeypatch):
    """judge is the larger of its two programs; the second finds the completions still there."""
    drawn = 32 * (1 + 8 * (4 + 1 + 4 + 4 * 16))  # done; response, mask, log-prob, hidden state
    for reward, judge in ((10, 10 + drawn), (-10 * drawn, 0)):
        # Of all programs, scoring alone has the reward's parameters in the place of a state.
        size = lambda _, args, reward=reward: 0 if isinstance(args[0], TrainState) else reward  # noqa: E731
        monkeypatch.setattr(memory, "_beside", size)
        sizes = plan()
        assert sizes["judge"] - sizes["state"] == judge
