"""What is said to the user in one line; `flperf.commands.common` prints it without a traceback."""


class UserError(Exception):
    """Something the user can mend: printed as one line, without a traceback."""


def first_line(error: Exception) -> str:
    """What a library's error says, in one line; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
