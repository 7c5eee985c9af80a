"""What a user can mend: bad config, flags, data or files, and too little memory; and the exit codes of commands.

An exception with an `exit_code` ends a command with its message in one line, and with that code (command.py).
"""

BAD_INPUT, STOPPED, NOT_FINITE, OUT_OF_MEMORY = 2, 3, 4, 5  # 0: done


class InputError(ValueError):
    """One line that names the field, or the file and row, and says what was expected there."""

    exit_code = BAD_INPUT


class OutOfMemory(MemoryError):
    """One line that says what was requested, what there is, and which fields need less."""

    exit_code = OUT_OF_MEMORY
