"""A user's folder of mixed videos, some of them broken: index, train, stop, resume, evaluate, export, forecast from
Python."""

import json
import subprocess
import sys

from runs import ROOT, TINY

# One process for all commands, since starting one takes longer than what it does here.
WALK = """
import sys
from flperf import cli

def flperf(line):
    sys.argv = ["flperf", *line.split()]
    cli.main()

data = "dataset.kind=kinetics_400 dataset.train=videos.csv dataset.validation=videos.csv dataset.stride=1"
flperf("index --folder videos --out videos.csv")
flperf(f"train --config own.yaml {data} trainer.stop_after=2")
flperf(f"train --config own.yaml {data}")
flperf("evaluate --checkpoint experiment/own")
flperf("export --checkpoint experiment/own --out own.safetensors")
"""


def test_a_folder_of_mixed_videos_becomes_a_forecaster(videos, tmp_path):
    (tmp_path / "videos").symlink_to(videos)
    (tmp_path / "own.yaml").write_text(TINY.format(folder=tmp_path))
    (tmp_path / "clip.mp4").symlink_to(videos / "portrait.mp4")
    guide = (ROOT / "docs/guide.md").read_text()
    forecast = guide.split("```python\n")[1].split("```")[0].replace("k400.safetensors", "own.safetensors")
    program = WALK + forecast + "print('forecast', latents.shape, latents.isfinite().all().item())\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "unusable" in done.stdout and "resumed at step 2" in done.stdout + done.stderr
    assert "forecast torch.Size([1, 2, 2, 2, 24]) True" in done.stdout
    steps = [json.loads(line)["step"] for line in (tmp_path / "experiment/own/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4]
