"""More than two hundred damaged files in one dataset, and a long one: reading goes on, replaces the same clips every
time, closes its files and needs little memory."""

import itertools
import os
import struct
from collections.abc import Iterator

import av
import numpy as np
import psutil
import pytest
import torch

from flperf.config import Backbone
from flperf.data import BatchShare, decoding, index, pyav
from flperf.data.loader import load_batches
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import ClipBatch, ClipRequest, FrameSampling, TrainingSampler

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 32}))
FRAME_SAMPLING = FrameSampling(4, 2, "random")
SOURCES = ("h264.mp4", "vp9.webm", "vp8.webm", "mjpeg.avi", "mpeg4.avi")


def box_boundaries(content: bytes) -> list[int]:
    """Offsets of the boxes of an MP4, also of those inside moov (ISO/IEC 14496-12, 4.2)."""
    offsets, containers = [], {b"moov", b"trak", b"mdia", b"minf", b"stbl"}

    def walk(start: int, end: int) -> None:
        while start + 8 <= end:
            size, kind = struct.unpack(">I4s", content[start : start + 8])
            if size < 8:
                return
            offsets.append(start)
            if kind in containers:
                walk(start + 8, start + size)
            start += size

    walk(0, len(content))
    return offsets


@pytest.fixture(scope="module")
def corpus(videos, tmp_path_factory) -> list[str]:
    """Paths of undamaged files, and of files made from each: with flipped bits, cut at every box of the MP4 and
    elsewhere, with foreign extensions."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    names = []

    def add(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        names.append(name)

    for source in SOURCES:
        content = (videos / source).read_bytes()
        stem, extension = source.split(".")
        for copy in range(60):
            add(f"{stem}_{copy}.{extension}", content)
        for mutant in range(24):
            damaged = bytearray(content)
            for offset in random.integers(0, len(content), 1 + mutant):
                damaged[offset] ^= 1 << random.integers(8)
            add(f"{stem}_flipped_{mutant}.{extension}", bytes(damaged))
        cuts = [*random.integers(1, len(content), 16), *(box_boundaries(content) if extension == "mp4" else ())]
        for cut in sorted({int(cut) for cut in cuts}):
            add(f"{stem}_cut_{cut}.{extension}", content[:cut])
        for foreign in ("mp4", "webm", "avi", "txt"):
            add(f"{stem}_named.{foreign}", content)
    mutants = [name for name in names if any(word in name for word in ("flipped", "cut", "named"))]
    assert len(mutants) > 200
    return [str(folder / name) for name in names]


def read(paths: list[str], clips: int, batch_size: int = 16) -> Iterator[ClipBatch]:
    """The batches of the first clips of the training order."""
    sampler, share = TrainingSampler(len(paths), 0), BatchShare(0, 1, batch_size, batch_size)
    reader = pyav.PyAVReader(paths, FRAME_SAMPLING, PREPROCESSING)
    batches = load_batches(reader, sampler.batches(0, share), sampler, [0] * len(paths), 2, 2, CPU)
    yield from itertools.islice(batches, clips // batch_size)
    batches.close()


def memory() -> float:
    """MB of this process that are in memory now."""
    return psutil.Process().memory_info().rss / 1e6


def test_reading_goes_on_without_leaks_and_is_the_same_every_time(corpus):
    """Over two epochs, which open every file twice. After the first 200 clips the process grows by less than 25 MB and
    opens nothing that it does not close. A second start reads and replaces the same clips."""
    handles, before, seen = len(os.listdir("/proc/self/fd")), None, []
    for number, batch in enumerate(read(corpus, 2 * len(corpus)), start=1):
        assert batch.video.shape == (16, 4, 32, 32, 3)
        seen.append((batch.clip.tolist(), batch.skipped))
        if number * 16 >= 200 and before is None:
            before = memory()
    assert memory() - before < 25
    assert len(os.listdir("/proc/self/fd")) <= handles + 2
    skipped = [path for _, clips in seen for path, _ in clips]
    assert skipped and all("cut" in path or "flipped" in path for path in skipped)  # no undamaged file is missing
    for batch, expected in zip(read(corpus, len(corpus)), seen, strict=False):
        assert (batch.clip.tolist(), batch.skipped) == expected


def test_a_long_video_is_not_held_in_memory(tmp_path, monkeypatch):
    """Of 120 MB of packets no more than KEPT_BYTES are in memory at a time."""
    file, grown, decode = tmp_path / "long.avi", [], decoding.decode
    with av.open(str(file), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 1000, 1000, "yuv420p"
        for _ in range(80):
            container.mux(stream.encode(av.VideoFrame(1000, 1000, "yuv420p")))
    before = memory()
    monkeypatch.setattr(decoding, "decode", lambda *packet: grown.append(memory() - before) or decode(*packet))
    reader = pyav.PyAVReader([str(file)], FRAME_SAMPLING, PREPROCESSING)
    reader.read(ClipRequest(0, 0, 0, 0.5, valid=True), torch.empty(4, 32, 32, 3, dtype=torch.uint8))
    assert len(grown) > 4 and max(grown) < 60
    assert index.probe_file(tmp_path, file.name, 0).frames == 80
