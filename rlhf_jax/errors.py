"""What a user can mend: bad config, flags, data or files, and too little memory; and the exit codes of commands.

An exception with an `exit_code` ends a command with its message in one line, and with that code (command.py).
"""

from collections.abc import Iterable

BAD_INPUT, STOPPED, NOT_FINITE, OUT_OF_MEMORY = 2, 3, 4, 5  # 0: done
AGAIN = "the same command goes on from there"  # after a stop


class InputError(ValueError):
    """One line that names the field, or the file and row, and says what was expected there."""

    exit_code = BAD_INPUT


class OutOfMemory(MemoryError):
    """One line that says what was requested, what there is, and which fields need less."""

    exit_code = OUT_OF_MEMORY


def short(text: str, most: int = 80) -> str:
    """The text, or the beginning of a long one: a value that is not the expected one can be of any size."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Iterable[str], separator: str = ", ", most: int = 5) -> str:
    """The names in one line. Those after the first `most` are only counted: "a, b, c, d, e and 7 more"."""
    names = list(names)
    more = len(names) - most
    return separator.join(names) if more <= 0 else f"{separator.join(names[:most])} and {more} more"
