"""What shows within a minute that the line as a whole works; `pytest` runs it with the unit tests."""

import json
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
