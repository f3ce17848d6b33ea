"""Clips a second from H.264 files, compared with the usual way.

    python -m pytest benchmarks/test_decode.py

Clips of 64 frames at stride 2, from 340 x 256 to 256 x 256, from the start of files of 300 frames or from random places
in them. A key frame comes every 250 frames, the default of the encoder: a window in the middle costs what decoding up
to it costs. The baseline is a PyTorch DataLoader with decord and the steps of the Hugging Face processor, a clip at a
time: resize (antialiased; in float, and on bytes as torchvision does), crop, rescale, normalise. It reads the same
windows, and needs decord, of the extra `benchmark`. Our batches are uint8, which the encoder normalises in its compiled
graph; `normalised` includes that step, a clip at a time, for a fair comparison. It writes into memory that is used
again, as that of the batches is: clearing new memory would take eight times as long. DALI decodes H.264 by NVDEC on a
GPU, and VP9 and MJPEG on a CPU; it is compared with PyAV and, on a GPU, with both sharing the clips as in training.
Prepared files are those that `flperf prepare` writes.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.recording import MIN_ROUNDS
from benchmarks.sizes import DEVICE, ON_GPU, QUICK
from benchmarks.usual_way import PROCESSORS, processed
from benchmarks.video_files import VideoFormat, encode_videos
from flperf.config import Backbone
from flperf.data import BatchShare
from flperf.data.clip_writer import Plan, write_clip
from flperf.data.dali import DaliReader
from flperf.data.loader import Reader, load_batches
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import PyAVReader, opened
from flperf.data.samplers import ClipRequest, FrameSampling, TrainingSampler
from flperf.data.videos import NVDEC_LANES
from flperf.data.worker_messages import Reading
from flperf.data.workers import WorkerReader
from flperf.models.encoder import PixelNormalisation

WORKERS, CPU = len(os.sched_getaffinity(0)), torch.device("cpu")
FIRST, BATCH = FrameSampling(64, 2, "first"), 1 if QUICK else 8
BATCHES = max(2, 4 * WORKERS // BATCH)  # enough that the start of a reader counts for little
PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 256}))


FORMATS = {
    "h264": VideoFormat(),
    "vp9": VideoFormat(
        extension="webm",
        codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"},
    ),
    "mjpeg": VideoFormat(extension="avi", codec="mjpeg", pixels="yuvj420p", options={}),
}
DALI_FORMATS = ("h264",) if ON_GPU else ("vp9", "mjpeg")


def write_videos(folder: Path, name: str, frames: int = 300) -> list[str]:
    """The paths of a batch, which names two files equally often: encoded as Kinetics usually is, or in another
    format."""
    paths = encode_videos(folder, min(2, BATCH), frames, FORMATS[name])
    return paths * (BATCH // len(paths))


class UsualDataset(torch.utils.data.Dataset):
    """The clips that `ours` reads, in its order."""

    def __init__(self, paths: list[str], sampling: FrameSampling, resized_in: torch.dtype):
        self.paths, self.sampling, self.resized_in = paths, sampling, resized_in
        self.requests = list(itertools.chain(*itertools.islice(requested(), BATCHES)))

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> torch.Tensor:
        import decord

        request = self.requests[index]
        reader = decord.VideoReader(self.paths[request.clip], num_threads=1)
        indices = self.sampling.frames(np.arange(len(reader)) / reader.get_avg_fps(), request.uniform)
        return processed(torch.from_numpy(reader.get_batch(indices).asnumpy()), PREPROCESSING, self.resized_in)


def requested() -> Iterator[list[ClipRequest]]:
    return TrainingSampler(BATCH, 0).batches(0, BatchShare(0, 1, BATCH, BATCH))


def usual(paths: list[str], sampling: FrameSampling, resized_in: torch.dtype) -> None:
    dataset = UsualDataset(paths, sampling, resized_in)
    for batch in torch.utils.data.DataLoader(dataset, BATCH, num_workers=WORKERS):
        assert batch.shape == (BATCH, 64, 3, 256, 256)


def with_pyav(paths: list[str], sampling: FrameSampling = FIRST) -> Reader:
    return WorkerReader(paths, Reading(sampling, PREPROCESSING), CPU)


def with_dali(paths: list[str], lanes: int | None = None) -> Reader:
    return DaliReader(paths, Reading(FIRST, PREPROCESSING), DEVICE, lanes)


def ours(reader: Reader, normalise: Callable[[torch.Tensor], object] | None = None) -> None:
    batches = load_batches(reader, requested(), TrainingSampler(BATCH, 0), [0] * BATCH, WORKERS, 1, reader.device)
    for _ in range(BATCHES):
        batch = next(batches)
        assert batch.video.shape == (BATCH, 64, 256, 256, 3)
        if normalise:
            for clip in batch.video.split(1):
                normalise(clip)
        batch.release()
    batches.close()


def normaliser() -> Callable[[torch.Tensor], object]:
    """Normalises a clip into the same memory each time; compiled as in the encoder."""
    normalise = PixelNormalisation(PREPROCESSING, torch.float32)
    normalised = normalise(torch.zeros(1, 64, 256, 256, 3, dtype=torch.uint8))
    return torch.compile(lambda clip: normalised.copy_(normalise(clip)), fullgraph=True, dynamic=False)


@pytest.mark.benchmark(group="decode, 64 frames of 340 x 256 H.264")
@pytest.mark.parametrize("start", ["first", "random"])
def test_decode(benchmark, record, tmp_path, start):
    paths, sampling = write_videos(tmp_path, "h264"), FrameSampling(64, 2, start)
    processors = PROCESSORS if find_spec("decord") else {}
    usual_ways = {
        f"decord, DataLoader, {name}": partial(usual, paths, sampling, dtype) for name, dtype in processors.items()
    }
    normalise = normaliser()
    beside = usual_ways | {"ours, normalised": lambda: ours(with_pyav(paths, sampling), normalise)}
    beside["ours, normalised"]()  # compiles; nothing else here has to
    seconds = record(
        lambda: ours(with_pyav(paths, sampling)), "clips", BATCH * BATCHES, rounds=MIN_ROUNDS, warm=False, beside=beside
    )
    benchmark.extra_info["normalised"] = record.ratios(
        {way: seconds[way] for way in ("ours, normalised", *usual_ways)}, "ours, normalised"
    )


@pytest.mark.benchmark(group="decode, prepared files, random starts, one thread")
def test_prepared(benchmark, record, tmp_path):
    """Files of ten seconds with a key frame every 250 frames, and what `flperf prepare` makes of them."""
    paths = write_videos(tmp_path, "h264")[:2]
    prepared = [str(tmp_path / f"prepared_{index}.mp4") for index in range(len(paths))]
    for path, target in zip(paths, prepared, strict=True):
        with opened(path) as file:
            write_clip(file, Path(target), Plan(PREPROCESSING))
    starts = [(index, start) for index in range(len(paths)) for start in (0.1, 0.3, 0.5, 0.7, 0.9)]

    def read(files: list[str]) -> torch.Tensor:
        reader = PyAVReader(files, FrameSampling(64, 2, "random"), PREPROCESSING)
        slot, threads = torch.empty(reader.shape, dtype=torch.uint8), torch.get_num_threads()
        torch.set_num_threads(1)  # as in the threads that read
        for index, start in starts:
            reader.read(ClipRequest(0, 0, index, start, valid=True), slot)
        torch.set_num_threads(threads)
        return slot

    record(lambda: read(prepared), "clips", len(starts), beside={"the originals": lambda: read(paths)})
    sizes = [sum(map(os.path.getsize, files)) for files in (paths, prepared)]
    difference = (read(paths).float() - read(prepared).float()).abs().mean()
    benchmark.extra_info |= {"times as large": sizes[1] / sizes[0], "mean difference in levels": float(difference)}


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
