"""The models of tests/conftest.py with one layer: an algorithm does not look into them, and less is compiled."""

import dataclasses

import jax
import pytest

from rlhf_jax.models import heads
from rlhf_jax.rollout import Apply
from tests import conftest

ONE_LAYER = dataclasses.replace(conftest.TINY, layers=1)


@pytest.fixture(scope="session")
def apply():
    return Apply(heads.LanguageModel(ONE_LAYER, chunk=conftest.CHUNK), heads.ScalarModel(ONE_LAYER))


@pytest.fixture(scope="session")
def policy(apply):
    return conftest.spread(conftest.init(apply.policy, jax.random.key(0)), jax.random.key(8))


@pytest.fixture(scope="session")
def scalar(apply, policy):
    trunk = conftest.spread(conftest.init(apply.policy, jax.random.key(5)), jax.random.key(6))
    return apply.scalar.init(jax.random.key(4), policy) | {"trunk": trunk}
