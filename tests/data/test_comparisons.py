import pytest

from rlhf_jax.data import comparisons
from rlhf_jax.data.tldr import format_query
from rlhf_jax.errors import InputError

INFO = {"id": "t3", "subreddit": "advice", "title": "Cat", "post": "It sat.\nOn me.", "site": None, "article": None}
ROW = {"info": INFO, "summaries": [{"text": " A cat.", "policy": "ref"}, {"text": " A dog."}], "choice": 1}


def test_a_comparison_is_a_query_with_the_chosen_summary_first():
    assert comparisons.pair(ROW) == {
        "prompt": format_query("advice", "Cat", "It sat.\nOn me."),
        "chosen": " A dog.",
        "rejected": " A cat.",
    }
    other = comparisons.pair(ROW | {"choice": 0})
    assert (other["chosen"], other["rejected"]) == (" A cat.", " A dog.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": 2}, "choice: expected 0 or 1 and two summaries, got 2 and 2"),
        ({"choice": -1}, "choice: expected 0 or 1 and two summaries, got -1 and 2"),
        ({"choice": None}, "choice: expected 0 or 1 and two summaries, got None and 2"),
        ({"choice": True}, "choice: expected 0 or 1 and two summaries, got True and 2"),
        ({"summaries": ROW["summaries"][:1]}, "choice: expected 0 or 1 and two summaries, got 1 and 1"),
        ({"summaries": None}, "summaries: expected a list of objects with a text"),
        ({"summaries": ["a", "b"]}, "summaries: expected a list of objects with a text"),
        ({"info": None}, "info: expected texts subreddit, title, post, as in a Reddit post"),
        (
            {"info": INFO | {"post": None, "article": "News."}},
            "info: expected texts subreddit, title, post, as in a Reddit",
        ),
    ],
)
def test_what_is_no_comparison_of_posts_is_named(change, message):
    with pytest.raises(InputError) as caught:
        comparisons.pair(ROW | change)
    assert str(caught.value).startswith(message)
