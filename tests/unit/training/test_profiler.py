"""The table of `--profile` on a GPU, from events as PyTorch's profiler reports them there. (On a CPU a real run is
profiled elsewhere.)"""

import re

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from flperf.training.profiler import RECORDED, STAGES, stage_table


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
