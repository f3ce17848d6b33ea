"""What is said to the user in one line; `flperf.command` prints it without a traceback."""


class UserError(Exception):
    """Something the user can mend: printed as one line, without a traceback."""
