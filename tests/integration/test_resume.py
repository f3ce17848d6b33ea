"""A resumed run is the undisturbed one: after a stop, and after a kill at any moment."""

import json
import time
from pathlib import Path

import pytest
from ranks.curves import curves
from runs import BACKBONES, FOUR_DS, REGIMES
from worlds import World, command, flperf, run_world

RESUMED = {  # regime, backbone, ZeRO stage
    "dit": ("flow_matching", BACKBONES["vjepa2"], 1),
    "dit on DINOv3": ("flow_matching", BACKBONES["dinov3"], 0),
    "predictor": ("predictor", BACKBONES["vjepa2"], 2),
    "cross_attention on 4DS": ("cross_attention", FOUR_DS, 3),
}
CASES = [(name, precision) for name in RESUMED for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def resumed(tiny) -> tuple[dict, dict]:
    """Six steps in one start, and three steps; then a second start that goes on with the latter."""
    runs = {}
    for name, precision in CASES:
        regime, backbone, stage = RESUMED[name]
        options = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "trainer.max_steps=6"]
        runs[f"{name} {precision}"] = REGIMES[regime] + backbone + options
    whole = {f"whole {name}": overrides for name, overrides in runs.items()}
    begun = {f"parts {name}": [*overrides, "trainer.stop_after=3"] for name, overrides in runs.items()}
    (first,) = run_world(1, curves, str(tiny), whole | begun)
    (second,) = run_world(1, curves, str(tiny), {f"parts {name}": overrides for name, overrides in runs.items()})
    return first, second


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_resumed_training_is_the_undisturbed_one(resumed, name, precision):
    """Bit for bit in fp32. In bf16 oneDNN's products differ from run to run on a CPU, disturbed or not: to a rounding
    of bf16, 2^-8."""
    (first, second), run = resumed, f"{name} {precision}"
    whole, begun, rest = first[f"whole {run}"], first[f"parts {run}"], second[f"parts {run}"]
    tolerance = 0.0 if precision == "fp32" else 2**-8
    assert rest["step"] == [1, 2, 3, 4, 5, 6]  # one file of metrics for both starts
    assert begun["seen"] + rest["seen"] == whole["seen"] and len(whole["seen"]) == 6
    for key in ("loss", "grad_norm"):
        assert rest[key] == pytest.approx(whole[key], rel=tolerance, abs=0)
    forecast = [run["validation"][-1]["forecast_mse"] for run in (rest, whole)]  # of the averaged weights
    assert forecast[0] == pytest.approx(forecast[1], rel=tolerance, abs=0)


def test_a_killed_run_comes_back(tiny):
    """SIGKILL twice, in a run that saves after every step: the next start resumes by itself, and the losses are those
    of an undisturbed run, bit for bit."""
    run = ["train", "--config", str(tiny), "trainer.max_steps=400", "checkpoint.save_every=1", "checkpoint.keep=3"]
    folder = tiny.parent / "experiment/killed"
    for steps in (3, 7):
        with World(None, command, *run, "name=killed") as world:
            deadline = time.monotonic() + 120
            while len(losses(folder)) < steps:
                assert world.members[0].is_alive() and time.monotonic() < deadline, world.stderr
                time.sleep(0.01)
    finished = flperf(*run, "name=killed", "trainer.stop_after=3")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "resumed at step" in finished.stdout
    logged = losses(folder)
    last = logged[-1][0]
    undisturbed = flperf(*run, "name=undisturbed", "evaluation.dump_examples=0", f"trainer.stop_after={last}")
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    assert set(logged) == set(losses(tiny.parent / "experiment/undisturbed"))
    assert (folder / "checkpoints/latest").read_text() == f"step_{last:08d}"
    assert len([path for path in folder.joinpath("checkpoints").glob("step_*") if path.is_dir()]) <= 4


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training step in a file that may just be written."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = map(json.loads, (line for line in lines if line.endswith("\n")))
    return [(line["step"], line["loss"]) for line in whole if "split" not in line]
