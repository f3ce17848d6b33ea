"""`flperf prepare`: resumable on any number of processes, and all that reads a prepared set."""

import json
import signal

import pytest
import torch
from ranks import prepare as ranks
from runs import ROOT
from worlds import World, flperf, run_world

from flperf.config import load_config
from flperf.data import Preprocessing, open_dataset
from flperf.data.index import read_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Configurations of the demo's videos, one of them broken, and of those that preparing yields, for a tiny
    encoder."""
    from flperf.data.demo import write_demo

    folder = tmp_path_factory.mktemp("preparing")
    write_demo(folder / "demo")
    (folder / "demo/videos/clip_03.mp4").write_bytes(b"no video")
    for name, data in (("video", "demo"), ("prepared", "prepared")):
        (folder / f"{name}.yaml").write_text(f"""
inherits: [{ROOT}/configs/demo.yaml]
experiment: {folder}/experiment
backbone:
  architecture: {{crop_size: 32, hidden_size: 24, num_hidden_layers: 1, pred_hidden_size: 24,
   pred_num_hidden_layers: 1}}
dataset: {{n_frames: 8, labels: null, kind: kinetics_400, train: {folder}/{data}/train.csv,
  validation: {folder}/{data}/validation.csv}}
model: {{num_context_latents: 2, hidden_dim: 32, depth: 1}}
trainer: {{batch_size: 4, max_steps: 6, warmup_steps: 1}}
latents: {{statistics_clips: 8}}
engine: {{compile: false, precision: fp32}}
tracking: {{log_every: 1}}
""")
    return folder


def arguments(folder, out="prepared"):
    return ["--config", str(folder / "video.yaml"), "--out", str(folder / out)]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "clips").rglob("*.mp4")}


@pytest.fixture(scope="module")
def prepared(demo):
    """By one process, which is killed before it renames a file and after it has renamed another, then by two."""
    for killed_at, after in ((20, False), (10, True)):
        with World(None, ranks.prepare, arguments(demo), killed_at, after) as world:
            assert world.join() == [-signal.SIGKILL], world.stderr
        assert not (demo / "prepared/train.csv").exists()
    left = files(demo / "prepared")
    with World(2, ranks.prepare, arguments(demo)) as world:
        assert world.join() == [0, 0], world.stderr
        return demo, left, world.stdout


def test_a_kill_loses_and_doubles_no_file(prepared):
    folder, left, printed = prepared
    found = files(folder / "prepared")
    assert 20 <= len(left) < len(found) == 95 + 16
    rewritten = [path for path in left if left[path] != found[path]]
    assert len(rewritten) <= 20, "only files that were being recorded at a kill are written again"
    assert not list((folder / "prepared").rglob("*.unfinished"))
    assert "train.csv: 95 of 96 clips, 1 can't be read" in printed and printed.count("relative L2") == 1
    config = load_config(folder / "video.yaml")
    originals = open_dataset(config, Preprocessing.of(config.backbone), 0).splits["train"]
    labels = [label for path, label in zip(originals.paths, originals.labels, strict=True) if "clip_03" not in path]
    index = read_index(str(folder / "prepared/train.csv"), None)
    assert index.labels == labels
    stems = [path.rpartition("/")[2].rpartition("-")[0] for path in index.paths]
    assert stems == [path.rpartition("/")[2].rpartition(".")[0] for path in originals.paths if "clip_03" not in path]


def test_any_number_of_processes_writes_the_same(prepared):
    folder, *_ = prepared
    run_world(3, ranks.prepare, arguments(folder, "other"))
    for name in ("train.csv", "validation.csv"):
        assert (folder / "other" / name).read_text() == (folder / "prepared" / name).read_text()
    ours, theirs = (
        {path.name: path.read_bytes() for path in (folder / out / "clips").rglob("*.mp4")}
        for out in ("prepared", "other")
    )
    assert ours == theirs
    costs = [json.loads((folder / out / "prepared.json").read_text())["cost"] for out in ("prepared", "other")]
    assert costs[0].pop("backbone") == costs[1].pop("backbone")
    assert costs[0] == pytest.approx(costs[1], rel=1e-6)


def test_two_starts_at_once(prepared):
    """One is refused, and nothing is spoilt."""
    folder, *_ = prepared
    with (
        World(None, ranks.prepare, arguments(folder, "twice")) as one,
        World(None, ranks.prepare, arguments(folder, "twice")) as two,
    ):
        ended = one.join(), two.join()
        errors = one.stderr + two.stderr
    if ended != ([0], [0]):  # else one began when the other had ended
        assert sorted(ended) == [[0], [1]] and "another `flperf prepare` is writing it" in errors, errors
    assert len(files(folder / "twice")) == 95 + 16


def test_training_evaluation_and_encoding_take_it(prepared):
    folder, *_ = prepared
    config = ["--config", str(folder / "prepared.yaml")]
    for command in (
        ("train", *config),
        ("evaluate", "--checkpoint", str(folder / "experiment/prepared")),
        ("encode", *config, "--out", str(folder / "latents")),
    ):
        finished = flperf(*command)
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    manifest = (folder / "latents/train/manifest.csv").read_text()
    assert str(folder / "prepared/clips") in manifest and "demo/videos" not in manifest
    # The latents of the originals are others, and are not gone on with.
    finished = flperf("encode", "--config", str(folder / "video.yaml"), "--out", str(folder / "latents"))
    assert finished.returncode == 1 and "other clips" in finished.stderr


def test_another_backbone_is_refused_in_one_line(prepared):
    folder, *_ = prepared
    other = "name=other", "backbone.architecture.crop_size=64"
    finished = flperf("train", "--config", str(folder / "prepared.yaml"), *other)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("flperf: dataset.train: ")
    assert "prepare the original files again" in finished.stderr.splitlines()[-1]
