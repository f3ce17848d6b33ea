"""A user's folder of mixed videos, some of them broken: index, train, stop, resume, evaluate, export, forecast from
Python."""

import json
import re

from runs import ROOT, TINY
from worlds import flperf, python

DATA = "dataset.kind=kinetics_400 dataset.train=videos.csv dataset.validation=videos.csv dataset.stride=1"


def test_a_folder_of_mixed_videos_becomes_a_forecaster(videos, tmp_path):
    (tmp_path / "videos").symlink_to(videos)
    (tmp_path / "own.yaml").write_text(TINY.format(folder=tmp_path))
    (tmp_path / "clip.mp4").symlink_to(videos / "portrait.mp4")

    def run(line: str) -> str:
        done = flperf(*line.split(), cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    assert "unusable" in run("index --folder videos --out videos.csv")
    started = run(f"train --config own.yaml {DATA} trainer.stop_after=2")
    assert re.search(r" [1-9]\d* of \d+ training clips are shorter than the window of 8 frames .* repeat", started)
    assert "resumed at step 2" in run(f"train --config own.yaml {DATA}")
    lines = [json.loads(line) for line in (tmp_path / "experiment/own/metrics.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [1, 2, 3, 4]
    assert all(line["short_clips"] >= 0 for line in lines if "split" not in line)
    run("evaluate --checkpoint experiment/own")
    run("export --checkpoint experiment/own --out own.safetensors")

    guide = (ROOT / "docs/guide.md").read_text()
    forecast = guide.split("```python\n")[1].split("```")[0].replace("k400.safetensors", "own.safetensors")
    done = python(forecast + "print(latents.shape, latents.isfinite().all().item())", cwd=tmp_path)
    assert "torch.Size([1, 2, 2, 2, 24]) True" in done.stdout, done.stderr[-3000:]
