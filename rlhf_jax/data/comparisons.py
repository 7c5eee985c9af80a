"""Human comparisons of summaries (Stiennon et al. 2020), in the format of openai/summarize_from_feedback."""

from typing import Any

from rlhf_jax.data import tldr
from rlhf_jax.errors import InputError, short

COLUMNS = ("info", "summaries", "choice")
QUERY = ("subreddit", "title", "post")  # a news article has none of these


def pair(row: dict) -> dict[str, str]:
    """{"prompt", "chosen", "rejected"} of a row: info {subreddit, title, post}, two summaries {text}, choice 0 or 1."""
    info, summaries, choice = (row[column] for column in COLUMNS)
    parts: list[Any] = [info.get(name) if isinstance(info, dict) else None for name in QUERY]
    if not all(isinstance(part, str) for part in parts):
        raise InputError(f"info: expected texts {', '.join(QUERY)}, as in a Reddit post")
    if not isinstance(summaries, list) or not all(isinstance(summary, dict) for summary in summaries):
        raise InputError("summaries: expected a list of objects with a text")
    if len(summaries) != 2 or type(choice) is not int or choice not in (0, 1):
        raise InputError(f"choice: expected 0 or 1 and two summaries, got {short(repr(choice))} and {len(summaries)}")
    texts = [summary.get("text") for summary in summaries]
    return {"prompt": tldr.format_query(*parts), "chosen": texts[choice], "rejected": texts[1 - choice]}
