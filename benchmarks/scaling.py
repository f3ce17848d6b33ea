"""Starts groups of processes that train together on this machine, one thread each, and take updates on request."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runs import free_port

ROOT = Path(__file__).parents[1]
UPDATES = 2  # per request


class Workers:
    """A group of processes that can train at each of the given ZeRO stages."""

    def __init__(self, count: int, stages: tuple[int, ...]):
        # Each process computes with its share of the cores: with this local world size, one thread.
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": os.cpu_count(),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scaling_worker", *map(str, stages)],
                env={**os.environ, **{name: str(value) for name, value in common.items()}, "RANK": str(rank),
                "LOCAL_RANK": str(rank)},
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL if rank else subprocess.PIPE, text=True,
            )
            for rank in range(count)
        ]  # fmt: skip

    def update(self, stage: int = 1, *, profiled: bool = False) -> dict[str, float]:
        """Take `UPDATES` updates. Returns clips per second and, if profiled (which is slower), the share of
        communication."""
        first = self.processes[0]
        print(stage, UPDATES, int(profiled), file=first.stdin, flush=True)
        return json.loads(next(line for line in first.stdout if line.startswith("{")))

    def stop(self) -> None:
        print(0, 0, 0, file=self.processes[0].stdin, flush=True)
        for process in self.processes:
            process.communicate(timeout=60)


@contextmanager
def workers(count: int, stages: tuple[int, ...] = (1,)) -> Iterator[Workers]:
    """A group of `count` processes, ready to take updates. stages: the default one, or others."""
    group = Workers(count, stages)
    try:
        for stage in stages:
            group.update(stage)  # the first updates allocate memory
        yield group
        group.stop()
    finally:
        for process in group.processes:
            process.kill()
