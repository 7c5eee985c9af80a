import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.data import tldr
from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, char

CHAR = char.train(["abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ /:;\n"])
BPE = bpe.train(["SUBREDDIT TITLE POST TL DR international international \n\n:"] * 2, 400)

EMPTY = tldr.format_query("s", "t", "")
ROOM = len(EMPTY)  # characters around the post


def query(post):
    return tldr.format_query("s", "t", post)


def test_format_query():
    assert tldr.format_query("AskReddit", "Hi", "one\ntwo") == (
        "SUBREDDIT: r/AskReddit\n\nTITLE: Hi\n\nPOST: one\ntwo\n\nTL;DR:"
    )


@pytest.mark.parametrize("text", ["a b", " a b", "\n a b \n"])
def test_completion(text):
    assert tldr.completion(text) == " a b"


@pytest.mark.parametrize(
    ("post", "room", "left"),
    [
        ("one\ntwo\nsix", 11, "one\ntwo\nsix"),  # fits
        ("one\ntwo\nsix", 10, "one\ntwo"),
        ("one\ntwo\nsix", 7, "one\ntwo"),
        ("one\ntwo\nsix", 6, "one"),
        ("one\ntwo\nsix", 2, "on"),  # no newline left: characters
        ("one\n\nsix", 5, "one\n"),
        ("one\n\nsix", 3, "one"),
        ("\nsix", 3, ""),
        ("six", 0, ""),
    ],
)
def test_the_post_is_cut_at_its_last_newline_that_makes_it_fit(post, room, left):
    assert tldr.fit(query(post), CHAR, ROOM + room) == (CHAR.encode(query(left)), left != post)


def test_a_prompt_that_fits_is_left_alone_whatever_its_format():
    assert tldr.fit("hello", CHAR, 5) == (CHAR.encode("hello"), False)


def one_at_a_time(post, tokenizer, limit):
    while len(ids := tokenizer.encode(query(post))) > limit:
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return ids


@given(st.text("international \n", max_size=80), st.integers(0, 40))
def test_bisection_finds_what_cutting_one_at_a_time_finds(post, room):
    limit = len(BPE.encode(EMPTY)) + room
    ids, was_cut = tldr.fit(query(post), BPE, limit)
    assert ids == one_at_a_time(post, BPE, limit)
    assert was_cut == (BPE.encode(query(post)) != ids)


@pytest.mark.parametrize("words", range(1, 9))
def test_a_longer_text_with_fewer_tokens_is_not_passed_over(words):
    # A whole "international" is one token and a part of it is more: the bisection may land on such a part.
    post = "international" + " international" * (words - 1)
    limit = len(BPE.encode(query(post)))
    assert len(BPE.encode(query(post[:-1]))) > limit
    assert tldr.fit(query(post + "xyz" * 9), BPE, limit) == (BPE.encode(query(post)), True)


def test_a_long_post_is_cut_in_few_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(CHAR.__class__, "encode", lambda _, text: calls.append(text) or [0] * len(text))
    ids, was_cut = tldr.fit(query("x" * 100_000), CHAR, ROOM + 1_000)
    assert (len(ids), was_cut) == (ROOM + 1_000, True)
    assert len(calls) < 50


@pytest.mark.parametrize(
    "prompt",
    ["x" * 100, "TITLE: t\n\nPOST: " + "x" * 100, "TITLE: t" + "x" * 100 + "\n\nTL;DR:", query("x" * 100) + " "],
)
def test_another_format_that_is_too_long_is_an_error(prompt):
    with pytest.raises(InputError, match=f"expected at most 90 tokens or a post to cut .* got {len(prompt)}"):
        tldr.fit(prompt, CHAR, 90)


@pytest.mark.parametrize("post", ["", "x", "x\ny"])
def test_a_header_over_the_limit_is_an_error(post):
    with pytest.raises(InputError, match=f"expected at most {ROOM - 1} tokens, got {ROOM} without the post"):
        tldr.fit(query(post), CHAR, ROOM - 1)
