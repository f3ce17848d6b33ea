"""`flperf doctor --config`: would this run fit here, and can all that it opens be opened? No step is taken."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flperf.commands.doctor_machine import Finding, cached_weights
from flperf.config import Config, load_config
from flperf.errors import UserError

CLIPS = 10
AGAIN = "mend what this line names, then run the same command again"


def configured(path: str, overrides: list[str]) -> Iterator[Finding]:
    """What a run of this configuration would take, and what it opens first: data, backbone, a few clips."""
    try:
        config = load_config(path, overrides)
        yield Finding("config", f"{path}: a {config.model.head} on {config.backbone.kind}, {config.dataset.kind}")
        yield from fit(config)
        yield from gated_weights(config)
        yield from opened(config)
    except UserError as error:
        yield Finding("config", str(error), AGAIN)


def processes_here() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def fit(config: Config) -> Iterator[Finding]:
    """The memory that training would take of each device of this machine, estimated; the ZeRO stages beside one
    another."""
    import psutil
    import torch

    from flperf.engine.devices import DEVICES
    from flperf.engine.process import compute_dtype
    from flperf.estimate.plan import plan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    # Of a device's facts a memory estimate takes but these two.
    here = replace(
        DEVICES["h100"], memory=gpu or psutil.virtual_memory().total, link=DEVICES["h100"].link if gpu else None
    )
    processes = processes_here()
    try:
        workload = plan(config, compute_dtype(config.engine.precision, device), processes)
    except UserError as error:
        yield Finding("memory", f"not estimated: {error}")
        return
    yield memory_finding(workload, here, processes)


def memory_finding(workload, device, processes: int) -> Finding:
    """Estimated bytes against those of the device, and which single change makes it fit."""
    from flperf.estimate.plan import memory

    config, limit = workload.config, device.memory
    mode, stage, micro = (
        config.model.activation_checkpointing,
        config.engine.zero_stage,
        workload.share.micro_batch_size,
    )
    held = {number: memory(workload, device, number, processes) for number in range(4)}
    totals = ", ".join(f"{number}: {held[number].total(mode) / 1e9:.1f}" for number in held)
    text = (
        f"{held[stage].total(mode) / 1e9:.1f} of {limit / 1e9:.1f} GB estimated at {micro} clips a process; "
        f"by ZeRO stage {totals}"
    )
    if held[stage].total(mode) <= limit:
        least = next(number for number in held if held[number].total(mode) <= limit)
        return Finding("memory", f"{text}; {zero_advice(stage, least, processes)}")
    growing = held[stage].clips + held[stage].activations[mode]  # in proportion to the clips
    clips = int(micro * (limit - held[stage].total(mode) + growing) / growing)
    changes = [f"trainer.micro_batch_size={clips}"] if clips > 0 else []
    less = [other for other in held[stage].activations if held[stage].total(other) <= limit]  # the cheapest first
    changes += [f"model.activation_checkpointing={other}" for other in less[:1]]
    changes += [
        f"engine.zero_stage={number}" for number in held if number > stage and held[number].total(mode) <= limit
    ][:1]
    all_of_them = (
        "trainer.micro_batch_size=1 model.activation_checkpointing=full engine.zero_stage=3 together, or more devices"
    )
    return Finding("memory", f"does not fit: {text}", " or ".join(changes) or all_of_them)


def zero_advice(stage: int, least: int, processes: int) -> str:
    """Higher stages hold less and send more, so the lowest that fits is the fastest; stage 1 sends no more than 0."""
    if processes == 1:
        return "on one process no stage saves memory"
    best = max(least, 1)
    return (
        f"engine.zero_stage={best} is enough and sends less" if best < stage else "engine.zero_stage is a good choice"
    )


def gated_weights(config: Config) -> Iterator[Finding]:
    from huggingface_hub import get_token

    name = config.backbone.weights
    if config.backbone.kind != "dinov3" or not name or Path(name).exists() or name in cached_weights() or get_token():
        return
    yield Finding(
        "weights",
        f"{name} is gated, and there is no token",
        f"accept the licence on its page {name}, then `hf auth login`",
    )


def opened(config: Config) -> Iterator[Finding]:
    """Sizes of the run on all devices of this machine, and clips of every split that are read."""
    from flperf.engine.process import batch_share, start_process
    from flperf.run import build_run, describe

    process = start_process()
    run = build_run(config, process, training=False)
    run.share = batch_share(config.trainer, replace(process, world_size=max(process.world_size, processes_here())))
    yield from (Finding("run", line) for line in describe(run).splitlines())
    for split in ("train", "validation"):
        size = len(run.dataset.splits[split])
        # from all of it, as files lie sorted by class
        clips = [index * size // min(CLIPS, size) for index in range(min(CLIPS, size))]
        skipped, read = [], 0
        for batch in run.dataset.chosen_batches([clips], CLIPS, split, process.device):
            skipped += batch.skipped
            read += int(batch.valid.sum())
        if clips:
            examples = "; ".join(f"{clip}: {reason}" for clip, reason in skipped[:3])
            fix = (
                f"see what is wrong with them: flperf index --csv {getattr(config.dataset, split)} --out index.csv"
                if skipped
                else ""
            )
            yield Finding(
                "clips", f"{read} of {len(clips)} {split} clips read" + (f" ({examples})" if skipped else ""), fix
            )
