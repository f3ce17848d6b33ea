"""Time from launch to the first step: with nothing compiled before, and with the compile cache that an earlier start left.

    python -m pytest benchmarks/test_restart.py

Each round is a process of its own, as a requeued job is: it imports, builds encoder, head and engine, fits latent statistics on a few
clips and does one step of flow matching, which compiles, or finds its graphs.
"""

import shutil
import subprocess
import sys

import pytest

from benchmarks.sizes import configuration
from flperf.config import dump_config

CLIPS = ["dataset.shapes.train_clips=64", "dataset.shapes.validation_clips=0", "latents.statistics_clips=8"]


@pytest.mark.benchmark(group="from launch to the first step")
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_first_step(benchmark, tmp_path, cache):
    experiment, path = tmp_path / "experiment", tmp_path / "config.yaml"
    path.write_text(dump_config(configuration("dit", "vjepa2", *CLIPS, "tracking.wandb='off'", f"experiment={experiment}")))
    command = [sys.executable, "-u", "flperf/train.py", "--config", str(path), "--overwrite"]

    said = []

    def start() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = next(line for line in process.stdout if line.startswith("first step after"))
            process.kill()
        said.append(line)

    def before() -> None:
        if cache == "cold":
            shutil.rmtree(experiment, ignore_errors=True)

    benchmark.pedantic(start, setup=before, rounds=3, warmup_rounds=1 if cache == "warm" else 0)
    assert all(f"(compile cache: {cache})" in line for line in said[-3:])
