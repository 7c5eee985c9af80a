import itertools

import numpy as np

from rlhf_jax.evaluate.pass_at_k import pass_at_k
from tests.support import error


def test_by_hand():
    # 1 of 4 right: half of the 6 pairs have it; 0 and 4 of 4
    right_NO = [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_allclose(pass_at_k(right_NO, 1), [1 / 4, 0, 1])
    np.testing.assert_allclose(pass_at_k(right_NO, 2), [1 / 2, 0, 1])
    np.testing.assert_allclose(pass_at_k(right_NO, 4), [1, 0, 1])


def test_it_is_the_mean_over_all_subsets():
    right_NO = np.random.default_rng(0).random((5, 6)) < 0.3
    for k in range(1, 7):
        subsets = [right_NO[:, list(some)].any(axis=1) for some in itertools.combinations(range(6), k)]
        np.testing.assert_allclose(pass_at_k(right_NO, k), np.mean(subsets, axis=0))
    assert error(pass_at_k, right_NO, 7) == "pass_at_k: expected k from 1 to 6, the number of completions, got 7"
