"""What `--profile` shows of a GPU: the table, from events as PyTorch's profiler reports them there, and when a memory
snapshot is recorded. (On a CPU a real run is profiled elsewhere.)"""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from flperf.engine.process import Process
from flperf.training import profiler
from flperf.training.profiler import PROFILED_STEPS, RECORDED, STAGES, MemorySnapshot, StepProfile, stage_table


def gpu_events() -> EventList:
    """Steps of 10 ms. A GPU works from 0.1 to 5.1 ms in each: 4 ms of a product and 1 ms of a collective, and beside
    the product a copy."""
    events = EventList([], use_device="cuda", profile_memory=False, with_flops=False)

    def add(name: str, start: int, end: int, device: DeviceType = DeviceType.CUDA, **options) -> FunctionEvent:
        events.append(FunctionEvent(len(events), name, 0, start, end, device_type=device, use_device="cuda", **options))
        return events[-1]

    for step in range(RECORDED):
        t = 10_000 * step
        add(f"ProfilerStep#{step}", t, t + 10_000, DeviceType.CPU)
        add("aten::mm", t + 10, t + 20, DeviceType.CPU).append_kernel("gemm", 0, 4000)
        add("nccl:all_reduce", t + 30, t + 40, DeviceType.CPU).append_kernel("ncclDevKernel_AllReduce", 0, 1000)
        add("gemm", t + 100, t + 4100)
        add("Memcpy HtoD (Pinned -> Device)", t + 1000, t + 1500)
        add("ncclDevKernel_AllReduce", t + 4100, t + 5100)
        add(f"ProfilerStep#{step}", t + 100, t + 5100, is_user_annotation=True)
        add("flperf encode", t + 100, t + 5100, is_user_annotation=True)
        add("nccl:all_reduce", t + 4100, t + 5100, is_user_annotation=True)
    events._build_tree()
    return events


def test_work_on_a_gpu_counts_once():
    table = stage_table({f"{name}_ms": 1.0 for name in STAGES}, gpu_events(), on_gpu=True)
    rows = {name: float(value) for name, value in re.findall(r"^\s*(.+?)\s+([\d.]+) ms", table, flags=re.M)}
    found = {name: rows[name] for name in ("of it copies", "of it collectives", "idle", "whole step")}
    assert found == pytest.approx({"of it copies": 0.5, "of it collectives": 1.0, "idle": 5.0, "whole step": 10.0})


class Recorder:
    """Stands for `torch.cuda.memory`, which needs a GPU."""

    def __init__(self, broken: str = ""):
        self.calls: list[str] = []
        self.broken = broken

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.broken == name:
            raise RuntimeError(f"{name} failed\nand a traceback of C++")

    def _record_memory_history(self, enabled: str | None = "all", **options) -> None:
        self._call("start" if enabled else "stop")

    def _dump_snapshot(self, file: str) -> None:
        Path(file).write_text("half")
        self._call("write")


@pytest.mark.parametrize(
    ("broken", "calls", "line"),
    [
        ("", ["start", "write", "stop"], ""),
        ("start", ["start", "stop"], "no memory snapshot: start failed"),
        ("write", ["start", "write", "stop"], "no memory snapshot: write failed"),
    ],
)
def test_a_memory_snapshot_is_written_whole_or_its_absence_explained(broken, calls, line, tmp_path, monkeypatch):
    recorder = Recorder(broken)
    monkeypatch.setattr(profiler.cuda, "memory", recorder)
    snapshot = MemorySnapshot(tmp_path / "memory.pickle")
    snapshot.start()
    assert snapshot.write() == line and recorder.calls == calls
    assert (tmp_path / "memory.pickle").exists() is (not broken)


def test_memory_is_recorded_in_the_profiled_steps_alone(tmp_path, monkeypatch):
    recorder, steps = Recorder(), []
    monkeypatch.setattr(profiler.cuda, "memory", recorder)
    with StepProfile(tmp_path, Process(0, 0, 1, torch.device("cpu"))) as profile:
        profile.memory = MemorySnapshot(tmp_path / "memory.pickle")
        for _ in range(PROFILED_STEPS):
            for name in STAGES:
                with profile.stage(name):
                    pass
            profile.step()
            steps.append(len(recorder.calls))
    assert steps == [0] * (PROFILED_STEPS - RECORDED - 1) + [1] * RECORDED + [3] and profile.table.endswith("%")
