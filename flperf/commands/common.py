"""What every `flperf` command does alike: its help ends with an example; a mistake of the user's is said in one line,
anything else shows where it happened."""

import argparse
import logging
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from flperf.errors import UserError


def command_parser(
    name: str, description: str, *examples: str, debug: str = "show tracebacks"
) -> argparse.ArgumentParser:
    """A parser with --debug whose help says what the command is for and how it is typed."""
    parser = argparse.ArgumentParser(
        prog=f"flperf {name}",
        description=textwrap.fill(" ".join(description.split()), 100),
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help=debug)
    return parser


def make_folder_of(path: str | Path) -> None:
    """For a file that is to be written. Raises `UserError` where it can't be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: its folder can't be made: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")


def run_command(command: Callable[[list[str]], None], arguments: list[str] | None) -> None:
    """Run it on `arguments` (default: the command line's); a `UserError` becomes one line and exit status 1, a
    traceback with --debug."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed says so as it is imported, before anything of ours; what a run computes on is said by the run.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        command(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        sys.exit(f"flperf: {error}")
