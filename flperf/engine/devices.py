"""Performance of devices: a table of data-sheet values with their sources, and measurements of the device in use."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import psutil
import torch

from flperf.errors import UserError

MAX_PRODUCT_SECONDS = 0.1  # of one matrix product that is timed on a CPU
MIN_TIMING_SECONDS = 0.2  # of all repetitions together: longer than another process keeps a core at a time


@dataclass(frozen=True)
class Device:
    """Data of one device. Rates are per second: dense FLOPs (without sparsity), one direction of a link. None:
    unknown or not applicable."""

    name: str
    peaks: dict[torch.dtype, float]  # FLOP/s of matrix products
    memory: float  # bytes
    bandwidth: float  # bytes/s of memory, read and written
    link: float | None  # bytes/s to the other devices of the node
    network: float | None  # bytes/s to other nodes; assumes one adapter per device, as in the vendor's systems
    devices_per_node: int
    source: str

    @property
    def is_gpu(self) -> bool:
        return self.link is not None


DEVICES = {
    "a100": Device(
        name="A100 SXM 80 GB",
        peaks={torch.bfloat16: 312e12},
        memory=80e9,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        devices_per_node=8,
        source="NVIDIA A100 data sheet; DGX A100 data sheet (HDR InfiniBand, 200 Gb/s a GPU)",
    ),
    "h100": Device(
        name="H100 SXM 80 GB",
        peaks={torch.bfloat16: 989e12},
        memory=80e9,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        devices_per_node=8,
        source="NVIDIA H100 data sheet; DGX H100 data sheet (NDR InfiniBand, 400 Gb/s a GPU)",
    ),
    "h200": Device(
        name="H200 SXM 141 GB",
        peaks={torch.bfloat16: 989e12},
        memory=141e9,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        devices_per_node=8,
        source="NVIDIA H200 data sheet; DGX H200 data sheet (NDR InfiniBand, 400 Gb/s a GPU)",
    ),
    "b200": Device(
        name="B200 SXM 180 GB",
        peaks={torch.bfloat16: 2250e12},
        memory=180e9,
        bandwidth=8e12,
        link=900e9,
        network=50e9,
        devices_per_node=8,
        source="NVIDIA HGX B200 and DGX B200 data sheets (400 Gb/s a GPU)",
    ),
}


def find_device(name: str) -> Device:
    """A device of the table by its key; "cpu" measures this machine's processor. Raises `UserError` for any other
    name."""
    if name == "cpu":
        return measured_cpu()
    if name not in DEVICES:
        raise UserError(f"--device: {name!r} is unknown; known: {', '.join([*DEVICES, 'cpu'])}")
    return DEVICES[name]


def measured_cpu() -> Device:
    """This machine's processor as one device, with PyTorch's current number of threads."""
    cpu = torch.device("cpu")
    return Device(
        name=f"this CPU, threads: {torch.get_num_threads()}",
        peaks={dtype: measured_flops(cpu, dtype) for dtype in (torch.bfloat16, torch.float32)},
        memory=psutil.virtual_memory().total,
        bandwidth=copy_rate(cpu),
        link=None,
        network=None,
        devices_per_node=1,
        source="measured now: matrix products and a copy",
    )


def device_here(device: torch.device, dtype: torch.dtype) -> Device:
    """The data of a device of this machine: the table's if it has any for this dtype, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    for key, known in DEVICES.items():
        if key.upper() in name and dtype in known.peaks:
            return known
    peaks, memory = {dtype: measured_flops(device, dtype)}, psutil.virtual_memory().total
    return Device(name, peaks, memory, copy_rate(device), None, None, devices_per_node=1, source="measured now")


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: the table's value if it has one for this device and dtype, else a measurement."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, known in DEVICES.items():
            if key.upper() in name and dtype in known.peaks:
                return known.peaks[dtype]
    return measured_flops(device, dtype)


@cache  # used twice at a start: to choose the precision, and for MFU
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products. On a CPU their size grows while the next one would take less than
    about `MAX_PRODUCT_SECONDS`, because emulated bf16 is a hundred times slower than fp32."""
    rate = 0.0
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024):
        a, b = (
            torch.randn(size, size, device=device).to(dtype) for _ in range(2)
        )  # random, because GPUs are faster on constants
        seconds = best_seconds(lambda: a @ b, device)  # noqa: B023
        rate = max(rate, 2 * size**3 / seconds)
        if 8 * seconds > MAX_PRODUCT_SECONDS:
            break
    return rate


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy, counting bytes read and bytes written."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of at least six calls, which together take at least `MIN_TIMING_SECONDS`: another process could slow
    down all of six short calls."""
    durations: list[float] = []
    while len(durations) < 6 or sum(durations) < MIN_TIMING_SECONDS:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return min(durations)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (10^9 bytes): allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
