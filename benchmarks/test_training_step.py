"""Compares whole training steps, from encoder to optimizer, with the usual way on the same clips: eager in fp32, and in
bf16 under autocast.

    python -m pytest benchmarks/test_training_step.py

On a CPU: V-JEPA 2 of 384 x 12, 16 frames of 128 x 128, heads of 384 x 6, batch 4, and batch 8 for the predictor. Ours
encodes context and target separately (`split`, the default). For the predictor `joint` is timed, too, which has the
arithmetic of the usual way. All ways take turns in one run; ratios are medians over the rounds. Ours computes in fp32
where that is faster. Autocast is left out where bf16 is emulated, at a tenth of fp32's rate or less.
`test_strong_way` compares with a whole-model compiled step of PyTorch and transformers (`strong_way.py`).
"""

import itertools
import statistics
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import sizes
from benchmarks.recording import MIN_ROUNDS
from benchmarks.strong_way import StrongStep
from benchmarks.training_step import USUAL, OurStep, Step, ours, usual, write_cache
from flperf.data.demo import write_demo
from flperf.models.flops import count_parameters
from flperf.run import flops_per_clip
from flperf.training import loop

EMULATED = 0.1  # largest rate of emulated bf16, relative to fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training_step")
    write_cache(folder)
    write_demo(folder / "demo", {"train": 2 * sizes.BATCH, "validation": 0})
    return folder


def fractions_of_peak(step: OurStep, rounds: int, peak: float) -> dict[str, float]:
    """In the last rounds: the milliseconds of each stage, and the fraction of the peak that encoder and head reach."""
    timer, flops, clips = step.meter.timer, flops_per_clip(step.run), step.run.share.batch_size
    for name, spans in timer.spans.items():
        timer.spans[name] = spans[-rounds:]
    stages = timer.read(rounds)
    milliseconds = {"encoder": stages["encode_ms"], "head": stages["forward_ms"] + stages["backward_ms"]}
    shares = {
        f"{part}_fraction_of_peak": clips * flops[part] / (milliseconds[part] / 1e3) / peak
        for part in flops
        if flops[part]
    }
    return {"stages_ms": stages, **shares}


def settle(way: Step) -> None:
    """Prepare the turn of a way. The previous way may still load its next batch, which would take cores. On a GPU the
    memory that other ways cache is freed, and this way allocates its own before it is timed."""
    if sizes.ON_GPU:
        torch.cuda.empty_cache()
        way()
    time.sleep(0.1)


def fitting(ways: dict[str, Step]) -> dict[str, Step]:
    """The ways whose step fits into the device's memory."""
    fit = {}
    for name, way in ways.items():
        try:
            settle(way)
            fit[name] = way
        except torch.OutOfMemoryError:
            continue
    return fit


def flops_of(step: OurStep) -> int:
    return step.run.share.batch_size * sum(flops_per_clip(step.run).values())


@pytest.fixture
def ways(peaks) -> dict[str, bool]:
    """The usual ways on this device: whether they use autocast, by name."""
    return {
        name: autocast for name, autocast in USUAL.items() if not autocast or peaks["bf16"] > EMULATED * peaks["fp32"]
    }


@pytest.mark.parametrize("regime, source, batch", [
    *((regime, source, sizes.BATCH) for regime in sizes.HEADS for source in ("drawn", "cache")),
    ("predictor", "drawn", 2 * sizes.BATCH),
])  # fmt: skip
def test_step(benchmark, record, folder, ways, regime, source, batch):
    benchmark.group = f"training step, {regime}, {source}"
    size = f"trainer.batch_size={batch}"
    step = ours(regime, source, "split", folder, size)
    also = (
        {"ours, joint": ours(regime, "drawn", "joint", folder, size)}
        if (regime, source) == ("predictor", "drawn")
        else {}
    )
    beside = fitting({name: usual(step.run, source, folder, autocast) for name, autocast in ways.items()})
    seconds = record(
        step,
        "clips",
        batch,
        flops=flops_of(step),
        dtype=step.run.dtype,
        rounds=MIN_ROUNDS,
        beside=beside | also,
        before=settle,
    )
    peak = record.peak(step.run.dtype)
    benchmark.extra_info |= fractions_of_peak(step, len(seconds[""]), peak)
    if joint := also.get("ours, joint"):
        fraction = flops_of(joint) / statistics.median(seconds["ours, joint"]) / peak
        ratios = record.ratios({name: seconds[name] for name in ("ours, joint", *beside)}, "ours, joint")
        benchmark.extra_info["joint"] = (
            ratios | {"fraction_of_peak": fraction} | fractions_of_peak(joint, len(seconds[""]), peak)
        )
    for each in (step, *also.values()):
        each.batches.close()


