"""Posts of the embedded world and their summaries."""

import numpy as np
import pytest

from rlhf_jax.rewards import gold
from tests.support import changed, smallest, stages, write_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return smallest(tmp_path_factory.mktemp("world"))


def test_pairs_may_be_longer_than_responses(config, tmp_path):
    """Else those that are would be skipped."""
    longer = changed(config, data={"response_length": 40, "pair_length": 75})
    setup = stages(longer, tmp_path / "longer").setup
    arrays = setup.arrays("preferences")
    widths = {side[name].shape[1] for side in arrays[:2] for name in ("chosen_NR", "rejected_NR")}
    assert widths == {75} and setup.arrays("prompts") and setup.sampling(1.0).max_tokens == 40
    same = stages(changed(config, data={"response_length": 75}), tmp_path / "same").setup
    assert same.arrays("preferences").train["chosen_NR"].shape == arrays.train["chosen_NR"].shape


def test_gold_is_of_rows_with_a_record(config, tmp_path):
    task = stages(config, tmp_path).task
    rows = task.rows("sft").train
    texts = [row["label"] for row in rows]
    expected = [gold.score(row["record"], text) for row, text in zip(rows, texts, strict=True)]
    np.testing.assert_array_equal(task.judge(rows, texts)["gold"], expected)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a{i}", "label": "b"} for i in range(9)])
    files = stages(changed(config, data={"source": "files", "sft": path}), tmp_path / "files").task
    assert files.judge([{"prompt": "a"}], ["b"]) == {}
