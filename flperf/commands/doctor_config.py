"""The checks of `flperf doctor --config`: does a run fit this machine, can it open all that it reads, and does reading
keep up with the step?"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from flperf.commands.doctor_machine import Finding, cached_weights
from flperf.config import Config, load_config
from flperf.errors import UserError

if TYPE_CHECKING:  # torch is loaded by the checks that need it
    from flperf.data import Dataset
    from flperf.run import Components

CLIPS = 10
LOCAL_PROCESSES = "LOCAL_WORLD_SIZE"  # torchrun's variable
TIMED_CLIPS, TIMED_BATCH = 32, 4
TIME_LIMIT = 20.0  # seconds of reading that is timed
FIX_AND_REPEAT = "fix what this line names, then run the same command again"


def configured(path: str, overrides: list[str]) -> Iterator[Finding]:
    """Load a configuration, estimate its memory, and open its backbone, its data and a few clips."""
    try:
        config = load_config(path, overrides)
        yield Finding("config", f"{path}: a {config.model.head} on {config.backbone.kind}, {config.dataset.kind}")
        yield from memory_check(config)
        yield from gated_weights(config)
        yield from run_check(config)
    except UserError as error:
        yield Finding("config", str(error), FIX_AND_REPEAT)


def processes_of_run() -> int:
    """The number of processes of a run on this machine: one per GPU."""
    import torch

    return max(torch.cuda.device_count(), 1)


def memory_check(config: Config) -> Iterator[Finding]:
    """The estimated memory of training on each device of this machine, at each ZeRO stage."""
    import psutil
    import torch

    from flperf.engine.devices import DEVICES
    from flperf.engine.process import compute_dtype
    from flperf.estimate.workload import build_workload

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    # The memory estimate uses no other properties of a device than these two.
    here = replace(
        DEVICES["h100"], memory=gpu or psutil.virtual_memory().total, link=DEVICES["h100"].link if gpu else None
    )
    processes = processes_of_run()
    try:
        workload = build_workload(config, compute_dtype(config.engine.precision, device), processes)
    except UserError as error:
        yield Finding("memory", f"not estimated: {error}")
        return
    yield memory_finding(workload, here, processes)


def memory_finding(workload, device, processes: int) -> Finding:
    """Compare the estimated memory with the device's. If it does not fit, the fix lists single changes that make it
    fit."""
    from flperf.estimate.memory import device_memory

    config, limit = workload.config, device.memory
    mode, stage = config.model.activation_checkpointing, config.engine.zero_stage
    micro = workload.share.micro_batch_size
    held = {number: device_memory(workload, device, number, processes) for number in range(4)}
    totals = ", ".join(f"{number}: {held[number].total(mode) / 1e9:.1f}" for number in held)
    text = (
        f"{held[stage].total(mode) / 1e9:.1f} of {limit / 1e9:.1f} GB estimated at {micro} clips per process; "
        f"by ZeRO stage {totals}"
    )
    if held[stage].total(mode) <= limit:
        least = next(number for number in held if held[number].total(mode) <= limit)
        return Finding("memory", f"{text}; {zero_advice(stage, least, processes)}")
    growing = held[stage].clips + held[stage].activations[mode]  # in proportion to the micro-batch
    clips = int(micro * (limit - held[stage].total(mode) + growing) / growing)
    changes = [f"trainer.micro_batch_size={clips}"] if clips > 0 else []
    modes = [other for other in held[stage].activations if held[stage].total(other) <= limit]  # the fastest first
    changes += [f"model.activation_checkpointing={other}" for other in modes[:1]]
    stages = [number for number in held if number > stage and held[number].total(mode) <= limit]
    changes += [f"engine.zero_stage={number}" for number in stages[:1]]
    together = (
        "trainer.micro_batch_size=1 model.activation_checkpointing=full engine.zero_stage=3 together, or more devices"
    )
    return Finding("memory", f"does not fit: {text}", " or ".join(changes) or together)


def zero_advice(stage: int, least: int, processes: int) -> str:
    """Higher ZeRO stages need less memory and more communication, so the lowest that fits, `least`, is the fastest.
    Stage 1 communicates no more than stage 0."""
    if processes == 1:
        return "on one process no stage saves memory"
    best = max(least, 1)
    if best < stage:
        return f"engine.zero_stage={best} is enough and communicates less"
    return "engine.zero_stage is a good choice"


def gated_weights(config: Config) -> Iterator[Finding]:
    """A token for weights that have to be downloaded from a gated page."""
    from huggingface_hub import get_token

    name = config.backbone.weights
    if config.backbone.kind != "dinov3" or not name or Path(name).exists() or name in cached_weights() or get_token():
        return
    yield Finding(
        "weights",
        f"{name} is gated, and there is no token",
        f"accept the licence on its page {name}, then `hf auth login`",
    )


def run_check(config: Config) -> Iterator[Finding]:
    """The sizes of a run on all devices of this machine, and whether the clips of each split can be read."""
    from flperf.engine.process import batch_share, start_process
    from flperf.estimate.describe import describe
    from flperf.run import build_components, evaluation_share

    process = start_process()
    run = build_components(config, process, evaluation_share(config, process))
    run.share = batch_share(config.trainer, replace(process, world_size=max(process.world_size, processes_of_run())))
    yield from (Finding("run", line) for line in describe(run).splitlines())
    train, validation = run.dataset.splits["train"], run.dataset.splits["validation"]
    first = 0
    for source in train.sources:
        clips = [first + clip for clip in spread(source.size, max(1, CLIPS // len(train.sources)))]
        yield clips_check(run, "train", clips, f"train clips of {source.file}", source.file)
        first += source.size
    if not train.sources:
        yield clips_check(run, "train", spread(len(train), CLIPS), "train clips", config.dataset.train)
    if len(validation):
        clips = spread(len(validation), CLIPS)
        yield clips_check(run, "validation", clips, "validation clips", config.dataset.validation)
    if run.dataset.frame_rate:  # its clips are video files
        yield reading_check(run)


def spread(size: int, count: int) -> list[int]:
    """`count` of `size` clips, or all of fewer; spread over the file, since files are often sorted by class."""
    return [index * size // min(count, size) for index in range(min(count, size))]


def clips_check(run: "Components", split: str, clips: list[int], what: str, file: str | None) -> Finding:
    """Whether the given clips of a split can be read, and how many are shorter than the window: `what`, which `file`
    lists."""
    from flperf.data.index import is_index
    from flperf.data.videos import frame_sampling

    skipped, short, read = [], 0, 0
    for batch in run.dataset.chosen_batches([clips], CLIPS, split, run.process.device):
        skipped += batch.skipped
        short += len(batch.short)
        read += int(batch.valid.sum())
    text = f"{read} of {len(clips)} {what} read"
    if short:
        window = frame_sampling(run.config.dataset, split).describe()
        text += f", {short} of {len(clips)} are shorter than the window of {window}"
    if not skipped:
        return Finding("clips", text)
    examples = "; ".join(f"{clip}: {reason}" for clip, reason in skipped[:3])
    fix = f"find out why: flperf index --csv {quote(str(file))} --out index.csv"
    if is_index(file):
        fix = "write the index again with `flperf index`, from what it was made of"
    return Finding("clips", f"{text} ({examples})", fix)


def reading_check(run: "Components") -> Finding:
    """Clips a second by the run's own reader on one process's share of the cores, against what its device computes."""
    from flperf.data.cores import reading_cores
    from flperf.engine.devices import device_here
    from flperf.estimate.step_time import computed_clips
    from flperf.estimate.workload import build_workload

    processes = processes_of_run()
    try:
        with one_of(processes):
            threads = run.config.dataset.threads or reading_cores(run.process.device)[0]
            rate = reading_rate(run.dataset, threads, run.process.device)
    except UserError as error:
        return Finding("reading", f"not timed: {error}")
    text = f"{rate:.1f} clips/s, {threads} read at a time"
    text += f", by one of {processes} processes" if processes > 1 else ""
    try:
        workload = build_workload(run.config, run.dtype, processes)
    except UserError as error:
        return Finding("reading", f"{text}; the step is not estimated: {error}")
    device = device_here(run.process.device, run.dtype)
    needed = computed_clips(workload, device)
    text += f"; its step is expected to take {needed:.1f} clips/s (estimated for {device.name})"
    return Finding("reading", text + (f": {reading_advice(run.config)}" if rate < needed else ""))


@contextmanager
def one_of(processes: int) -> Iterator[None]:
    """Have this process read as one of so many on this machine, as a launcher would tell it."""
    before = os.environ.get(LOCAL_PROCESSES)
    os.environ[LOCAL_PROCESSES] = before or str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ[LOCAL_PROCESSES]


def reading_rate(dataset: "Dataset", threads: int, device) -> float:
    """Clips a second in training, while others are read ahead as they always are. The first clips of every thread, with
    which readers start, are not counted unless the time is up."""
    from flperf.data import BatchShare

    first = -(-2 * threads // TIMED_BATCH)  # batches
    last = first + TIMED_CLIPS // TIMED_BATCH
    ends, start = [], time.monotonic()
    batches = dataset.train_batches(0, BatchShare(0, 1, TIMED_BATCH, TIMED_BATCH), device)
    for batch in batches:
        batch.release()
        ends.append(time.monotonic() - start)
        if len(ends) == last or ends[-1] > TIME_LIMIT:
            break
    batches.close()
    if len(ends) <= first:
        return len(ends) * TIMED_BATCH / ends[-1]
    return (len(ends) - first) * TIMED_BATCH / (ends[-1] - ends[first - 1])


def reading_advice(config: Config) -> str:
    """What to do where reading is slower than the step."""
    from flperf.data.dataset import training_files
    from flperf.data.prepared import is_prepared_set

    advice = "give the run more cores, or encode the clips once (flperf encode) if several heads train on them"
    if all(is_prepared_set(file) for file, _ in training_files(config.dataset)):
        return f"reading will hold it up; {advice}"
    return f"reading will hold it up; write files that decode fast (flperf prepare), {advice}"
