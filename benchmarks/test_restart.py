"""Time from launch to the first step: with nothing compiled before, and with the compile cache that an earlier start left.

    python -m pytest benchmarks/test_restart.py

Each round is one process of its own, as a requeued job is: imports, encoder, head and engine are built in it and one step is done,
which compiles or finds its graphs. What a process with nothing to compile needs (`engine.compile=false`) stands beside them.
"""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks.sizes import configuration
from flperf.config import dump_config

TRAIN = "flperf/train.py"
OVERRIDES = ["name=restart", "dataset.shapes.train_clips=64", "dataset.shapes.validation_clips=0", "latents.statistics_clips=8"]


@pytest.mark.benchmark(group="from launch to the first step")
@pytest.mark.parametrize("cache", ["cold", "warm", "unused"])
def test_first_step(benchmark, tmp_path, cache):
    compiled = f"engine.compile={'false' if cache == 'unused' else 'true'}"
    once = ["trainer.max_steps=1", "tracking.wandb=off", f"experiment={tmp_path}/experiment"]
    config = configuration("predictor", "vjepa2", *OVERRIDES, compiled, *once)
    path, folder = tmp_path / "config.yaml", tmp_path / "experiment"
    path.write_text(dump_config(config))
    described = []

    def start() -> None:
        subprocess.run([sys.executable, TRAIN, "--config", str(path), "--overwrite"], check=True, capture_output=True)
        described.append(json.loads((folder / "restart/run.json").read_text()))

    def before() -> None:
        if cache == "cold":
            shutil.rmtree(folder, ignore_errors=True)

    benchmark.pedantic(start, setup=before, rounds=3, warmup_rounds=1)
    measured = described[1:]
    assert {run["compile_cache"] for run in measured} == {cache}
    benchmark.extra_info["first_step_s"] = sorted(run["first_step_s"] for run in measured)[1]
