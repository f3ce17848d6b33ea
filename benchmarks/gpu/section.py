"""Runs one section in this process: `python -m benchmarks.gpu.section JOB`, started by `benchmarks.gpu`."""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import sizes
from benchmarks.gpu.results import Results


class OutOfTime(Exception):
    """The section's time is used up."""


class Section:
    """What a section's code gets: where its results go, a folder that all sections share, and how much time is left."""

    def __init__(self, name: str, results: Results, end: float, folder: Path):
        self.name, self.results, self.folder = name, results, folder
        self.end = end  # by time.monotonic, which all processes share

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def row(self, table: str, row: str, **values: Any) -> None:
        self.results.row(self.name, table, row, **values)

    def attempt(self, what: str, function: Callable[[], object], needs: float = 0) -> None:
        """Call a function that may fail: the error is recorded, and the section goes on. `needs`: the seconds that it
        takes; it is left out if there are fewer."""
        try:
            if self.left < needs:
                raise OutOfTime(f"left out: it takes some {needs:.0f} s, and {max(0, self.left):.0f} are left")
            function()
        except OutOfTime as reason:
            self.results.note(self.name, f"{what}: {reason}")
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())[:500]
            self.results.fail(self.name, f"{what}: {type(error).__name__}: {text}")


def main(job: str) -> None:
    options = json.loads(job)
    if options["quick"]:  # before other benchmarks are imported
        sizes.be_quick()
    torch._dynamo.config.recompile_limit = 64  # one process compiles the same blocks at many sizes
    results, folder = Results(Path(options["results"])), Path(options["folder"])
    section = Section(options["section"], results, options["end"], folder)

    def stop(*_: object) -> None:
        raise OutOfTime("the section's time was used up")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, section.left))
    section.attempt(section.name, lambda: importlib.import_module(f"benchmarks.gpu.{section.name}").measure(section))
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.flush()
    os._exit(0)  # readers and pipelines may still be at work


if __name__ == "__main__":
    main(sys.argv[1])
