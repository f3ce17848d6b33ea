"""DALI's graph: the GPU's serialises without one, its CPU twin runs; on either device it agrees with PyAV and
replaces the same clips.

Levels measured against PyAV on these files, smooth textures: DALI's own conversion from YUV makes mean differences of
1.3 to 1.7 levels and up to 18 at single pixels.
"""

import threading

import pytest
import torch

from flperf.config import Backbone, Dataset
from flperf.data import dali, dataset, pyav
from flperf.data.annotations import Annotations
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, FrameSampling, TrainingSampler, ValidationSampler
from flperf.errors import UserError

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 48}))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [CPU, pytest.param(GPU, marks=pytest.mark.gpu)]
MEAN_LEVELS, MAX_LEVELS = 2.0, 24


def read(decoder, folder, names, sampler=None, batches=None, window=None, batch_size=4, device=CPU, **more):
    annotations = Annotations([str(folder / name) for name in names], list(range(len(names))))
    sampler = sampler or TrainingSampler(len(names), 0)
    batches = batches or sampler.batches(0, BatchShare(0, 1, batch_size, batch_size))
    return decoder.read_batches(
        batches, sampler, annotations, window or FrameSampling(6, 3, "random"), PREPROCESSING, 2, 2, device, **more
    )


def pairs(folder, names, device, **how):
    """The streams of DALI on a device and of PyAV."""
    return read(dali, folder, names, **how, device=device), read(pyav, folder, names, **how)


def levels(a, b):
    """How far DALI's frames are from PyAV's."""
    assert a.video.shape == b.video.shape and a.video.dtype == torch.uint8
    return (a.video.cpu().float() - b.video.float()).abs()


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize("backend", ["mixed", "cpu"])
def test_the_graph_serialises_without_a_gpu(backend):
    graph = dali.Graph(FrameSampling(6, 3, "random"), backend, 0)
    assert b"decoders__Video" in graph.pipeline(lambda: None).serialize()


SMALL_FILES = ["vp9.webm", "vp8.webm", "mjpeg.avi", "vp9_short.webm"]
OF_NVDEC = ["h264.mp4", "hevc_large.mp4", "vp9_large.webm", "vp8.webm", "variable.mkv"]


@pytest.mark.parametrize(
    "device, name",
    [*((CPU, name) for name in SMALL_FILES), *(pytest.param(GPU, name, marks=pytest.mark.gpu) for name in OF_NVDEC)],
)
@pytest.mark.parametrize("stride", [1, 4])
def test_agrees_with_pyav(videos, device, name, stride):
    ours, reference = (
        take(stream, 2)
        for stream in pairs(videos, [name], device, window=FrameSampling(10, stride, "random"), batch_size=2)
    )
    for a, b in zip(ours, reference, strict=True):
        assert a.video.device == device
        difference = levels(a, b)
        assert difference.mean() <= MEAN_LEVELS and difference.max() <= MAX_LEVELS


@pytest.mark.parametrize("device", DEVICES)
def test_bad_clips_are_replaced_as_pyav_replaces_them_and_no_good_one_is_lost(videos, device):
    names = [
        "vp9.webm",
        "damaged.webm",
        "vp8.webm",
        "missing.webm",
        "mjpeg.avi",
        "empty.webm",
        "vp9_short.webm",
        "vp9.webm",
        "vp8.webm",
    ]
    window = FrameSampling(12, 3, "first")  # the whole of damaged.webm is needed
    ours, reference = (take(stream, 6) for stream in pairs(videos, names, device, window=window))
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.sample, b.sample) and torch.equal(a.label, a.clip)
        assert sorted(path for path, _ in a.skipped) == sorted(path for path, _ in b.skipped)
        assert levels(a, b).mean() <= MEAN_LEVELS
    reasons = dict(fault for batch in ours for fault in batch.skipped)
    assert reasons[str(videos / "damaged.webm")].startswith("DALI: ")


@pytest.mark.parametrize("device", DEVICES)
def test_validation_leaves_out_what_cannot_be_read(videos, device):
    """A missing file is found by the probe, a damaged one by the decoder; a batch may hold nothing else."""
    names = [
        "missing",
        "missing",
        "vp9",
        "damaged",
        "vp8",
        "missing",
        "damaged",
        "vp9",
        "vp8",
        "vp9",
        "missing",
        "missing",
        "vp8",
        "vp9",
    ]
    files, sampler, window = [f"{name}.webm" for name in names], ValidationSampler(14), FrameSampling(12, 3, "first")
    ours, reference = (
        list(read(decoder, videos, files, sampler, sampler.batches(BatchShare(0, 1, 2, 2), 2), window, device=place))
        for decoder, place in ((dali, device), (pyav, CPU))
    )
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.valid, b.valid) and a.video.shape == b.video.shape
        assert [path for path, _ in a.skipped] == [path for path, _ in b.skipped]
        assert levels(a, b).mean() <= MEAN_LEVELS
    valid = torch.cat([batch.valid for batch in ours]).tolist()
    assert valid == [name not in ("missing", "damaged") for name in names]


