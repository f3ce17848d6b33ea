"""Clips a second from H.264 files, compared with the usual way.

    python -m pytest benchmarks/test_decode.py

Clips of 64 frames at stride 2, from 340 x 256 to 256 x 256. The baseline is a PyTorch DataLoader with decord and the
steps of the Hugging Face processor, a clip at a time: resize (antialiased; in float, and on bytes as torchvision
does), crop, rescale, normalise. It needs decord, of the extra `benchmark`. Our batches are uint8, which the encoder
normalises in its compiled graph; `normalised` includes that step, a clip at a time, for a fair comparison. DALI decodes
H.264 by NVDEC on a GPU, and VP9 and MJPEG on a CPU; it is compared with PyAV and, on a GPU, with both sharing the clips
as in training.
"""

import os
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from benchmarks.recording import MIN_ROUNDS
from benchmarks.sizes import DEVICE, ON_GPU, QUICK, compiled_normalisation
from benchmarks.usual_way import PROCESSORS, processed
from flperf.config import Backbone
from flperf.data import BatchShare
from flperf.data.dali import DaliReader
from flperf.data.loader import Reader, load_batches
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import FrameSampling, TrainingSampler
from flperf.data.videos import NVDEC_LANES
from flperf.data.worker_process import Reading
from flperf.data.workers import WorkerReader

WORKERS, CPU = len(os.sched_getaffinity(0)), torch.device("cpu")
FRAME_SAMPLING, BATCH = FrameSampling(64, 2, "first"), 1 if QUICK else 8
BATCHES = max(2, 4 * WORKERS // BATCH)  # enough that the start of a reader counts for little
PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 256}))


FORMATS = {  # name -> (file extension, encoder, pixel format, its options)
    "h264": ("mp4", "libx264", "yuv420p", {"crf": "23", "preset": "medium"}),
    "vp9": ("webm", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"}),
    "mjpeg": ("avi", "mjpeg", "yuvj420p", {}),
}
DALI_FORMATS = ("h264",) if ON_GPU else ("vp9", "mjpeg")


def write_videos(folder: Path, name: str) -> list[str]:
    """The paths of a batch, which names two files equally often: 150 frames of moving noise over a texture, encoded as
    Kinetics usually is, or in another format."""
    extension, codec, pixels, options = FORMATS[name]
    paths = [str(folder / f"{index}.{extension}") for index in range(min(2, BATCH))]
    for index, path in enumerate(paths):
        random = np.random.default_rng(index)
        texture = np.kron(random.integers(0, 160, (40, 60, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=Fraction(30), options=options)
            stream.width, stream.height, stream.pix_fmt = 340, 256, pixels
            for frame in range(150):
                image = texture[frame : frame + 256, 2 * frame : 2 * frame + 340] + random.integers(
                    0, 16, (256, 340, 1), dtype=np.uint8
                )
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
    return paths * (BATCH // len(paths))


class UsualDataset(torch.utils.data.Dataset):
    def __init__(self, paths: list[str], resized_in: torch.dtype):
        self.paths, self.resized_in = paths * BATCHES, resized_in

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        import decord

        reader = decord.VideoReader(self.paths[index], num_threads=1)
        frames = torch.from_numpy(reader.get_batch(FRAME_SAMPLING.frames(len(reader), 0.0)).asnumpy())
        return processed(frames, PREPROCESSING, self.resized_in)


def usual(paths: list[str], resized_in: torch.dtype) -> None:
    for batch in torch.utils.data.DataLoader(UsualDataset(paths, resized_in), BATCH, num_workers=WORKERS):
        assert batch.shape == (BATCH, 64, 3, 256, 256)


def with_pyav(paths: list[str]) -> Reader:
    return WorkerReader(paths, Reading(FRAME_SAMPLING, PREPROCESSING), CPU)


def with_dali(paths: list[str], lanes: int | None = None) -> Reader:
    return DaliReader(paths, Reading(FRAME_SAMPLING, PREPROCESSING), DEVICE, lanes)


def ours(reader: Reader, normalise: Callable[[torch.Tensor], object] | None = None) -> None:
    sampler = TrainingSampler(BATCH, 0)
    requests = sampler.batches(0, BatchShare(0, 1, BATCH, BATCH))
    batches = load_batches(reader, requests, sampler, [0] * BATCH, WORKERS, 1, reader.device)
    for _ in range(BATCHES):
        batch = next(batches)
        assert batch.video.shape == (BATCH, 64, 256, 256, 3)
        if normalise:
            for clip in batch.video.split(1):
                normalise(clip)
        batch.release()
    batches.close()


@pytest.mark.benchmark(group="decode, 64 frames of 340 x 256 H.264")
def test_decode(benchmark, record, tmp_path):
    paths = write_videos(tmp_path, "h264")
    processors = PROCESSORS if find_spec("decord") else {}
    usual_ways = {f"decord, DataLoader, {name}": partial(usual, paths, dtype) for name, dtype in processors.items()}
    normalise = compiled_normalisation(PREPROCESSING, torch.float32)
    beside = usual_ways | {"ours, normalised": lambda: ours(with_pyav(paths), normalise)}
    beside["ours, normalised"]()  # compiles; nothing else here has to
    seconds = record(
        lambda: ours(with_pyav(paths)), "clips", BATCH * BATCHES, rounds=MIN_ROUNDS, warm=False, beside=beside
    )
    benchmark.extra_info["normalised"] = record.ratios(
        {way: seconds[way] for way in ("ours, normalised", *usual_ways)}, "ours, normalised"
    )


@pytest.mark.benchmark(group="decode by DALI, 64 frames of 340 x 256")
@pytest.mark.parametrize("name", DALI_FORMATS)
def test_dali(record, tmp_path, name):
    paths = write_videos(tmp_path, name)
    beside = {"PyAV": lambda: ours(with_pyav(paths))}
    if ON_GPU:
        beside["both"] = lambda: ours(with_dali(paths, NVDEC_LANES))
    record(lambda: ours(with_dali(paths)), "clips", BATCH * BATCHES, rounds=MIN_ROUNDS, beside=beside)


@pytest.mark.benchmark(group="first batch of the order, 240,000 clips")
@pytest.mark.parametrize("step", [0, 1_000_000])
def test_resume(benchmark, step):
    """The step at which a run resumes makes no difference: the order is computed, not replayed."""

    def first_batch():
        return next(TrainingSampler(240_000, 0).batches(step, BatchShare(0, 8, 32, 256)))

    assert len(benchmark(first_batch)) == 32
