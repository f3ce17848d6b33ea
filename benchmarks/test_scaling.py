"""Weak scaling from one process to two on this machine, one thread each, and the share of an update that goes into communication.

    python -m pytest benchmarks/test_scaling.py

An update is a whole one: clips drawn, encoder, head, backward, optimizer. One process and two take turns, so that what else the
machine does touches both. The efficiency is the clips/s of two over twice those of one; communication is the time in which a collective
is under way, waiting for the other process included.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.sizes import ON_GPU
from tests.runs import free_port

ROOT = Path(__file__).parents[1]
UPDATES, ROUNDS = 2, 5


class Workers:
    """A group of processes that train together."""

    def __init__(self, count: int, *overrides: str):
        # As many processes as cores on a machine get one thread each, so that is what they are told.
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": os.cpu_count(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.scaling_worker", *overrides],
                env={**os.environ, **{name: str(value) for name, value in common.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL if rank else subprocess.PIPE, text=True,
            )
            for rank in range(count)
        ]  # fmt: skip

    def update(self, *, profiled: bool = False) -> dict[str, float]:
        """Take some updates: clips a second and, if they were profiled (which slows them), the share of communication."""
        first = self.processes[0]
        print(UPDATES, int(profiled), file=first.stdin, flush=True)
        return json.loads(next(line for line in first.stdout if line.startswith("{")))

    def stop(self) -> None:
        print(0, 0, file=self.processes[0].stdin, flush=True)
        for process in self.processes:
            process.communicate(timeout=60)


@contextmanager
def workers(count: int, *overrides: str) -> Iterator[Workers]:
    group = Workers(count, *overrides)
    try:
        group.update()  # the first ones allocate
        yield group
        group.stop()
    finally:
        for process in group.processes:
            process.kill()


@pytest.mark.skipif(ON_GPU, reason="two processes share the cores of a CPU; GPUs need one each")
@pytest.mark.benchmark(group="weak scaling, two processes")
@pytest.mark.parametrize("stage", range(4))
def test_two_processes(benchmark, stage):
    alone, together = [], []
    with workers(1, f"engine.zero_stage={stage}") as one, workers(2, f"engine.zero_stage={stage}") as two:
        benchmark.pedantic(
            lambda: together.append(two.update()["clips_per_s"]),
            setup=lambda: alone.append(one.update()["clips_per_s"]),
            rounds=ROUNDS,
            warmup_rounds=1,
        )
        communication = two.update(profiled=True)["communication"]
    benchmark.extra_info |= {
        "clips_per_s": statistics.median(together),
        "clips_per_s_of_one": statistics.median(alone),
        "efficiency": statistics.median(both / (2 * single) for single, both in zip(alone, together, strict=True)),
        "communication": communication,
    }