def test_a_file_that_vanishes_is_replaced(videos, tmp_path):
    for name in ("a.webm", "b.webm"):
        (tmp_path / name).write_bytes((videos / "vp9.webm").read_bytes())
    stream = read(dali, tmp_path, ["a.webm", "b.webm"])
    next(stream)
    (tmp_path / "a.webm").unlink()
    later = take(stream, 6)[-1]
    assert later.clip.tolist() == [1, 1, 1, 1] and later.valid.all()
    assert {path for path, _ in later.skipped} == {str(tmp_path / "a.webm")}


def test_validation_ends(videos):
    sampler = ValidationSampler(5)
    batches = list(read(dali, videos, ["vp9.webm"] * 5, sampler, sampler.batches(BatchShare(1, 2, 1, 2), 2)))
    assert [batch.clip.tolist() for batch in batches] == [[2, 3], [4, 4]]
    assert [batch.valid.tolist() for batch in batches] == [[True, True], [False, False]]


@pytest.mark.parametrize("device", DEVICES)
def test_batches_stay_as_they_were(videos, device):
    """What DALI hands over without a copy isn't written again."""
    stream = read(dali, videos, ["vp9.webm", "vp8.webm", "mjpeg.avi"], device=device)
    kept = [next(stream).video for _ in range(2)]
    copies = [video.clone() for video in kept]
    for _ in range(5):
        next(stream)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.gpu
def test_a_batch_let_go_before_the_gpu_has_read_it_is_read_all_the_same(videos):
    """A training step queues work on a batch and drops it long before that work begins."""
    names = ["h264.mp4", "hevc_large.mp4", "vp9_large.webm"]

    def sums(busy: int) -> list[int]:
        stream, found = read(dali, videos, names, device=GPU), []
        for _ in range(12):
            torch.cuda._sleep(busy)
            found.append(next(stream).video.sum(dtype=torch.int64))
        stream.close()
        return torch.stack(found).tolist()

    assert sums(busy=100_000_000) == sums(busy=0)  # cycles: some 50 ms a batch


OF_PYAV = {CPU: ["h264.mp4", "hevc.mp4", "mpeg4.avi"], GPU: ["hevc.mp4", "mpeg4.avi", "mjpeg.avi", "vp9.webm"]}


@pytest.mark.parametrize("device", DEVICES)
def test_what_dali_cannot_decode_is_decoded_by_pyav(videos, device, caplog):
    """Among clips that DALI decodes, in whole batches of its own, and after a file that DALI failed at."""
    names = [*OF_PYAV[device], "vp8.webm", *OF_PYAV[device], "missing.webm"]
    ours, reference = (take(stream, 8) for stream in pairs(videos, names, device, batch_size=2))
    alone = 0
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and a.video.device == device and a.skipped == b.skipped
        for clip, video, other in zip(a.clip, a.video.cpu(), b.video, strict=True):
            assert torch.equal(video, other) == (names[clip] != "vp8.webm")
        alone += all(names[clip] != "vp8.webm" for clip in a.clip)
    assert 0 < alone < 8
    assert sum("PyAV decodes such clips" in line for line in caplog.messages) == len(OF_PYAV[device])


@pytest.mark.parametrize("device", DEVICES)
def test_dali_and_pyav_share_the_clips(videos, device):
    """One worker has a lane, the other has none: each takes what comes when it is free, and the order stays."""
    names = {CPU: ["vp9.webm", "vp8.webm", "mjpeg.avi"], GPU: ["h264.mp4", "vp8.webm"]}[device]
    ours = take(read(dali, videos, names, device=device, lanes=1), 12)
    reference = take(read(pyav, videos, names), 12)
    by_pyav = []
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.sample, b.sample) and a.video.device == device
        assert levels(a, b).mean() <= MEAN_LEVELS
        by_pyav += levels(a, b).flatten(1).amax(1).eq(0).tolist()
    assert 0 < sum(by_pyav) < len(by_pyav)


@pytest.mark.parametrize("decoder, device, training, expected", [
    ("auto", "cuda", True, "shared"),
    ("auto", "cuda", False, "pyav"),
    ("auto", "cpu", True, "pyav"),
    ("pyav", "cuda", True, "pyav"),
    ("dali", "cuda", False, "dali"),
    ("dali", "cpu", True, "dali"),
])  # fmt: skip
def test_who_decodes(decoder, device, training, expected):
    """Which decoder reads a clip is left to chance in training alone."""
    read_batches, threads = dataset._decoder(Dataset(decoder=decoder, threads=3), torch.device(device), training)
    if expected == "shared":
        assert read_batches.func is dali.read_batches and threads == 3 + read_batches.keywords["lanes"]
    else:
        assert read_batches is {"dali": dali, "pyav": pyav}[expected].read_batches and threads == 3


def test_nothing_readable_ends_the_run(videos):
    with pytest.raises(UserError, match="can't be read"):
        next(read(dali, videos, ["missing.webm", "empty.webm"]))


def test_probing_threads_end(videos):
    stream = read(dali, videos, ["vp9.webm"])
    next(stream)
    stream.close()
    del stream
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("flperf-data")]:
        thread.join(10)
        assert not thread.is_alive()


def test_probe_counts_the_frames(videos, decode_all):
    for name in ("vp9.webm", "vp8.webm", "mjpeg.avi", "vp9_short.webm"):
        assert dali.probe(str(videos / name), "cpu") == (len(decode_all(videos / name)), None)
