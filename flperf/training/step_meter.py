"""The metrics of training steps: loss, throughput, stage times, MFU."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flperf.data.samplers import ClipBatch
from flperf.engine.devices import memory_gb, peak_flops
from flperf.run import TrainingRun, flops_per_clip
from flperf.training.profiler import StepProfile
from flperf.training.timing import StageTimer


class StepMeter:
    """Collects the metrics of the steps since they were last read. Losses stay on the device until then, so that no
    step waits for them."""

    def __init__(self, run: TrainingRun, profile: StepProfile | None = None):
        self.run, self.profile = run, profile
        self.timer = StageTimer(run.process.device)
        flops = sum(flops_per_clip(run).values())
        self.flops_per_step = flops * run.share.batch_size / run.process.world_size
        self.peak = peak_flops(run.process.device, run.dtype)
        self.clips = Counter(skipped_clips=0, short_clips=0)  # since this start
        self._restart()

    def _restart(self) -> None:
        self.losses: list[Tensor] = []
        self.started = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Count a step with this loss, a scalar on the device."""
        self.losses.append(loss)

    def count_clips(self, batch: ClipBatch) -> None:
        """Count the unreadable and the short clips of a batch."""
        self.clips.update(skipped_clips=len(batch.skipped), short_clips=len(batch.short))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a step. "data" is timed by the host's clock even on CUDA, because the device is idle then."""
        with self.timer.stage(name, host=name == "data"), self.profile.stage(name) if self.profile else nullcontext():
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in this context out of the throughput."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def read(self, step: int, epoch: int, rate: float) -> dict[str, Any]:
        """One line of metrics. Loss and counts of clips are over all processes, times are those of this process."""
        run, steps = self.run, len(self.losses)
        loss, clips = self._reduced()
        seconds = (time.perf_counter() - self.started) / steps
        stages, norm = self.timer.read(steps), run.engine.get_global_grad_norm()
        metrics = {
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "lr": rate,
            "grad_norm": None if norm is None else float(norm),
            "clips_per_s": run.share.batch_size / seconds,
            "tokens_per_s": run.share.batch_size * (run.geometry.context_tokens + run.geometry.target_tokens) / seconds,
            "step_ms": seconds * 1e3,
            **stages,
            "head_ms": stages["forward_ms"] + stages["backward_ms"],
            "mfu": self.flops_per_step / seconds / self.peak,
            "memory_gb": memory_gb(run.process.device),
            **clips,
            "skipped_updates": run.engine.skipped_steps,
        }
        self._restart()
        return metrics

    def _reduced(self) -> tuple[float, dict[str, int]]:
        """The mean loss and the counts of clips over all processes."""
        loss = torch.stack(self.losses).mean().double().cpu()
        counts = torch.tensor(list(self.clips.values()), dtype=torch.float64)
        totals = torch.cat([loss[None], counts]).to(self.run.process.device)
        dist.all_reduce(totals)
        loss_sum, *summed = totals.tolist()
        return loss_sum / self.run.process.world_size, dict(zip(self.clips, map(int, summed), strict=True))
