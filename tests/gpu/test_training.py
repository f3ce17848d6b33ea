"""Training on a GPU, from video files: NVDEC, its attention, compiled blocks, the kernels, bf16."""

import json

import pytest
from runs import ROOT, launch


@pytest.mark.parametrize(("head", "objective"), [("dit", "flow_matching"), ("predictor", "regression")])
def test_a_gpu_trains_on_files_and_resumes(tmp_path, head, objective):
    files = [f"dataset.{name}={tmp_path}/demo/{name}.csv" for name in ("train", "validation", "labels")]
    run = ["--config", str(ROOT / "configs/demo.yaml"), *files, f"experiment={tmp_path}", "tracking.log_every=5"]
    run += [f"model.head={head}", f"objective.kind={objective}", "trainer.max_steps=40", "trainer.warmup_steps=5"]
    for resumed in (0, 20):
        finished = launch(1, str(ROOT / "flperf/train.py"), *run, "trainer.stop_after=20")
        assert finished.returncode == 0, finished.stderr[-4000:]
        assert not resumed or f"resumed at step {resumed}" in finished.stdout
    lines = [json.loads(line) for line in (tmp_path / "demo/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "lr" in line]
    assert losses[-1] < losses[0]
    assert not any(line.get("skipped_clips") or line.get("skipped_updates") for line in lines)
    assert "NVIDIA" in json.loads((tmp_path / "demo/run.json").read_text())["device"]
