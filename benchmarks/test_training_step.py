"""Whole training steps, encoder to optimizer, against the usual way on the same clips: eager in fp32, and in bf16 under autocast.

    python -m pytest benchmarks/test_training_step.py

On a CPU: V-JEPA 2 of 384 x 12, 16 frames of 128 x 128, heads of 384 x 6, batch 4. `joint` does the arithmetic of the usual way; `split`
encodes context and target apart, which is what training does by default and also less work. Steps are timed in turns, the two usual ones
before each of ours, and ratios are medians over these turns. Where the device doesn't multiply bf16 itself, ours is in fp32.
"""

import subprocess
import sys

import pytest

from benchmarks import sizes
from benchmarks.training_step import OURS, USUAL, ours, usual, write_cache
from flperf.run import flops_per_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_cache(folder)
    return folder


@pytest.mark.parametrize("source, mode", [*(("drawn", mode) for mode in OURS), ("cache", "joint")])
@pytest.mark.parametrize("regime", sizes.HEADS)
def test_step(benchmark, record, folder, regime, source, mode):
    benchmark.group = f"training step, {regime}, {source}"
    step = ours(regime, source, mode, folder)
    beside = {name: usual(step.run, source, folder, autocast) for name, autocast in USUAL.items()}
    flops = sizes.BATCH * sum(flops_per_clip(step.run).values())
    record(step, "clips", sizes.BATCH, flops=flops, dtype=step.run.dtype, beside=beside)
    step.batches.close()


@pytest.mark.benchmark(group="four steps in a process of their own")
@pytest.mark.parametrize("variant", [*USUAL, *(f"ours, {mode}" for mode in OURS)])
def test_memory(benchmark, variant, tmp_path):
    """Of interest is `peak_memory_bytes`; the time is that of starting, compiling from the cache and four steps."""
    command = [sys.executable, "-m", "benchmarks.training_step", "predictor", "drawn", variant, str(tmp_path)]
    command += ["quick"] if sizes.QUICK else []
    output = []
    benchmark.pedantic(lambda: output.append(subprocess.check_output(command, text=True)), rounds=1)
    benchmark.extra_info["peak_memory_bytes"] = int(output[-1].split()[-1])
