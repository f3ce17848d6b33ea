"""Measures the time from launch to the first step, with an empty compile cache and with that of an earlier start.

    python -m pytest benchmarks/test_restart.py

Each round is a new process, like a requeued job. It imports packages, builds encoder, head and engine, measures latent
statistics on a few clips and takes one step of flow matching, which is compiled or found in the cache.
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
    """A cold start, which takes a minute or two, fills the cache for the warm start that follows."""
    experiment, path = tmp_path / "experiment", tmp_path / "config.yaml"
    path.write_text(
        dump_config(configuration("dit", "vjepa2", *CLIPS, "tracking.wandb=none", f"experiment={experiment}"))
    )
    command = [sys.executable, "-u", "flperf/train.py", "--config", str(path), "--overwrite"]
    # An earlier benchmark in this process may have set these variables.
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}

    def start(cache: str) -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            report = next(line for line in process.stdout if line.startswith("first step after"))
            process.kill()
        assert f"(compile cache: {cache})" in report, report

    def cold() -> None:
        rmtree(experiment, ignore_errors=True)
        start("cold")

    record(lambda: start("warm"), "starts", 1, rounds=1, warm=False, beside={"a cold start": cold})
