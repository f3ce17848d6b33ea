"""What shows within a minute that the line as a whole works; `pytest` runs it with the unit tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

from runs import ROOT, launch
from worlds import flperf

SMALL_DEMO = [
    *("trainer.max_steps=2", "trainer.batch_size=4", "dataset.limit=12", "engine.compile=false"),
    *("backbone.architecture.hidden_size=24", "backbone.architecture.num_hidden_layers=1"),
    *("model.hidden_dim=32", "model.depth=1", "latents.statistics_clips=8"),
    *("evaluation.sampling.steps=2", "evaluation.probe_clips=12", "evaluation.dump_examples=1"),
    *("backbone.architecture.pred_hidden_size=24", "backbone.architecture.pred_num_hidden_layers=1"),
]
INTERPRETED = """
import torch
from flperf_kernels import flow_matching as fm
from flperf_kernels.launching import launch

latents, tau, sample = torch.randn(2, 37, 24), torch.tensor([0.25, 0.75]), torch.tensor([3, 2**33])
noised = torch.empty_like(latents)
launch(*fm.noise_launch(latents, tau, sample, 7, None, None, "none", 1e-6, noised))
expected = fm.noise_reference(latents, tau, sample, 7, None, None, "none", 1e-6, torch.float32)
torch.testing.assert_close(noised, expected, rtol=0, atol=1e-5)
"""


def test_the_demo_trains_under_the_launcher(tmp_path):
    for name in ("flperf", "configs", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    finished = launch(1, "flperf/train.py", "--config", "configs/demo.yaml", *SMALL_DEMO, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    logged = metrics(tmp_path / "experiment/demo")
    assert logged[2, "train"]["loss"] > 0 and logged[2, "val"]["forecast_l1"] > 0
    assert (tmp_path / "experiment/demo/checkpoints/latest").read_text() == "step_00000002"


def test_a_resumed_run_is_the_undisturbed_one(tiny):
    """Bit for bit, in fp32: two updates, a second start and two more against four."""
    run = ["train", "--config", str(tiny), "model.head=dit", "objective.kind=flow_matching", "engine.zero_stage=2"]
    for name, *stop in (("smoke-whole",), ("smoke-parts", "trainer.stop_after=2"), ("smoke-parts",)):
        finished = flperf(*run, f"name={name}", *stop)
        assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    assert "resumed at step 2\n" in finished.stdout
    whole, parts = (metrics(tiny.parent / "experiment" / name) for name in ("smoke-whole", "smoke-parts"))
    assert whole.keys() < parts.keys()  # the first start evaluated where it stopped
    for line, values in whole.items():
        for key in ("loss", "grad_norm", "forecast_mse"):
            assert parts[line].get(key) == values.get(key)


def metrics(run: Path) -> dict[tuple[int, str], dict]:
    """The logged values by step and split."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], line.get("split", "train")): line for line in lines}


def test_a_kernel_computes_its_formula_in_the_interpreter():
    """Triton decides when it is imported whether it interprets, so that takes a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
