"""`flperf locator`, and an evaluation with what it wrote."""

import json

from runs import REGIMES

from flperf.commands.evaluate import evaluate
from flperf.commands.locator import locator
from flperf.train import train


def test_a_locator_measures_the_errors_of_a_trained_head(tiny, tmp_path, capsys):
    file, out = tmp_path / "locator.safetensors", tmp_path / "out.jsonl"
    locator(["--config", str(tiny), "--out", str(file), "--head", "heatmap", "--steps", "3"])
    assert "pixels of 256" in capsys.readouterr().out
    train(["--config", str(tiny), "name=located", *REGIMES["flow_matching"]])
    run = tiny.parent / "experiment/located"
    evaluate(["--checkpoint", str(run), "--locator", str(file), "--out", str(out)])
    result = json.loads(out.read_text())
    located = result["locator"]
    assert result["norm"] == "standardize" and "one sample" in capsys.readouterr().out
    assert {name: len(errors) for name, errors in located.items()} == {
        "forecast": 2,
        "sample": 2,
        "copy_last": 2,
        "target": 2,
    }
    assert located["sample"] != located["forecast"], "a forecast is the mean of two samples"
    assert all(0 < error < 256 for errors in located.values() for error in errors)
