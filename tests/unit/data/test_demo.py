"""The demo's folder: written once, complete or not at all, and read like Kinetics."""

import subprocess
import sys
import time

import av
import pytest
import torch

from flperf.config import Backbone, Config, Dataset
from flperf.data import BatchShare, Preprocessing, demo, open_dataset, prepare_dataset
from flperf.data.annotations import read_labels
from flperf.errors import UserError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 32}))


def demo_config(folder, **keys):
    paths = {key: str(folder / f"{key}.csv") for key in ("train", "validation", "labels")}
    return Config(dataset=Dataset(kind="demo", n_frames=8, **paths, **keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A demo of a quarter of the clips."""
    folder = tmp_path_factory.mktemp("demo") / "nested" / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SPLITS", {split: clips // 4 for split, clips in demo.SPLITS.items()})
        prepare_dataset(demo_config(folder))
    return folder


def test_it_is_read_like_kinetics(folder):
    dataset = open_dataset(demo_config(folder), PREPROCESSING, 0)
    assert (dataset.train_size, dataset.validation_size) == (24, 4)
    assert read_labels(str(folder / "labels.csv"), [dataset.splits["train"]]) == list(demo.CLASSES)
    batches = dataset.train_batches(0, BatchShare(0, 1, 24, 24), CPU)
    batch = next(batches)
    batches.close()
    assert batch.video.shape == (24, 8, 32, 32, 3) and not batch.skipped
    assert sorted(batch.label.tolist()) == sorted([0, 1, 2, 3] * 6)
    # something moves in each
    assert (batch.video[:, 0].float() - batch.video[:, -1].float()).abs().mean((1, 2, 3)).min() > 1


def test_half_is_vp9_and_half_h264(folder):
    codecs = {}
    for video in (folder / "videos").iterdir():
        with av.open(str(video)) as container:
            name = container.streams.video[0].codec_context.name
            codecs[name] = codecs.get(name, 0) + 1
    assert codecs == {"h264": 14, "vp9": 14}


def test_it_is_written_once(folder):
    before = (folder / "train.csv").stat().st_mtime_ns
    prepare_dataset(demo_config(folder))
    assert (folder / "train.csv").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]  # nothing left beside it


IMPORT_THEN_WRITE = """
import sys, flperf.data
print({{"nvidia.dali", "transformers", "huggingface_hub", "av"}} & sys.modules.keys(), flush=True)
from flperf.data.demo import write_demo
write_demo({folder!r})
"""


def test_a_first_run_imports_little_and_leaves_no_half_folder_when_killed(tmp_path):
    script = IMPORT_THEN_WRITE.format(folder=str(tmp_path / "demo"))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "set()\n"
    while not list(tmp_path.glob(".demo-*/demo/videos/*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "demo").exists()


def test_foreign_folders_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SPLITS", {"train": 1, "validation": 1})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists but has no train.csv of the demo"):
        prepare_dataset(demo_config(tmp_path / "demo"))
    assert (tmp_path / "demo" / "thesis.txt").read_text() == "mine"


def test_labels_must_name_every_class(folder, tmp_path):
    (tmp_path / "labels.csv").write_text("0 bouncing square\n")
    config = demo_config(folder)
    config.dataset.labels = str(tmp_path / "labels.csv")
    with pytest.raises(UserError, match=r"labels\.csv: must name every class from 0 to 3"):
        open_dataset(config, PREPROCESSING, 0)
