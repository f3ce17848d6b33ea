"""What every `flperf` command does alike: a mistake of the user's is said in one line, anything else shows where it happened."""

import sys
from collections.abc import Callable

from flperf.config import UserError


def run_command(command: Callable[[list[str]], None], arguments: list[str] | None) -> None:
    """Run it on `arguments` (default: the command line's); a `UserError` becomes one line and exit status 1, a traceback with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        sys.exit(f"flperf: {error}")
