"""The PyAV decoder: exact frames, and damaged files that are replaced."""

import logging
import os

import numpy as np
import pytest
import torch

from flperf.config import Backbone
from flperf.data import pyav, video_file
from flperf.data.loader import load_batches
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, ClipRequest, FrameSampling, TrainingSampler
from flperf.data.unreadable import BadClip

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 48}))
CPU = torch.device("cpu")
READABLE = [
    "h264.mp4",
    "portrait.mp4",
    "short.mp4",
    "hevc.mp4",
    "mpeg4.avi",
    "vp9.webm",
    "vp9_short.webm",
    "vp8.webm",
    "mjpeg.avi",
    "h264.ts",
    "variable.mkv",
]


def read_clip(path, frame_sampling, uniform, preprocessing, out):
    reader = pyav.PyAVReader([str(path)], frame_sampling, preprocessing)
    return reader.read(ClipRequest(0, 0, 0, uniform, valid=True), out)


def read(folder, names, batch_size=4):
    reader = pyav.PyAVReader([str(folder / name) for name in names], FrameSampling(4, 3, "random"), PREPROCESSING)
    sampler = TrainingSampler(len(names), 0)
    requests = sampler.batches(0, BatchShare(0, 1, batch_size, batch_size))
    return load_batches(reader, requests, sampler, list(range(len(names))), 2, 2, CPU)


@pytest.mark.parametrize("kept_bytes", [video_file.KEPT_BYTES, 0])
@pytest.mark.parametrize("name", READABLE)
def test_frames_are_those_of_plain_decoding(videos, decode_all, monkeypatch, name, kept_bytes):
    """Packets are kept in memory, or demuxed again as for long videos."""
    monkeypatch.setattr(video_file, "KEPT_BYTES", kept_bytes)
    everything = decode_all(videos / name)
    for n_frames, stride, uniform in [(1, 1, 0.0), (8, 1, 0.7), (7, 5, 0.99), (12, 2, 0.4), (80, 1, 0.5)]:
        frame_sampling = FrameSampling(n_frames, stride, "random")
        out = torch.full((n_frames, 48, 48, 3), 77, dtype=torch.uint8)
        read_clip(str(videos / name), frame_sampling, uniform, PREPROCESSING, out)
        expected = everything[frame_sampling.frames(np.arange(len(everything)) / 25, uniform)]
        assert torch.equal(out, PREPROCESSING.apply(torch.from_numpy(expected))), (n_frames, stride, uniform)


@pytest.mark.parametrize("fps", [3.0, 12.5, 25.0, 40.0])
def test_frames_by_time_on_a_variable_frame_rate(videos, decode_all, fps):
    """Frame i of this file begins at 40 i + 20 (i // 4)^2 ms."""
    everything = decode_all(videos / "variable.mkv")
    times = np.array([40 * index + 20 * (index // 4) ** 2 for index in range(40)]) / 1000
    for start, uniform in [("first", 0.0), ("center", 0.0), ("random", 0.3), ("random", 0.999)]:
        frame_sampling = FrameSampling(8, 1, start, fps)
        out = torch.full((8, 48, 48, 3), 77, dtype=torch.uint8)
        assert read_clip(str(videos / "variable.mkv"), frame_sampling, uniform, PREPROCESSING, out) == []
        expected = everything[frame_sampling.frames(times, uniform)]
        assert torch.equal(out, PREPROCESSING.apply(torch.from_numpy(expected))), (start, uniform)


def test_a_packet_of_an_unknown_stream_is_passed_over(videos, decode_all):
    """The last frame of a transport stream has lost its stream's number; all others are read, every time."""
    everything, size = decode_all(videos / "h264.ts"), (96, 130)
    for _ in range(5):
        out = torch.empty(69, *size, 3, dtype=torch.uint8)
        unchanged = Preprocessing(size, None, 1.0, (0.0,) * 3, (1.0,) * 3)
        read_clip(str(videos / "stray.ts"), FrameSampling(69, 1, "first"), 0.0, unchanged, out)
        kept = [index for index in range(70) if (out == torch.from_numpy(everything[index])).flatten(1).all(1).any()]
        assert len(kept) == 69 and torch.equal(out, torch.from_numpy(everything[kept]))


BROKEN = [
    "empty.webm",
    "text.mp4",
    "truncated.mp4",
    "damaged.webm",
    "audio.mp4",
    "missing.mp4",
    "no_frames.mp4",
    ".",
]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_bad_clips(videos, name):
    with pytest.raises(BadClip) as caught:
        read_clip(
            str(videos / name),
            FrameSampling(30, 2, "first"),
            0.0,
            PREPROCESSING,
            torch.empty(30, 48, 48, 3, dtype=torch.uint8),
        )
    path, reason = caught.value.args
    assert path == str(videos / name) and reason


def test_a_bad_clip_is_replaced_by_the_next_and_logged_once(videos, caplog):
    names = ["h264.mp4", "missing.mp4", "vp9.webm", "mjpeg.avi", "with a space.mp4"]
    sampler = TrainingSampler(5, 0)
    with caplog.at_level(logging.WARNING):
        stream = read(videos, names)
        batches = [next(stream) for _ in range(5)]  # 20 samples, four of them of the missing file
    for batch in batches:
        assert batch.video.dtype == torch.uint8 and batch.video.shape == (4, 4, 48, 48, 3) and batch.latents is None
        for sample, clip, label in zip(batch.sample.tolist(), batch.clip.tolist(), batch.label.tolist(), strict=True):
            first = sampler.request(sample).clip
            assert clip == label == (sampler.request(sample, 1).clip if first == 1 else first)
    skipped = [clip for batch in batches for clip in batch.skipped]
    assert [path for path, _ in skipped] == [str(videos / "missing.mp4")] * 4
    assert "No such file" in skipped[0][1]
    assert len([record for record in caplog.records if "missing.mp4" in record.message]) == 1


def test_a_file_that_vanishes_is_replaced(videos, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((videos / "h264.mp4").read_bytes())
    stream = read(tmp_path, ["a.mp4", "b.mp4"])
    next(stream)
    os.remove(tmp_path / "a.mp4")
    later = [next(stream) for _ in range(6)][-1]
    assert later.clip.tolist() == [1, 1, 1, 1] and later.valid.all()