@pytest.mark.parametrize("regime", ["predictor", "dit"])
def test_strong_way(benchmark, record, folder, regime):
    """Compared with `strong_way`, which encodes the whole clip, and with the arithmetic of `split`."""
    benchmark.group = f"training step against a strong way, {regime}"
    step, joint = (ours(regime, "drawn", mode, folder) for mode in ("split", "joint"))
    batches = (batch.video for batch in step.run.dataset.train_batches(0, step.run.share, sizes.DEVICE))
    strong = {
        f"a strong way, {mode}": StrongStep(
            step.run.config, step.run.geometry, batches, sizes.DEVICE, mode=mode, compile=not sizes.QUICK
        )
        for mode in ("joint", "split")
    }
    beside = {**strong, "ours, joint": joint}
    seconds = record(
        step, "clips", sizes.BATCH, flops=flops_of(step), dtype=step.run.dtype, beside=beside, before=settle
    )
    of_joint = {name: seconds[name] for name in ("ours, joint", "a strong way, joint")}
    benchmark.extra_info["joint"] = record.ratios(of_joint, "ours, joint")
    for each in (step, joint):
        each.batches.close()


@pytest.mark.parametrize("regime", ["predictor", "dit"])
def test_strong_way_learns(regime):
    """It has as many parameters as ours, and its loss falls."""
    config = sizes.configuration(regime, size=sizes.TOY)
    encoder = sizes.encoder_of(config, torch.float32, False)
    geometry, video = sizes.geometry_of(config, encoder), sizes.video_of(config)
    step = StrongStep(config, geometry, itertools.repeat(video), sizes.DEVICE, compile=False)
    assert count_parameters(step.head) == count_parameters(sizes.head_of(config, geometry, torch.float32, False))
    losses = [float(step()) for _ in range(40)]
    assert statistics.mean(losses[-5:]) < 0.98 * statistics.mean(losses[:5])


@pytest.mark.parametrize("regime", sizes.HEADS)
def test_step_from_video(benchmark, record, folder, regime):
    """Compared with the same step on a batch that has been decoded before."""
    benchmark.group = f"training step, {regime}, video"
    step = ours(regime, "video", "split", folder)
    batch = next(step.batches)

    def decoded_before() -> None:
        loop.train_step(step.run, iter([batch]), step.meter)

    decoded_before()  # compiles for both
    beside = {"clips decoded before": decoded_before}
    record(
        step,
        "clips",
        sizes.BATCH,
        flops=flops_of(step),
        dtype=step.run.dtype,
        rounds=MIN_ROUNDS,
        warm=False,
        beside=beside,
    )
    step.batches.close()


@pytest.mark.benchmark(group="two steps in a process of their own")
@pytest.mark.parametrize("variant", [*USUAL, "ours, joint", "ours, split"])
def test_memory(benchmark, ways, variant, tmp_path):
    """`peak_memory_bytes` after two steps; the second one has all the memory that a step keeps. The time, which
    includes the start and compiling, is not of interest."""
    if variant in USUAL and variant not in ways:
        pytest.skip("bf16 is emulated here")
    command = [sys.executable, "-m", "benchmarks.training_step", "predictor", "drawn", variant, str(tmp_path)]
    command += ["quick"] if sizes.QUICK else []
    output = []
    benchmark.pedantic(lambda: output.append(subprocess.check_output(command, text=True)), rounds=1)
    benchmark.extra_info["peak_memory_bytes"] = int(output[-1].split()[-1])
