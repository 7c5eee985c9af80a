"""The TL;DR query: a Reddit post with the request to summarize it (Stiennon et al. 2020, appendix B)."""

import bisect

from rlhf_jax.errors import InputError
from rlhf_jax.text import Tokenizer

POST = "\n\nPOST: "
END = "\n\nTL;DR:"
SLACK = 16  # tokens


def format_query(subreddit: str, title: str, post: str) -> str:
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}{POST}{post}{END}"


def completion(text: str, space: str = " ") -> str:
    """A summary as the text that follows a query: after one space, with nothing around it. EOS comes next.

    space: that of the tokenizer (text/__init__.py), which may put it before every text itself.
    """
    return space + text.strip()


def fit(prompt: str, tokenizer: Tokenizer, limit: int) -> tuple[list[int], bool]:
    """The ids of `prompt` in at most `limit` tokens, and whether its post was cut for that; "TL;DR:" always stays.

    The post loses all from its last newline on, again and again, and once no newline is left its last character, as in
    OpenAI's summarize-from-feedback. InputError if the prompt is too long and no TL;DR query, or if it is too long with
    no post at all.
    """
    ids = tokenizer.encode(prompt)
    if len(ids) <= limit:
        return ids, False
    header, mark, rest = prompt.partition(POST)
    if not mark or not rest.endswith(END):
        raise InputError(f"expected at most {limit} tokens or a post to cut ({POST!r}...{END!r}), got {len(ids)}")
    post = rest.removesuffix(END)

    def shortened(end):
        return tokenizer.encode(header + mark + post[:end] + END)

    # A longer text can take fewer tokens (a word made whole), but only by a few: bisect to near the limit, then step.
    ends = _cuts(post)
    near = bisect.bisect_left(ends, True, key=lambda end: len(shortened(end)) <= limit + SLACK)
    for end in ends[near:]:
        ids = shortened(end)
        if len(ids) <= limit:
            return ids, True
    raise InputError(f"expected at most {limit} tokens, got {len(shortened(0))} without the post")


def _cuts(post: str) -> list[int]:
    """Where the post can end, the longest first: at each newline, then at each character before the first of them."""
    newlines = [i for i, character in enumerate(post) if character == "\n"]
    return newlines[::-1] + list(range(newlines[0] if newlines else len(post)))[::-1]
