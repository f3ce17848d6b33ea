"""What a step costs: stage timers without host synchronisation, FLOP counts, memory."""

import time
from collections import defaultdict
from contextlib import contextmanager

import psutil
import torch


class StageTimer:
    """Milliseconds a step spends in each stage. On CUDA by events, which are read only when the numbers are asked
    for."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list] = defaultdict(list)

    @contextmanager
    def stage(self, name: str, host: bool = False):
        """host=True times the host's wait even on CUDA (data: the GPU is idle then)."""
        start = self._mark(host)
        yield
        self.spans[name].append((start, self._mark(host)))

    def read(self, steps: int) -> dict[str, float]:
        """Mean milliseconds a step since the last reading, by stage."""
        if self.on_gpu:
            torch.cuda.synchronize()
        result = {f"{name}_ms": sum(map(_milliseconds, spans)) / steps for name, spans in self.spans.items()}
        self.spans.clear()
        return result

    def _mark(self, host: bool):
        if not self.on_gpu or host:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _milliseconds(span) -> float:
    start, end = span
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def process_seconds() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()
