"""The demo's folder: written once, whole or not at all, and read like Kinetics."""

import subprocess
import sys
import time

import av
import pytest
import torch

from flperf.config import Backbone, Config, Dataset
from flperf.data import DATASETS, BatchShare, Preprocessing, demo, open_dataset, prepare_dataset
from flperf.errors import UserError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 32}))


def demo_config(folder, **keys):
    paths = {key: str(folder / f"{key}.csv") for key in ("train", "validation", "labels")}
    return Config(dataset=Dataset(kind="demo", n_frames=8, **paths, **keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "nested" / "demo"
    prepare_dataset(demo_config(folder))
    return folder


def test_it_is_read_like_kinetics(folder):
    dataset = open_dataset(demo_config(folder), PREPROCESSING, 0)
    assert (dataset.train_size, dataset.validation_size, dataset.classes) == (96, 16, list(demo.CLASSES))
    batches = dataset.train_batches(0, BatchShare(0, 1, 96, 96), CPU)
    batch = next(batches)
    batches.close()
    assert batch.video.shape == (96, 8, 32, 32, 3) and not batch.skipped
    assert sorted(batch.label.tolist()) == sorted([0, 1, 2, 3] * 24)
    # something moves in each
    assert (batch.video[:, 0].float() - batch.video[:, -1].float()).abs().mean((1, 2, 3)).min() > 1


def test_half_is_vp9_and_half_h264(folder):
    codecs = {}
    for video in (folder / "videos").iterdir():
        with av.open(str(video)) as container:
            name = container.streams.video[0].codec_context.name
            codecs[name] = codecs.get(name, 0) + 1
    assert codecs == {"h264": 56, "vp9": 56}


def test_it_is_written_once(folder):
    before = (folder / "train.csv").stat().st_mtime_ns
    prepare_dataset(demo_config(folder))
    assert (folder / "train.csv").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]  # nothing left beside it


def test_a_killed_first_run_leaves_no_half_folder(tmp_path):
    script = (
        f"from flperf.data.demo import write_demo; print('begun', flush=True); write_demo({str(tmp_path / 'demo')!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not list(tmp_path.glob(".demo-*/demo/videos/*")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "demo").exists()


def test_foreign_folders_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SPLITS", {"train": 1})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists but holds no demo"):
        prepare_dataset(demo_config(tmp_path / "demo"))
    assert (tmp_path / "demo" / "thesis.txt").read_text() == "mine"


def test_kinds_are_looked_up():
    with pytest.raises(UserError, match="dataset.kind: 'kinetics' is none of kinetics_400, "):
        open_dataset(Config(dataset=Dataset(kind="kinetics")), PREPROCESSING, 0)
    for kind in DATASETS.keys() - {"bouncing_shapes"}:
        with pytest.raises(UserError, match="dataset.train: "):
            open_dataset(Config(dataset=Dataset(kind=kind)), PREPROCESSING, 0)


def test_importing_the_data_package_is_light():
    script = (
        "import sys, flperf.data; assert not {'nvidia.dali', 'transformers', 'huggingface_hub', 'av'} & "
        "sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
