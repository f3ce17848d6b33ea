"""Times the stages of a step without synchronising host and device."""

import time
from collections import defaultdict
from contextlib import contextmanager

import psutil
import torch


class StageTimer:
    """Measures the milliseconds that a step spends in each stage. On CUDA it records events, which `read` reads."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list] = defaultdict(list)

    @contextmanager
    def stage(self, name: str, host: bool = False):
        """Time a stage. host: use the host's clock even on CUDA, for stages in which the GPU is idle."""
        start = self._mark(host)
        yield
        self.spans[name].append((start, self._mark(host)))

    def read(self, steps: int) -> dict[str, float]:
        """Milliseconds by stage since the last call, the mean of `steps` steps."""
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
    """Seconds since this process started, imports included."""
    return time.time() - psutil.Process().create_time()
