"""Whole training steps, encoder to optimizer, against the usual way on the same clips: eager in fp32, and in bf16
under autocast.

    python -m pytest benchmarks/test_training_step.py

On a CPU: V-JEPA 2 of 384 x 12, 16 frames of 128 x 128, heads of 384 x 6, batch 4, and batch 8 for the predictor.
`split`, which is timed, encodes context and target apart, as training does by default; `joint`, of the predictor,
does the arithmetic of the usual way. All are timed in turns in one run, and ratios are medians over these turns.
Where fp32 is faster, ours is in fp32; where bf16 is only emulated, at a tenth of the rate of fp32 or less, autocast
is left out.
"""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import sizes
from benchmarks.recording import MIN_ROUNDS
from benchmarks.training_step import USUAL, OurStep, Step, ours, usual, write_cache
from flperf.data.demo import write_demo
from flperf.run import flops_per_clip
from flperf.training import loop

EMULATED = 0.1  # the rate of bf16 to that of fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training_step")
    write_cache(folder)
    write_demo(folder / "demo", {"train": 2 * sizes.BATCH, "validation": 0})
    return folder


def fractions_of_peak(step: OurStep, rounds: int, peak: float) -> dict[str, float]:
    """Of the last rounds: the milliseconds of each stage, and what part of the peak encoder and head reach while they
    run."""
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
    """Each way loads its next batch during its own turn: what is left of that must not take cores from the turn of
    another. Nor must a GPU's memory, which all ways together may exceed, be found during a turn."""
    if sizes.ON_GPU:
        torch.cuda.empty_cache()
        way()
    time.sleep(0.1)


def that_fit(ways: dict[str, Step]) -> dict[str, Step]:
    """Those whose step fits the device's memory."""
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
    """The usual ways: name -> autocast."""
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
    beside = that_fit({name: usual(step.run, source, folder, autocast) for name, autocast in ways.items()})
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


@pytest.mark.parametrize("regime", sizes.HEADS)
def test_step_from_video(benchmark, record, folder, regime):
    """Against the same step on clips that were decoded before."""
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
    """Of interest is `peak_memory_bytes`; the time is that of starting, compiling from the cache and two steps: the
    second has all that a step keeps."""
    if variant in USUAL and variant not in ways:
        pytest.skip("bf16 is emulated here")
    command = [sys.executable, "-m", "benchmarks.training_step", "predictor", "drawn", variant, str(tmp_path)]
    command += ["quick"] if sizes.QUICK else []
    output = []
    benchmark.pedantic(lambda: output.append(subprocess.check_output(command, text=True)), rounds=1)
    benchmark.extra_info["peak_memory_bytes"] = int(output[-1].split()[-1])
