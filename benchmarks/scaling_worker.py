"""One of the processes of benchmarks/scaling.py: builds a run and takes updates when its first process is told to.

Each line on the standard input of rank 0 is a number of updates, 0 for the end, and whether to profile them (0 or 1); the answer is
one line of JSON.
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
from flperf.engine import set_schedule, start_process
from flperf.latents import Normaliser
from flperf.loop import Window, train_step
from flperf.run import build_run


def seconds_of(profiler: profile, name: str) -> float:
    """During which at least one event whose name begins like this was going on."""
    spans = [event.time_range for event in profiler.events() if event.name.startswith(name)]
    spans.sort(key=lambda span: span.start)
    ends = [0.0, *accumulate((span.end for span in spans), max)]
    return sum(max(0.0, span.end - max(span.start, end)) for span, end in zip(spans, ends, strict=False)) / 1e6


def main() -> None:
    process = start_process()
    batch = f"trainer.batch_size={BATCH * process.world_size}"
    run = build_run(configuration("dit", "vjepa2", batch, "engine.compile=false", "latents.embedding_norm=none", *sys.argv[1:]), process)
    run.normaliser = Normaliser("none", run.dtype)
    batches, window = run.dataset.train_batches(0, run.place, process.device), Window(run)
    set_schedule(run.engine, 100, run.config.trainer, 1000)
    order = torch.zeros(2, dtype=torch.int64)
    while True:
        if process.is_main:
            order.copy_(torch.tensor([int(word) for word in sys.stdin.readline().split()]))
        dist.broadcast(order, src=0)
        updates, profiled = order.tolist()
        if not updates:
            break
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) if profiled else nullcontext() as profiler:
            for _ in range(updates):
                train_step(run, batches, window)
            seconds = time.perf_counter() - start
        reply = {"clips_per_s": updates * run.place.batch_size / seconds}
        if profiled:
            reply["communication"] = seconds_of(profiler, "gloo:") / seconds
        if process.is_main:
            print(json.dumps(reply), flush=True)
    batches.close()


if __name__ == "__main__":
    main()
