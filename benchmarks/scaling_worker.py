"""A process of benchmarks/scaling.py: builds a run for each ZeRO stage among its arguments and takes updates on
request.

A request is a line on the standard input of rank 0: the stage, the number of updates (0 ends the process), and whether
to profile them (0 or 1). The reply is one line of JSON.
"""

import json
import sys
import time
from contextlib import nullcontext
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.sizes import BATCH, configuration
from flperf.engine.optimizer import set_schedule
from flperf.engine.process import Process, batch_share, start_process
from flperf.models.latents import Normaliser
from flperf.run import TrainingRun, build_components, build_training_engine
from flperf.training.loop import train_step
from flperf.training.step_meter import StepMeter


def seconds_of(profiler: profile, name: str) -> float:
    """Seconds during which at least one event whose name begins with `name` was in progress."""
    spans = [event.time_range for event in profiler.events() if event.name.startswith(name)]
    spans.sort(key=lambda span: span.start)
    ends = [0.0, *accumulate((span.end for span in spans), max)]
    return sum(max(0.0, span.end - max(span.start, end)) for span, end in zip(spans, ends, strict=False)) / 1e6


class Stage:
    """A run at one ZeRO stage, and its batches."""

    def __init__(self, stage: str, process: Process):
        keys = [f"trainer.batch_size={BATCH * process.world_size}", f"engine.zero_stage={stage}"]
        config = configuration("dit", "vjepa2", *keys, "engine.compile=false", "latents.embedding_norm=none")
        components = build_components(config, process, batch_share(config.trainer, process))
        normaliser, engine = Normaliser("none", components.dtype), build_training_engine(components)
        self.run = TrainingRun(**vars(components), normaliser=normaliser, baselines=None, engine=engine)
        self.batches = self.run.dataset.train_batches(0, self.run.share, process.device)
        self.meter = StepMeter(self.run)
        set_schedule(self.run.engine, 100, config.trainer, 1000)

    def update(self) -> None:
        train_step(self.run, self.batches, self.meter)


def main() -> None:
    process = start_process()
    stages = {int(stage): Stage(stage, process) for stage in sys.argv[1:]}
    request = torch.zeros(3, dtype=torch.int64)
    while True:
        if process.is_main:
            request.copy_(torch.tensor([int(word) for word in sys.stdin.readline().split()]))
        dist.broadcast(request, src=0)
        number, updates, profiled = request.tolist()
        if not updates:
            break
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) if profiled else nullcontext() as profiler:
            for _ in range(updates):
                stages[number].update()
            seconds = time.perf_counter() - start
        reply = {"clips_per_s": updates * BATCH * process.world_size / seconds}
        if profiled:
            reply["communication"] = seconds_of(profiler, "gloo:") / seconds
        if process.is_main:
            print(json.dumps(reply), flush=True)
    for stage in stages.values():
        stage.batches.close()


if __name__ == "__main__":
    main()
