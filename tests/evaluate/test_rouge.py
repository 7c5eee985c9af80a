import json
from collections import Counter
from random import Random

import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.evaluate.rouge import rouge
from tests import support


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


def f(common, predicted, there):
    return 2 * common / (predicted + there) if common else 0.0


def subsequence(a, b):
    """The length of the longest common subsequence."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1]


def oracle(target, prediction):
    """Lin 2004 on lists of words: F1 of the common words and bigrams, and of the longest common subsequence."""
    scores = {"rougeL": f(subsequence(target, prediction), len(prediction), len(target))}
    for n in 1, 2:
        there, predicted = (
            Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (target, prediction)
        )
        scores[f"rouge{n}"] = f((there & predicted).total(), predicted.total(), there.total())
    return scores


# Porter's stems; words of three letters are left alone.
STEMS = {"walking": "walk", "walked": "walk", "walk": "walk", "cats": "cat", "cat": "cat", "happily": "happili"}
STEMS |= {"the": "the", "as": "as", "ponies": "poni", "pony": "poni", "22": "22"}


@pytest.mark.parametrize("stemmer", [False, True])
def test_it_is_the_formula_on_generated_texts(stemmer):
    draw = Random(0)
    pairs = [[draw.choices(list(STEMS), k=draw.randrange(0, 40)) for _ in range(2)] for _ in range(100)]
    expected = [oracle(*([STEMS[w] if stemmer else w for w in words] for words in pair)) for pair in pairs]
    texts = [[", ".join(words).capitalize() + "." for words in pair] for pair in pairs]
    scores = [dict(rouge([target], [prediction], stemmer=stemmer)) for target, prediction in texts]
    means = dict(rouge(*zip(*texts, strict=True), stemmer=stemmer))
    for name in "rouge1", "rouge2", "rougeL":
        expected_N = [row[name] for row in expected]
        assert 0.05 < np.mean(expected_N) < 0.95
        np.testing.assert_allclose([score[name] for score in scores], expected_N, atol=1e-12)
        assert means[name] == pytest.approx(np.mean(expected_N))


@pytest.mark.parametrize(("stemmer", "suffix"), [(False, ""), (True, "_stem")])
def test_goldens_on_real_summaries(stemmer, suffix):
    """Real people's summaries, which are not ours to publish."""
    rows = json.loads(support.shared("goldens/rouge_tldr.json").read_text())["rows"]
    expected = {name: [row[name + suffix][2] for row in rows] for name in ("rouge1", "rouge2", "rougeL")}
    scores = [dict(rouge([row["target"]], [row["prediction"]], stemmer=stemmer)) for row in rows]
    means = dict(rouge([row["target"] for row in rows], [row["prediction"] for row in rows], stemmer=stemmer))
    for name, expected_N in expected.items():
        np.testing.assert_allclose([score[name] for score in scores], expected_N, atol=1e-12)
        assert means[name] == pytest.approx(np.mean(expected_N))
