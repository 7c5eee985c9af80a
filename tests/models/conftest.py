"""The models of tests/conftest.py with two layers: what one layer leaves is read by the next."""

import dataclasses

import jax
import pytest

from rlhf_jax.models import heads
from rlhf_jax.rollout import Apply
from tests import conftest

TWO_LAYERS = dataclasses.replace(conftest.TINY, layers=2)


@pytest.fixture(scope="session")
def apply():
    return Apply(heads.LanguageModel(TWO_LAYERS, chunk=conftest.CHUNK), heads.ScalarModel(TWO_LAYERS))


@pytest.fixture(scope="session")
def policy(apply):
    return made(apply, 0)


@pytest.fixture(scope="session")
def reference(apply):
    return made(apply, 2)


@pytest.fixture(scope="session")
def scalar(apply, policy):
    return apply.scalar.init(jax.random.key(4), policy) | {"trunk": made(apply, 5)}


def made(apply, seed):
    return conftest.spread(conftest.init(apply.policy, jax.random.key(seed)), jax.random.key(seed + 1))
