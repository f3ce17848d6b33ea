"""Clips that are shorter than the window: counted when a dataset is opened, padded or left out."""

import pytest
import torch

from flperf.config import Backbone, Config, Dataset
from flperf.data import BatchShare, index, open_dataset
from flperf.data.preprocessing import Preprocessing
from flperf.errors import UserError

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 32}))
CPU = torch.device("cpu")
LENGTHS = {"h264.mp4": 70, "short.mp4": 5, "vp9.webm": 60, "mjpeg.avi": 40}  # frames, 25 a second


@pytest.fixture
def files(videos, tmp_path):
    """A CSV of videos, and an index of it."""
    (tmp_path / "videos").symlink_to(videos)
    (tmp_path / "clips.csv").write_text("".join(f"videos/{name} {label}\n" for label, name in enumerate(LENGTHS)))
    index.write_index(index.read_listed(str(tmp_path / "clips.csv"), None), str(tmp_path / "index.csv"))
    return tmp_path


def opened(train, **keys):
    keys = {"n_frames": 24, "stride": 2} | keys  # 47 frames
    config = Config(dataset=Dataset(kind="kinetics_400", train=str(train), validation=str(train), threads=1, **keys))
    return open_dataset(config, PREPROCESSING, 0)


@pytest.mark.parametrize("window", [{}, {"stride": 99, "fps": 12.5}], ids=["stride", "fps"])
def test_an_index_tells_how_many_clips_are_short(files, window):
    dataset = opened(files / "index.csv", **window)
    for split, name in (("train", "training"), ("validation", "validation")):
        text = dataset.short[split].describe(name)
        assert text.startswith(f"2 of 4 {name} clips are shorter than the window of ") and "repeat their last" in text
    assert ("47 frames (24 at stride 2)" in text) != ("1.84 s (24 frames, 12.5 a second)" in text)
    assert opened(files / "index.csv", limit=2, **window).short["train"].describe("training").startswith("1 of 2 ")
    assert opened(files / "index.csv", n_frames=2).short["train"].describe("training").endswith("(2 at stride 2)")


@pytest.mark.parametrize("window", [{}, {"stride": 99, "fps": 12.5}], ids=["stride", "fps"])
def test_short_clips_of_an_index_are_left_out_before_an_epoch_counts_them(files, window):
    dataset = opened(files / "index.csv", short_clips="skip", **window)
    assert dataset.train_size == dataset.validation_size == 2 and dataset.splits["train"].labels == [0, 2]
    text = dataset.short["train"].describe("training")
    assert text.startswith("2 of 4 training clips") and text.endswith("are left out (dataset.short_clips: skip)")
    batch = next(dataset.train_batches(0, BatchShare(0, 1, 4, 4), CPU))
    assert not batch.short and not batch.skipped and sorted(batch.clip.tolist()) == [0, 0, 1, 1]
    assert opened(files / "index.csv", short_clips="skip", limit=1, **window).splits["train"].labels == [0]
    with pytest.raises(UserError, match=r"index\.csv: all 4 clips are shorter than the window of .*short_clips=pad"):
        opened(files / "index.csv", short_clips="skip", **window | {"n_frames": 64})


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
@pytest.mark.parametrize("window", [{}, {"stride": 99, "fps": 12.5}], ids=["stride", "fps"])
def test_without_an_index_short_clips_are_found_when_they_are_read(files, window, decoder):
    """As many as with an index, by the same rule."""
    for short_clips, clips in (("pad", {0, 1, 2, 3}), ("skip", {0, 2})):
        dataset = opened(files / "clips.csv", short_clips=short_clips, decoder=decoder, **window)
        text = dataset.short["train"].describe("training")
        assert text.endswith(f"flperf index --csv {files}/clips.csv --out {files}/clips.index.csv")
        batch = next(dataset.chosen_batches([range(4)], 4, "train", CPU))
        assert {path.rpartition("/")[2] for path, _ in batch.short} == {"short.mp4", "mjpeg.avi"}
        assert set(batch.clip[batch.valid].tolist()) == clips and not batch.skipped
        training = next(dataset.train_batches(0, BatchShare(0, 1, 4, 4), CPU))
        assert set(training.clip.tolist()) == clips and training.short and training.valid.all()
