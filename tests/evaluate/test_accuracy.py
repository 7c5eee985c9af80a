import numpy as np

from rlhf_jax.evaluate.accuracy import accuracy
from rlhf_jax.evaluate.interval import wilson


def test_accuracy_by_hand():
    # right, right, wrong, tie: (1 + 1 + 0 + .5) / 4
    assert accuracy([2.0, 1.0, 0.0, 5.0], [1.0, -1.0, 3.0, 5.0]) == (0.625, wilson(2.5, 4))


def test_a_constant_reward_model_is_a_coin_flip():
    assert accuracy(np.zeros(10), np.zeros(10))[0] == 0.5
