"""evaluate, sample and export of a trained head, and its use from Python."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from runs import ROOT
from safetensors.torch import load_file, save_file
from worlds import flperf

from flperf.commands.evaluate import evaluate
from flperf.commands.export import export
from flperf.commands.sample import sample
from flperf.commands.trained import _use_compile_cache_of
from flperf.data.demo import write_demo
from flperf.errors import UserError

CONFIG = """
inherits: [{root}/configs/demo.yaml]
experiment: {folder}/experiment
backbone: {{architecture: {{crop_size: 32, hidden_size: 24, num_hidden_layers: 1, pred_num_hidden_layers: 1}}}}
dataset: {{n_frames: 8, train: {folder}/demo/train.csv, validation: {folder}/demo/validation.csv,
 labels: {folder}/demo/labels.csv}}
model: {{num_context_latents: 2, hidden_dim: 32, depth: 1}}
trainer: {{batch_size: 4, max_steps: 3, warmup_steps: 1}}
latents: {{statistics_clips: 8}}
engine: {{compile: false, precision: fp32}}
evaluation: {{sampling: {{steps: 2, samples: 3}}, probe_clips: 40}}
checkpoint: {{keep: 1}}
tracking: {{log_every: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a tiny flow-matching head on the demo's clips, and its export."""
    folder = tmp_path_factory.mktemp("forecasting")
    write_demo(folder / "demo")
    (folder / "tiny.yaml").write_text(CONFIG.format(root=ROOT, folder=folder))
    finished = flperf("train", "--config", str(folder / "tiny.yaml"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    export(["--checkpoint", str(folder / "experiment/tiny"), "--out", str(folder / "head.safetensors")])
    return folder


def trained_result(folder) -> dict:
    lines = (folder / "experiment/tiny/metrics.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if line.get("split") == "val")


def evaluated(folder, checkpoint: str, *arguments: str) -> dict:
    out = folder / "evaluation.jsonl"
    evaluate(["--checkpoint", str(folder / checkpoint), "--out", str(out), *arguments])
    return json.loads(out.read_text().splitlines()[-1])


@pytest.mark.parametrize(
    "checkpoint", ["experiment/tiny", "experiment/tiny/checkpoints/step_00000003", "head.safetensors"]
)
def test_a_trained_head_is_judged_as_it_was_in_training(folder, checkpoint, capsys):
    result, before = evaluated(folder, checkpoint), trained_result(folder)
    for key in ("loss", "forecast_l1", "best_mse", "forecast_frechet", "median_l1", "skill_mse"):
        assert result[key] == pytest.approx(before[key], rel=1e-6)
    assert result["horizon"]["ridge_l1"] == pytest.approx(before["horizon"]["ridge_l1"], rel=1e-6)
    said = capsys.readouterr().out
    assert result["clips"] == 16 and "median latent" in said
    assert re.search(
        r"linear probe, top-1: target [\d.]+%, forecast [\d.]+%, copy last [\d.]+%, sample [\d.]+%, chance [\d.]+%\n",
        said,
    )
    assert result["probe"].keys() == {"target", "forecast", "sample", "copy_last", "chance"}
    assert all(0 <= accuracy <= 1 for accuracy in result["probe"].values())


def test_two_processes_judge_as_one(folder):
    out = folder / "two.jsonl"
    arguments = ["--checkpoint", str(folder / "head.safetensors"), "--out", str(out)]
    arguments += ["evaluation.batch_size=3", "evaluation.max_clips=7"]
    finished = flperf("evaluate", *arguments, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    two = json.loads(out.read_text())
    one = evaluated(folder, "head.safetensors", "evaluation.max_clips=7")
    assert two["clips"] == one["clips"] == 7
    for key in ("forecast_l1", "copy_last_mse", "ridge_cosine", "forecast_energy", "forecast_frechet"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    assert two["probe"] == pytest.approx(one["probe"])


def test_a_result_is_a_line_of_its_own_behind_one_that_was_cut(folder):
    (folder / "evaluation.jsonl").write_text('{"loss": 1.0}\n{"lo')
    evaluated(folder, "head.safetensors", "evaluation.max_clips=2")
    whole, result = map(json.loads, (folder / "evaluation.jsonl").read_text().splitlines())
    assert whole == {"loss": 1.0} and result["clips"] == 2


def test_the_last_weights_differ_from_the_averaged_ones(folder):
    assert evaluated(folder, "experiment/tiny", "--weights", "last")["loss"] != trained_result(folder)["loss"]


def test_samples_are_written_and_reproducible(folder, capsys):
    arguments = ["--checkpoint", str(folder / "head.safetensors"), "--clips", "3"]
    sample([*arguments, "--out", str(folder / "first")])
    sample([*arguments, "--out", str(folder / "second")])
    first, second = (load_file(folder / name / "forecasts.safetensors") for name in ("first", "second"))
    assert first["forecast"].shape == (3, 3, 2, 2, 2, 24) and first["clip"].tolist() == [0, 1, 2]
    assert all(torch.equal(first[name], second[name]) for name in first)
    # 24 frames a second, stride 2, 2 frames a latent: a sixth of a second each.
    torch.testing.assert_close(first["seconds"][0], torch.tensor([1 / 6, 2 / 6]))


def test_a_horizon_in_seconds_is_rolled_out(folder):
    arguments = ["--checkpoint", str(folder / "head.safetensors"), "--clips", "2", "--out"]
    sample([*arguments, str(folder / "long"), "--seconds", "0.8"])
    sample([*arguments, str(folder / "short")])
    long, short = (load_file(folder / name / "forecasts.safetensors") for name in ("long", "short"))
    assert long["forecast"].shape[2] == 5 and long["seconds"][0, -1] >= 0.8 > long["seconds"][0, -2]
    assert torch.equal(long["forecast"][:, :, :2], short["forecast"])
    assert not torch.equal(long["forecast"][:, :, 2:4], short["forecast"])


def test_a_horizon_in_seconds_is_by_frames_a_second_where_they_are_set(folder):
    """The demo has 24 frames a second: 12 of a clip are every second one."""
    arguments = ["--checkpoint", str(folder / "head.safetensors"), "--clips", "2", "--seconds", "0.8"]
    sample([*arguments, "--out", str(folder / "by_stride")])
    sample([*arguments, "--out", str(folder / "by_time"), "dataset.fps=12", "dataset.stride=7"])
    by_stride, by_time = (load_file(folder / name / "forecasts.safetensors") for name in ("by_stride", "by_time"))
    assert by_stride.keys() == by_time.keys() and all(torch.equal(by_stride[name], by_time[name]) for name in by_time)
    sample([*arguments, "--out", str(folder / "slower"), "dataset.fps=4"])
    slower = load_file(folder / "slower/forecasts.safetensors")
    torch.testing.assert_close(slower["seconds"][0], torch.tensor([0.5, 1.0]))


def test_forecasting_from_python(folder):
    """The same latents as the whole line gives, from a video in memory."""
    from flperf.data import read_frames
    from flperf.forecaster import load_forecaster

    forecaster = load_forecaster(folder / "head.safetensors")
    assert forecaster.context_frames == 4
    path = next(iter((folder / "demo/validation.csv").read_text().split()))
    video = read_frames(str(folder / "demo" / path), [0, 2, 4, 6])
    frames = video.repeat_interleave(2, dim=0)[1:]  # frames between those at stride 2 are not looked at
    latents = forecaster.forecast(frames)
    assert latents.shape == (3, 2, 2, 2, 24) and latents.dtype == torch.float32
    assert torch.equal(latents, forecaster.forecast(frames)) and not torch.equal(
        latents, forecaster.forecast(frames, seed=1)
    )
    assert forecaster.forecast(frames, frames=5).shape[1] == 5
    by_time = load_forecaster(folder / "head.safetensors", overrides=["dataset.fps=12"])
    assert torch.equal(latents, by_time.forecast(frames, frame_rate=24))
    with pytest.raises(ValueError, match="frame_rate: is None; needs the video's frames a second"):
        by_time.forecast(frames)
    with pytest.raises(ValueError, match="at least 7 frames"):
        by_time.forecast(frames[:6], frame_rate=24)
    with pytest.raises(ValueError, match="at least 7 frames"):
        forecaster.forecast(frames[:6])
    for wrong in (frames[..., :1], frames[0], frames.float()):
        with pytest.raises(ValueError, match="needs uint8 f h w c"):
            forecaster.forecast(wrong)


def test_compiled_code_is_looked_for_where_training_left_it(folder, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    for checkpoint in ("experiment/tiny", "experiment/tiny/checkpoints/step_00000003"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        _use_compile_cache_of(str(folder / checkpoint))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "experiment/compile_cache/inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_a_result_that_can_not_be_written_shows_before_the_work(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="folder can't be made"):
        evaluate(["--checkpoint", "nowhere", "--out", str(tmp_path / "file/result.jsonl")])


def test_mistakes_are_named(folder, tmp_path):
    for path, message in [(tmp_path, "neither an exported file nor a run's folder"), (tmp_path / "x", "neither")]:
        with pytest.raises(UserError, match=message):
            evaluate(["--checkpoint", str(path)])
    (tmp_path / "broken.safetensors").write_bytes((folder / "head.safetensors").read_bytes()[:1000])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, message in [("broken", "not a safetensors file"), ("other", "was not written by")]:
        with pytest.raises(UserError, match=message):
            evaluate(["--checkpoint", str(tmp_path / f"{name}.safetensors")])
    with pytest.raises(UserError, match="num_context_latents 3|forecasts LatentGeometry"):
        evaluate(["--checkpoint", str(folder / "head.safetensors"), "dataset.n_frames=12"])
    (tmp_path / "other.yaml").write_text(f"inherits: [{folder}/tiny.yaml]\nmodel: {{depth: 2}}\n")
    with pytest.raises(UserError, match="model.depth: 1 -> 2"):
        evaluate(["--checkpoint", str(folder / "head.safetensors"), "--config", str(tmp_path / "other.yaml")])
    with pytest.raises(UserError, match="--frames: must be above 0"):
        sample(["--checkpoint", "x", "--out", "y", "--frames", "0"])


def test_an_error_is_all_that_is_printed():
    """Not even DeepSpeed's notice that there is no GPU, in a command that imports it before it fails."""
    command = [sys.executable, str(ROOT / "flperf/cli.py"), "evaluate", "--checkpoint", "nowhere"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 1 and not finished.stdout
    assert finished.stderr.startswith("flperf: nowhere: ") and finished.stderr.count("\n") == 1
