"""How many cores this process may use, of those that it shares with the other processes of its machine."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CGROUPS, NODES, DEVICES = "/sys/fs/cgroup", "/sys/devices/system/node", "/sys/bus/pci/devices"
# For the step's own threads on a GPU: one launches kernels, one runs the backward pass. They launch late where they
# share their cores: SPDL's authors saw 4.2 steps/s with half of the CPU busy, and 2.7 to 3.0 with all of it.
CORES_OF_THE_STEP = 2


def cores_per_process() -> int:
    """This process's share of the cores, at least one. Processor affinity and a container's CPU quota count; both are
    divided by the number of processes on this machine, except an affinity that this process alone was given."""
    processes = processes_here()
    cores = len(os.sched_getaffinity(0))
    cores = cores if is_bound_alone() else cores // processes
    return max(1, min(cores, int(cpu_quota() / processes) if cpu_quota() else cores))


def reading_cores(device: torch.device) -> tuple[int, set[int]]:
    """(how many clips to read at a time, the cores to do it on) beside a step on this device. Beside a GPU reading
    stays on the cores near it, and leaves `CORES_OF_THE_STEP`; beside a CPU it takes all cores, as the step does."""
    if device.type != "cuda":
        return cores_per_process(), os.sched_getaffinity(0)
    own = device.index or 0
    gpus = range(max(own + 1, min(processes_here(), torch.cuda.device_count())))
    return cores_near([pci_address(gpu) for gpu in gpus], own)


def cores_near(gpus: list[str], own: int) -> tuple[int, set[int]]:
    """As `reading_cores`, for the GPU gpus[own]; `gpus` are the PCI addresses of those of all processes here."""
    allowed, share = os.sched_getaffinity(0), cores_per_process()
    nodes = [numa_node(gpu) for gpu in gpus]
    near = cores_of_node(nodes[own]) & allowed
    if not near:  # there are no NUMA nodes, they are hidden, or the affinity is to other cores
        near = allowed
    elif not is_bound_alone():
        share = min(share, len(near) // nodes.count(nodes[own]))
    return max(1, min(share, len(near)) - CORES_OF_THE_STEP), near


def pci_address(gpu: int) -> str:
    """The PCI address of a GPU, as 0000:1b:00.0."""
    of: Any = torch.cuda.get_device_properties(gpu)  # its stubs miss these
    return f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"


def processes_here() -> int:
    """The number of processes that torchrun (LOCAL_WORLD_SIZE) or DeepSpeed (LOCAL_SIZE) started on this machine, else
    of all processes."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)


def is_bound_alone() -> bool:
    """Whether this process was given cores of its own, as by `deepspeed --bind_cores_to_rank`: fewer than the process
    that started it."""
    try:
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    except OSError:  # the parent has ended
        return False


def cpu_quota() -> float | None:
    """The cores that the CPU quota of this process's control groups allows together; None without a quota."""
    quotas = [quota for folder in _control_groups() if (quota := _quota(folder))]
    return min(quotas, default=None)


def _control_groups() -> Iterator[Path]:
    """The folders of this process's control groups and of those above, of either version."""
    for line in own_groups():
        _, controllers, path = line.split(":", 2)
        root = Path(CGROUPS, "cpu") if "cpu" in controllers.split(",") else Path(CGROUPS) if not controllers else None
        if root:
            own = Path(path.lstrip("/"))
            yield from (root / folder for folder in (own, *own.parents))


def own_groups() -> list[str]:
    """Lines of number, controllers and path of this process's control groups."""
    return Path("/proc/self/cgroup").read_text().splitlines()


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def numa_node(gpu: str) -> int:
    """The NUMA node of a GPU by its PCI address, such as 0000:1b:00.0; -1 if it is unknown."""
    try:
        return int(Path(DEVICES, gpu.lower(), "numa_node").read_text())
    except (OSError, ValueError):
        return -1


def cores_of_node(node: int) -> set[int]:
    """The cores of a NUMA node; none if it is unknown."""
    try:
        ranges = Path(NODES, f"node{node}", "cpulist").read_text().strip().split(",")
    except OSError:
        return set()
    bounds = [(part.split("-")[0], part.split("-")[-1]) for part in ranges if part]
    return {core for first, last in bounds for core in range(int(first), int(last) + 1)}
