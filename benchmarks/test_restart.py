"""Time from launch to the first step: with nothing compiled before, and with the compile cache that an earlier start
left.

    python -m pytest benchmarks/test_restart.py

Each round is a process of its own, as a requeued job is: it imports, builds encoder, head and engine, fits latent
statistics on a few clips and does one step of flow matching, which compiles, or finds its graphs.
"""

import os
import subprocess
import sys
from shutil import rmtree

import pytest

from benchmarks.sizes import configuration
from flperf.config import dump_config
from flperf.engine.compile_cache import CACHE_VARIABLES

CLIPS = ["dataset.shapes.train_clips=64", "dataset.shapes.validation_clips=0", "latents.statistics_clips=8"]


@pytest.mark.benchmark(group="from launch to the first step")
def test_first_step(record, tmp_path):
    """A cold start, which takes a minute or two, leaves the cache for the warm one that follows."""
    experiment, path = tmp_path / "experiment", tmp_path / "config.yaml"
    path.write_text(
        dump_config(configuration("dit", "vjepa2", *CLIPS, "tracking.wandb=none", f"experiment={experiment}"))
    )
    command = [sys.executable, "-u", "flperf/train.py", "--config", str(path), "--overwrite"]
    # a benchmark before has set them
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}

    def start(cache: str) -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            said = next(line for line in process.stdout if line.startswith("first step after"))
            process.kill()
        assert f"(compile cache: {cache})" in said, said

    def cold() -> None:
        rmtree(experiment, ignore_errors=True)
        start("cold")

    record(lambda: start("warm"), "starts", 1, rounds=1, warm=False, beside={"a cold start": cold})
