import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.perplexity import nll, perplexity

rows = st.lists(st.tuples(st.floats(0, 50), st.integers(1, 20)), min_size=1, max_size=10)


def test_perplexity_by_hand():
    # probabilities 1/2, 1/8 and 1/4: their product is 1/64, so 64^(1/3) = 4 choices a token, log 4 nats a token
    scores = dict(perplexity([np.log(2) + np.log(8), np.log(4)], [2, 1]))
    assert scores == pytest.approx({"loss": np.log(4), "perplexity": 4})


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary():
    nats_B, tokens_B = nll(np.full((3, 5), -np.log(97)), np.ones((3, 5)))
    assert dict(perplexity(nats_B, tokens_B))["perplexity"] == pytest.approx(97)


def test_padding_is_not_read():
    # real tokens have probability 1/2 and 1/4 in the first row and none in the second
    logp_BT = np.array([[np.nan, np.log(1 / 2), np.log(1 / 4)], [-np.inf, 3, np.nan]], np.float32)
    nats_B, tokens_B = nll(logp_BT, [[0, 1, 1], [0, 0, 0]])
    assert nats_B == pytest.approx([np.log(8), 0])
    assert tokens_B.tolist() == [2, 0]
    assert dict(perplexity(nats_B, tokens_B))["perplexity"] == pytest.approx(8**0.5)


@given(rows)
def test_tokens_weigh_the_same_however_rows_are_batched(rows):
    nats_N, tokens_N = np.array(rows).T
    one_batch = dict(perplexity(nats_N.sum(), tokens_N.sum()))
    assert dict(perplexity(nats_N, tokens_N)) == pytest.approx(one_batch)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(InputError, match="at least one token"):
        dict(perplexity([0.0], [0]))
