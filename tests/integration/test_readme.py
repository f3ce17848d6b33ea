"""The commands of README.md and docs/*.md run, in their order and at a small size, in one folder; those that need data
or weights from elsewhere are checked in test_documents.py."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from documents import PAGES, blocks, flperf_commands, write_configurations
from runs import ROOT
from worlds import flperf, python

README = ROOT / "README.md"
SMALL = """
trainer.max_steps=2 trainer.max_epochs=null trainer.batch_size=4 trainer.micro_batch_size=2 trainer.warmup_steps=1
dataset.n_frames=8 dataset.limit=12 latents.statistics_clips=8 engine.compile=false tracking.wandb=none
backbone.weights=null backbone.architecture.crop_size=32 backbone.architecture.hidden_size=24
backbone.architecture.num_hidden_layers=1 backbone.architecture.num_attention_heads=2
model.num_context_latents=2 model.hidden_dim=32 model.depth=1 model.num_heads=2
evaluation.sampling.steps=2 evaluation.probe_clips=12 evaluation.max_clips=4
"""
SHRUNK = ("train", "prepare", "encode", "doctor")  # read a configuration; the others read what these wrote
ELSEWHERE = ("/data/", "~/", "configs/references/", "configs/shapes/", "configs/k400.yaml", "configs/mine.yaml")
ELSEWHERE += ("mixture.yaml", "experiment/k400", "experiment/predictor", "OLD.")
OWN_VIDEOS = {"h264.mp4": "cats", "vp9.webm": "cats", "hevc.mp4": "dogs", "portrait.mp4": "dogs", "empty.webm": "dogs"}


def is_run(command: str) -> bool:
    return not any(word in command for word in ELSEWHERE)


def runnable() -> list[str]:
    """Each command once, the README's first."""
    return list(dict.fromkeys(command for page in PAGES for command in flperf_commands(page) if is_run(command)))


def small(command: str) -> str:
    words = shlex.split(command)
    shrunk = "flperf/train.py" in words or (words[1] in SHRUNK and "--config" in words)
    return shlex.join(words + shlex.split(SMALL if shrunk else ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, videos) -> Path:
    """A working directory as the README assumes it: a checkout, with videos in two folders."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "flperf").symlink_to(ROOT / "flperf")
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_configurations(README, folder)
    for split in ("train", "validation"):
        for name, group in OWN_VIDEOS.items():
            (folder / "videos" / split / group).mkdir(parents=True, exist_ok=True)
            (folder / "videos" / split / group / name).symlink_to(videos / name)
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Without the launcher, which starts slowly; test_smoke.py runs the first command with it."""
    words = shlex.split(command)
    if words[0] == "flperf":
        return flperf(*words[1:], cwd=folder)
    processes = int(words[words.index("--num_accelerators") + 1]) if "--num_accelerators" in words else 1
    return flperf("train", *words[words.index("flperf/train.py") + 1 :], processes=processes, cwd=folder)


def python_blocks() -> list[str]:
    """Programs that read what the commands leave."""
    return [block for page in (README, ROOT / "docs/evaluation.md") for block in blocks(page, "python")]


def test_the_lines_that_set_up_come_first():
    lines = [line for block in blocks(README, "bash") for line in block.splitlines()]
    assert lines[0].endswith(" && deepspeed flperf/train.py --config configs/demo.yaml")
    assert lines[1].endswith(" && pytest -q")


def test_commands_and_programs_run_in_their_order(folder):
    for command in map(small, runnable()):
        done = run(command, folder)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for block in python_blocks():
        done = python(block + "\nassert latents.ndim == 5 and latents.isfinite().all()", cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
