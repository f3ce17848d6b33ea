"""The comparison of curves of the loss; that all ways train alike is what benchmarks/parity.py measures."""

import json
import math

import pytest

from benchmarks import parity
from benchmarks.parity import REFERENCE, WAYS, Way

OTHER = Way(compile=True)


def run(monkeypatch, tmp_path, losses: dict[Way, list[float]]) -> int:
    curves = {"predictor": {way.name: {"loss": found, "grad_norm": [1.0] * 3} for way, found in losses.items()}}
    monkeypatch.setattr(parity, "train", lambda *_: curves)
    monkeypatch.setattr(parity, "HEADS", ("predictor",))
    monkeypatch.setattr(parity, "WAYS", tuple(losses))
    return parity.main(["--out", str(tmp_path / "out"), "--steps", "3"])


def test_equal_curves_pass_and_are_saved(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, {REFERENCE: [3.0, 2.0, 1.0], OTHER: [3.0, 2.00001, 1.0]}) == 0
    assert (
        "| predictor, compiled fp32, ZeRO 0, 1 process | 5.0e-06 | 1 | 0.0e+00 | 0.0e+00 | 1e-05 |"
        in capsys.readouterr().out
    )
    saved = json.loads((tmp_path / "out/curves.json").read_text())
    assert saved["curves"]["predictor"][OTHER.name]["loss"] == [3.0, 2.00001, 1.0]
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("last", [1.001, math.nan])
def test_another_curve_fails(monkeypatch, tmp_path, capsys, last):
    assert run(monkeypatch, tmp_path, {REFERENCE: [3.0, 2.0, 1.0], OTHER: [3.0, 2.0, last]}) == 1
    assert "exceeded" in capsys.readouterr().out


def test_every_stage_precision_and_number_of_processes_is_compared():
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert {way.zero_stage for way in WAYS} == {0, 1, 2, 3}
    assert {(way.precision, way.compile, way.processes) for way in WAYS} >= {("bf16", True, 2), ("fp32", True, 2)}
