"""What all `flperf` commands share: a parser whose help ends with examples, and one-line error messages."""

import argparse
import logging
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from flperf.errors import UserError, printable


def command_parser(
    name: str, description: str, *examples: str, debug: str = "show tracebacks"
) -> argparse.ArgumentParser:
    """A parser with the option --debug. Its help shows the description and the examples."""
    parser = argparse.ArgumentParser(
        prog=f"flperf {name}",
        description=textwrap.fill(" ".join(description.split()), 100),
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help=debug)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The positional arguments `section.key=value`."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the configuration")


def make_parent_folder(path: str | Path) -> None:
    """Create the folder of a file to be written. Raises `UserError` if that fails, or if `path` is a folder."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: its folder can't be made: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")


def run_command(command: Callable[[list[str]], None], arguments: list[str] | None) -> None:
    """Run a command on `arguments`, or on those of the command line if None.

    A `UserError` is printed as one line, with exit status 1; with --debug it is raised.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # DeepSpeed logs this while it is imported; a run reports its device itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        command(arguments)
    except UserError as error:
        if "--debug" in arguments:
            raise
        sys.exit(f"flperf: {printable(str(error))}")
    except KeyboardInterrupt:
        if "--debug" in arguments:
            raise
        print("flperf: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
