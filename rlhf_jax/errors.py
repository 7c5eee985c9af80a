"""The one exception for what a user can mend: bad config, flags, data or files."""


class InputError(ValueError):
    """One line that names the field, or the file and row, and says what was expected there."""
