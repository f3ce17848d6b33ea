"""`--profile`: shows where the time of a step goes, as a table and as a trace for Perfetto or chrome://tracing, and on
CUDA where its memory goes, as a snapshot for https://pytorch.org/memory_viz.

Stages are timed as in every run (on CUDA by events). Copies, collectives and idle time come from PyTorch's profiler,
which records a few steps after the first ones have compiled.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import cuda
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule

from flperf.engine.process import Process
from flperf.errors import first_line
from flperf.training.timing import StageTimer

WAIT, WARM_UP, RECORDED = 3, 1, 5  # steps
PROFILED_STEPS = WAIT + WARM_UP + RECORDED
STAGES = {
    "data": "wait for data",
    "encode": "encoder",
    "forward": "head, forward",
    "backward": "head, backward",
    "optim": "optimizer",
}
COLLECTIVES = ("nccl", "gloo:", "c10d::")
COPIES = ("Memcpy HtoD",)
ALLOCATIONS = 200_000  # at most this many are recorded; each takes about a kilobyte of the snapshot


class StepProfile:
    """A context manager; call `step` after every step. Every process profiles itself, only the main one writes."""

    def __init__(self, folder: Path, process: Process):
        self.folder, self.process, self.timer = folder, process, StageTimer(process.device)
        self.table, self.steps = "", 0
        self.memory = MemorySnapshot(folder / "memory.pickle") if process.is_main and self.timer.on_gpu else None
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (process.device.type == "cuda")
        steps = schedule(wait=WAIT, warmup=WARM_UP, active=RECORDED, repeat=1)
        self.profiler = profile(activities=activities, schedule=steps, on_trace_ready=self._write, acc_events=True)

    def __enter__(self) -> "StepProfile":
        self.profiler.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.profiler.__exit__(*error)
        if self.memory:
            self.memory.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and mark it in the trace."""
        with torch.profiler.record_function(f"flperf {name}"), self.timer.stage(name, host=name == "data"):
            yield

    def step(self) -> bool:
        """Whether this was the last recorded step, so that `table` is now complete."""
        self.steps += 1
        if self.steps == WAIT + WARM_UP:
            self.timer.spans.clear()
            if self.memory:
                self.memory.start()
        self.profiler.step()  # calls `_write` after the last recorded step
        return self.steps == PROFILED_STEPS

    def _write(self, profiler: profile) -> None:
        self.table = stage_table(self.timer.read(RECORDED), profiler.events(), self.process.device.type == "cuda")
        if self.process.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
            (self.folder / "table.txt").write_text(self.table + "\n")
        if self.memory and (problem := self.memory.write()):
            self.table += f"\n{problem}"


class MemorySnapshot:
    """Every allocation on the GPU from `start` to `write`, with the line of Python that made it. A run does not end
    where recording fails."""

    def __init__(self, file: Path):
        self.file = file
        self.problem = ""

    def start(self) -> None:
        try:
            cuda.memory._record_memory_history(max_entries=ALLOCATIONS, stacks="python")
        except RuntimeError as error:
            self.problem = f"no memory snapshot: {first_line(error)}"

    def write(self) -> str:
        """Write the snapshot and stop. Returns a line for the user if there is none, else an empty text."""
        try:
            if not self.problem:
                cuda.memory._dump_snapshot(str(self.file))
        except (RuntimeError, OSError) as error:
            self.file.unlink(missing_ok=True)  # half a snapshot can't be opened
            self.problem = f"no memory snapshot: {first_line(error)}"
        self.stop()
        return self.problem

    def stop(self) -> None:
        try:
            cuda.memory._record_memory_history(enabled=None)
        except RuntimeError as error:
            self.problem = self.problem or f"memory is still recorded: {first_line(error)}"


def stage_table(stages: dict[str, float], events: Iterable[FunctionEvent], on_gpu: bool) -> str:
    """Milliseconds per step and share of the step, as text. stages: from `StageTimer`; events: from a profile of
    `RECORDED` steps."""
    # On a GPU count only events of the device: the operators and ranges around a kernel contain its time again.
    active = (
        [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        if on_gpu
        else events
    )

    def milliseconds(parts: tuple[str, ...]) -> float:
        """Time of the events with one of `parts` in their name, without the events that they called."""
        chosen = [event for event in active if any(part in event.name for part in parts)]
        times = (event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in chosen)
        return sum(times) / 1e3 / RECORDED

    step = sum(event.cpu_time_total for event in events if event.name.startswith("ProfilerStep")) / 1e3 / RECORDED
    rows = {label: stages[f"{name}_ms"] for name, label in STAGES.items()}
    # A CPU is idle outside the stages, a GPU while no event runs on any of its streams.
    idle = step - (busy(active) / 1e3 / RECORDED if on_gpu else sum(rows.values()))
    rows |= {
        "of it copies": milliseconds(COPIES),
        "of it collectives": milliseconds(COLLECTIVES),
        "idle": max(0.0, idle),
        "whole step": step,
    }
    return "\n".join(f"{label:>18} {value:9.2f} ms {value / step:7.1%}" for label, value in rows.items())


def busy(events: Iterable[FunctionEvent]) -> float:
    """Microseconds during which at least one of the events ran."""
    total = reached = 0.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
