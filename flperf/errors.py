"""Errors that are shown to the user in one line; `flperf.commands.common` prints them without a traceback."""


class UserError(Exception):
    """A mistake that the user can fix. It is printed as one line, without a traceback."""


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the error's class if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
