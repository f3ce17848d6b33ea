"""Peak memory of a process: allocated on the GPU if there is one, else resident in RAM."""

from pathlib import Path

import torch

CLEAR_REFERENCES, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_REFERENCES.write_text("5")  # resets VmHWM (man 5 proc)


def peak_memory_bytes() -> int:
    """Peak since the last reset, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
