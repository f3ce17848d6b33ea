"""Time from launch to the first step: with nothing compiled before, and with the compile cache that an earlier start left.

    python -m pytest benchmarks/test_restart.py

Each round is a process of its own, as a requeued job is: it imports, builds encoder, head and engine, fits latent statistics on a few
clips and does one step of flow matching, which compiles, or finds its graphs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sizes import configuration
from flperf.compile_cache import CACHE_VARIABLES
from flperf.config import dump_config

CLIPS = ["dataset.shapes.train_clips=64", "dataset.shapes.validation_clips=0", "latents.statistics_clips=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("restart")


@pytest.mark.benchmark(group="from launch to the first step")
@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_first_step(benchmark, folder, cache):
    experiment, path, said = folder / "experiment", folder / "config.yaml", []
    path.write_text(dump_config(configuration("dit", "vjepa2", *CLIPS, "tracking.wandb=none", f"experiment={experiment}")))
    command = [sys.executable, "-u", "flperf/train.py", "--config", str(path), "--overwrite"]
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}  # a benchmark before has set them

    def before() -> None:
        if cache == "cold":
            shutil.rmtree(experiment, ignore_errors=True)

    def start() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            said.append(next(line for line in process.stdout if line.startswith("first step after")))
            process.kill()

    # A cold start takes a minute or two; the round before the first warm one leaves the cache.
    rounds = {"cold": 2, "warm": 3}[cache]
    benchmark.pedantic(start, setup=before, rounds=rounds, warmup_rounds=int(cache == "warm"))
    assert all(f"(compile cache: {cache})" in line for line in said[-rounds:]), said
