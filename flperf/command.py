"""What every `flperf` command does alike: its help ends with an example; a mistake of the user's is said in one line, anything else
shows where it happened."""

import argparse
import logging
import sys
import textwrap
from collections.abc import Callable

from flperf.config import UserError


def command_parser(name: str, description: str, *examples: str, debug: str = "show tracebacks") -> argparse.ArgumentParser:
    """A parser with --debug whose help says what the command is for and how it is typed."""
    parser = argparse.ArgumentParser(
        prog=f"flperf {name}",
        description=textwrap.fill(" ".join(description.split()), 100),
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help=debug)
    return parser


def run_command(command: Callable[[list[str]], None], arguments: list[str] | None) -> None:
    """Run it on `arguments` (default: the command line's); a `UserError` becomes one line and exit status 1, a traceback with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed says so as it is imported, before anything of ours; what a run computes on is said by the run.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        command(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        sys.exit(f"flperf: {error}")
