"""The one exception for what a user can mend: bad config, flags, data or files."""

from collections.abc import Iterable


class InputError(ValueError):
    """One line that names the field, or the file and row, and says what was expected there."""


def short(text: str, most: int = 80) -> str:
    """The text, or the beginning of a long one: a value that is not the expected one can be of any size."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Iterable[str], separator: str = ", ", most: int = 5) -> str:
    """The names in one line. Those after the first `most` are only counted: "a, b, c, d, e and 7 more"."""
    names = list(names)
    more = len(names) - most
    return separator.join(names) if more <= 0 else f"{separator.join(names[:most])} and {more} more"
