import json
import os
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.rouge import rouge

DATA = Path(os.environ.get("RLHF_JAX_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_rouge_by_hand():
    # target "the cat sat on the mat" (6 words), prediction "the cat on a mat" (5 words)
    # words in common: the cat on mat, 4;      p = 4/5, r = 4/6, F = 2 * 4 / (5 + 6) = 8/11
    # bigrams in common: "the cat", 1 of 4, 5; F = 2 * 1 / (4 + 5) = 2/9
    # longest common subsequence: the cat on mat, 4; F = 8/11
    scores = dict(rouge(["The cat sat on the mat."], ["the cat on a mat"]))
    assert scores == pytest.approx({"rouge1": 8 / 11, "rouge2": 2 / 9, "rougeL": 8 / 11})


def test_only_rouge_l_depends_on_the_order_of_single_words():
    # a b c against c b a: all three words are shared, no bigram is, and the longest common subsequence is one word
    assert dict(rouge(["a b c"], ["c b a"])) == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 1 / 3})


def test_a_repeated_word_counts_as_often_as_the_target_has_it():
    # 1 of 4 predicted words and 1 of 1 target words: F = 2 * 1 / (4 + 1)
    assert dict(rouge(["yes"], ["yes yes yes yes"]))["rouge1"] == pytest.approx(0.4)


def test_the_mean_is_over_pairs_and_an_empty_prediction_scores_zero():
    assert dict(rouge(["a b", "a b"], ["a b", ""])) == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5})


def test_stemming_is_an_option():
    assert dict(rouge(["walking"], ["walked"]))["rouge1"] == 0
    assert dict(rouge(["walking"], ["walked"], stemmer=True))["rouge1"] == 1


def test_no_pairs_is_an_error():
    with pytest.raises(InputError, match="at least one pair"):
        dict(rouge([], []))


@pytest.mark.parametrize(("stemmer", "suffix"), [(False, ""), (True, "_stem")])
def test_goldens_on_real_summaries(stemmer, suffix):
    path = DATA / "goldens" / "rouge_tldr.json"
    if not path.exists():
        pytest.skip("the shared golden file rouge_tldr.json is not here")
    rows = json.loads(path.read_text())["rows"]
    expected = {name: [row[name + suffix][2] for row in rows] for name in ("rouge1", "rouge2", "rougeL")}
    scores = [dict(rouge([row["target"]], [row["prediction"]], stemmer=stemmer)) for row in rows]
    means = dict(rouge([row["target"] for row in rows], [row["prediction"] for row in rows], stemmer=stemmer))
    for name, expected_N in expected.items():
        np.testing.assert_allclose([score[name] for score in scores], expected_N, atol=1e-12)
        assert means[name] == pytest.approx(np.mean(expected_N))
