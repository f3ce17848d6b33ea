"""What all benchmarks share: the device and its measured peaks, and how a result is recorded.

On a GPU the reference sizes run (ViT-L, 64 frames of 256 x 256), on a CPU small ones (width 192, 16 frames of 96 x 96). Peaks are
those of a matrix product and of a copy, measured in the same session: fractions of them compare across machines, seconds don't.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.sizes import DEVICE
from flperf.devices import copy_rate, peak_flops
from flperf.tracking import PACKAGES

CLEAR_REFERENCES, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def pytest_benchmark_update_machine_info(config, machine_info):
    """Results are compared within a cohort: the same device, versions beside it."""
    from importlib.metadata import version

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads of {_processor()}"
    machine_info["device"] = name
    machine_info["versions"] = {package: version(package) for package in PACKAGES}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "an unknown processor")


@pytest.fixture(scope="session")
def peaks() -> dict[str, float]:
    """FLOP/s of a matrix product in bf16 and fp32, and bytes/s of a copy (read and written), the best of a few."""
    return {"bf16": peak_flops(DEVICE, torch.bfloat16), "fp32": peak_flops(DEVICE, torch.float32), "copy": copy_rate(DEVICE)}


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_REFERENCES.write_text("5")  # resets VmHWM (man 5 proc)


def peak_memory_bytes() -> int:
    """The most this process has held since the last reset: allocated on the GPU, or resident on a CPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def record(benchmark, peaks) -> Callable:
    """`record(function, unit, count, flops=…, dtype=…)`: time calls of `function`, each of which handles `count` units."""

    def run(function: Callable[[], object], unit: str, count: float, *, flops: float = 0, dtype=torch.float32, rounds: int = 5) -> None:
        def timed() -> None:
            function()
            synchronise()

        timed()
        reset_peak_memory()
        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
        seconds, info = benchmark.stats.stats.median, benchmark.extra_info
        info[f"{unit}_per_s"] = count / seconds
        info["peak_memory_bytes"] = peak_memory_bytes()
        info["copy_GB_per_s"] = peaks["copy"] / 1e9
        if flops:
            peak = peaks["bf16" if dtype == torch.bfloat16 else "fp32"]
            info |= {"FLOPs": flops, "fraction_of_peak": flops / seconds / peak, "peak_TFLOP_per_s": peak / 1e12}

    return run
