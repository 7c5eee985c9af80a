import dataclasses

import pytest

from rlhf_jax.algorithms import ppo
from rlhf_jax.commands import memory
from rlhf_jax.config import Config
from rlhf_jax.data import sources
from rlhf_jax.models import gpt2

CONFIG = Config(
    data=sources.Config(prompt_length=24, response_length=8),
    model=gpt2.Config(layers=2, heads=2, head_size=8, width=16, context=32),
    ppo=ppo.Config(batch=32, epochs=1),
)


def plan(devices=1, model=(), **changes):
    model = dataclasses.replace(CONFIG.model, **dict(model))
    return memory.ppo(
        dataclasses.replace(CONFIG, model=model, ppo=dataclasses.replace(CONFIG.ppo, **changes)), 50, devices
    )


@pytest.fixture(scope="module")
def whole():
    return plan()


def test_the_state_by_hand(whole):
    # Trunk: 50 x 16 + 32 x 16 embeddings, 32 of the last norm, two layers of 16 x 48 + 48, 16 x 16 + 16, 16 x 64 + 64,
    # 64 x 16 + 16 and 64 of norms; 17 more of a scalar head. float32: four models, Adam's moments of two of them, and
    # step, skipped, key (2 x 4), KL coefficient and Adam's counts: 2 each (optax counts its schedule too)
    trunk = 82 * 16 + 32 + 2 * (768 + 48 + 256 + 16 + 1024 + 64 + 1024 + 16 + 64)
    policy, value = trunk, trunk + 17
    assert whole["copy"] == 4 * (3 * (policy + value) + 4)
    assert whole["state"] == whole["copy"] + 4 * (policy + value) + 4 * 3 + 8


def test_what_saves_memory_does(whole):
    """Fewer rows at a time, layers computed again, more devices; and each in its place."""
    assert plan(microbatches=8)["update"] < 0.6 * whole["update"]
    assert plan(model={"remat": True})["update"] < 0.8 * whole["update"]
    laned = plan(lanes=4)
    assert laned["draw"] < 0.8 * whole["draw"] and laned["judge"] < 0.5 * whole["judge"]
    assert laned["update"] == whole["update"]
    shared = plan(devices=4)
    assert shared["state"] == whole["state"] and shared["update"] < 0.6 * whole["update"]
