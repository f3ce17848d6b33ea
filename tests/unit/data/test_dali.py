"""DALI agrees with PyAV on either device and replaces the same clips; without a GPU its pipeline can be serialised.

DALI converts from YUV in its own way. On these files, smooth textures, its frames differ from PyAV's by 1.3 to 1.7
levels on average, and by up to 18 at single pixels.
"""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from odd_videos import encode, joined, overwritten, remux, replaced, stored

from flperf.config import Backbone
from flperf.data import dali, pyav, read_frames
from flperf.data.dali_support import find_obstacle
from flperf.data.loader import Slot, load_batches
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, ClipRequest, FrameSampling, TrainingSampler, ValidationSampler
from flperf.data.unreadable import BadClip
from flperf.data.video_file import VideoFile
from flperf.data.videos import NVDEC_LANES, open_reader
from flperf.data.worker_messages import Reading
from flperf.data.workers import WorkerReader

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 48}))
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [CPU, pytest.param(GPU, marks=pytest.mark.gpu)]
MEAN_LEVELS, MAX_LEVELS = 2.0, 24


def load(reader, sampler=None, requests=None, batch_size=4):
    sampler = sampler or TrainingSampler(len(reader.paths), 0)
    requests = requests or sampler.batches(0, BatchShare(0, 1, batch_size, batch_size))
    return load_batches(reader, requests, sampler, list(range(len(reader.paths))), 2, 2, reader.device)


def with_dali(folder, names, device=CPU, frame_sampling=None, lanes=None, **how):
    paths, frame_sampling = [str(folder / name) for name in names], frame_sampling or FrameSampling(6, 3, "random")
    return load(dali.DaliReader(paths, Reading(frame_sampling, PREPROCESSING), device, lanes), **how)


def with_pyav(folder, names, frame_sampling=None, **how):
    paths, frame_sampling = [str(folder / name) for name in names], frame_sampling or FrameSampling(6, 3, "random")
    return load(pyav.PyAVReader(paths, frame_sampling, PREPROCESSING), **how)


def pairs(folder, names, device, **how):
    """The streams of DALI on a device and of PyAV."""
    return with_dali(folder, names, device, **how), with_pyav(folder, names, **how)


def levels(a, b):
    """Absolute differences between DALI's frames and PyAV's."""
    assert a.video.shape == b.video.shape and a.video.dtype == torch.uint8
    return (a.video.cpu().float() - b.video.float()).abs()


def readers(path, device, frame_sampling=None):
    """Those of DALI and of PyAV."""
    frame_sampling = frame_sampling or FrameSampling(6, 3, "random")
    with_dali = dali.DaliReader([path], Reading(frame_sampling, PREPROCESSING), device)
    return with_dali, pyav.PyAVReader([path], frame_sampling, PREPROCESSING)


def read(reader, request):
    """The frames of a clip on the CPU; None if it can't be used."""
    size = torch.Size(reader.shape).numel()
    memory = reader.memory.take(size)[0] if reader.memory else torch.zeros(size, dtype=torch.uint8)
    slot = Slot(memory.view(reader.shape))
    try:
        reader.fill(request, slot)
    except BadClip:
        return None
    finally:
        reader.close()
    return slot.host.clone() if slot.on_device is None else slot.on_device.cpu()


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


@pytest.mark.parametrize("backend", ["mixed", "cpu"])
def test_the_pipeline_can_be_serialised_without_a_gpu(backend):
    pipeline = dali.build_pipeline(lambda: None, backend, 0)
    assert b"decoders__Video" in pipeline.serialize()


SMALL_FILES = ["vp9.webm", "vp8.webm", "mjpeg.avi", "vp9_short.webm"]
OF_NVDEC = ["h264.mp4", "hevc_large.mp4", "vp9_large.webm", "vp8.webm", "variable.mkv"]


@pytest.mark.parametrize(
    "device, name",
    [*((CPU, name) for name in SMALL_FILES), *(pytest.param(GPU, name, marks=pytest.mark.gpu) for name in OF_NVDEC)],
)
@pytest.mark.parametrize(("stride", "fps"), [(1, None), (4, None), (1, 10.0), (1, 40.0)])
def test_agrees_with_pyav(videos, device, name, stride, fps):
    ours, reference = (
        take(stream, 2)
        for stream in pairs(
            videos, [name], device, frame_sampling=FrameSampling(10, stride, "random", fps), batch_size=2
        )
    )
    for a, b in zip(ours, reference, strict=True):
        assert a.video.device == device and a.short == b.short
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
    frame_sampling = FrameSampling(12, 3, "first")  # the whole of damaged.webm is needed
    ours, reference = (take(stream, 6) for stream in pairs(videos, names, device, frame_sampling=frame_sampling))
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.sample, b.sample) and torch.equal(a.label, a.clip)
        assert sorted(path for path, _ in a.skipped) == sorted(path for path, _ in b.skipped)
        assert levels(a, b).mean() <= MEAN_LEVELS


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
    files, sampler = [f"{name}.webm" for name in names], ValidationSampler(14)
    requests, frame_sampling = list(sampler.batches(BatchShare(0, 1, 2, 2), 2)), FrameSampling(12, 3, "first")
    streams = pairs(videos, files, device, frame_sampling=frame_sampling, sampler=sampler, requests=requests)
    ours, reference = map(list, streams)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.valid, b.valid) and a.video.shape == b.video.shape
        assert [path for path, _ in a.skipped] == [path for path, _ in b.skipped]
        assert levels(a, b).mean() <= MEAN_LEVELS
    valid = torch.cat([batch.valid for batch in ours]).tolist()
    assert valid == [name not in ("missing", "damaged") for name in names]


def test_a_file_that_vanishes_is_replaced(videos, tmp_path):
    for name in ("a.webm", "b.webm"):
        (tmp_path / name).write_bytes((videos / "vp9.webm").read_bytes())
    stream = with_dali(tmp_path, ["a.webm", "b.webm"])
    next(stream)
    (tmp_path / "a.webm").unlink()
    later = take(stream, 6)[-1]
    assert later.clip.tolist() == [1, 1, 1, 1] and later.valid.all()
    assert {path for path, _ in later.skipped} == {str(tmp_path / "a.webm")}


@pytest.mark.parametrize("device", DEVICES)
def test_batches_stay_as_they_were(videos, device):
    """DALI's own memory is written again; a batch is not."""
    stream = with_dali(videos, ["vp9.webm", "vp8.webm", "mjpeg.avi"], device)
    kept = [next(stream).video for _ in range(2)]
    copies = [video.clone() for video in kept]
    for _ in range(5):
        next(stream)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.gpu
def test_a_batch_may_be_dropped_before_the_gpu_has_read_it(videos):
    """A training step queues work on a batch and drops it long before that work begins."""
    names = ["h264.mp4", "hevc_large.mp4", "vp9_large.webm"]

    def sums(busy: int) -> list[int]:
        stream, found = with_dali(videos, names, GPU), []
        for _ in range(12):
            torch.cuda._sleep(busy)
            found.append(next(stream).video.sum(dtype=torch.int64))
        stream.close()
        return torch.stack(found).tolist()

    assert sums(busy=100_000_000) == sums(busy=0)  # cycles: some 50 ms a batch


def all_files(videos) -> list[str]:
    return sorted(str(path) for path in videos.iterdir() if path.is_file())


@pytest.mark.parametrize("device", DEVICES)
def test_frames_and_refusals_are_those_of_pyav_for_every_file(videos, device):
    """Sound and damaged files of all codecs, several windows of each."""
    for path in all_files(videos):
        for uniform in (0.0, 0.6, 0.99):
            request = ClipRequest(0, 0, 0, uniform, valid=True)
            found = [read(reader, request) for reader in readers(path, device)]
            assert (found[0] is None) == (found[1] is None), (path, uniform)
            if found[0] is not None:
                assert (found[0].float() - found[1].float()).abs().mean() <= MEAN_LEVELS, (path, uniform)


@pytest.mark.parametrize("codec, extension", [("libvpx-vp9", "avi"), ("libvpx-vp9", "webm"), ("mjpeg", "avi")])
def test_a_header_that_promises_too_much_changes_no_frame(tmp_path, codec, extension):
    """DALI would return black frames, or those of the clip before."""
    whole = encode(tmp_path / f"whole.{extension}", codec)
    (tmp_path / f"cut.{extension}").write_bytes(whole.read_bytes()[: whole.stat().st_size * 7 // 10])
    with VideoFile(str(tmp_path / f"cut.{extension}")) as file:
        assert "header" in find_obstacle(file, "cpu") or file.timeline.counted
        last = len(file.timeline) - 3
    for path, index in ((whole, 47), (tmp_path / f"cut.{extension}", last)):
        frames = [read_frames(str(path), list(range(index + 1)), decoder=name).float() for name in ("dali", "pyav")]
        distances = (frames[0][index] - frames[1]).abs().mean((1, 2, 3))
        assert distances.argmin() == index and distances[index] < 10


ODD_CODECS = {"libvpx-vp9": "webm", "libvpx": "webm", "mjpeg": "avi"}
ODD_CODECS_OF_NVDEC = {"libx264": "mp4", "libx265": "mkv", "libsvtav1": "mp4", "libvpx-vp9": "mp4", "mpeg4": "avi"}


@pytest.mark.parametrize(
    "codec, extension",
    [*ODD_CODECS.items(), *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in ODD_CODECS_OF_NVDEC.items())],
)
def test_odd_files_have_the_same_frames_for_both(tmp_path, codec, extension):
    """Whole, begun between key frames, with every packet marked as a key frame, and cut short."""
    whole = encode(tmp_path / f"whole.{extension}", codec, 36, size=(144, 176))
    packets = stored(whole)
    files = [whole, remux(whole, tmp_path / f"part.{extension}", packets[5:])]
    files.append(remux(whole, tmp_path / f"marked.{extension}", [replace(kept, is_keyframe=True) for kept in packets]))
    files.append(tmp_path / f"cut.{extension}")
    files[-1].write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    for path in files:
        with VideoFile(str(path)) as file:
            frames = len(file.timeline)
        expected = read_frames(str(path), range(frames - 2)).float()
        for window in ([0], [frames // 2, frames // 2 + 1], [frames - 5, frames - 3], list(range(frames - 2))):
            for index, frame in zip(window, read_frames(str(path), window, decoder="dali").float(), strict=True):
                distances = (frame - expected).abs().mean((1, 2, 3))
                assert distances.argmin() == index and distances[index] < 10, (path, window)


@pytest.mark.parametrize("colour_space", [1, 5, 6, 9], ids=["BT.709", "BT.470", "BT.601", "BT.2020"])
@pytest.mark.parametrize("colour_range", [1, 2], ids=["limited", "full"])
def test_colours_are_those_of_the_file(tmp_path, colour_space, colour_range):
    def tag(stream):
        stream.codec_context.colorspace, stream.codec_context.color_range = colour_space, colour_range

    path = encode(tmp_path / "tagged.webm", "libvpx-vp9", 12, prepare=tag)
    with VideoFile(str(path)) as file:
        assert find_obstacle(file, "cpu") is None and file.context.colorspace == colour_space
    request = ClipRequest(0, 0, 0, 0.0, valid=True)
    slots = [read(reader, request) for reader in readers(str(path), CPU, FrameSampling(6, 1, "first"))]
    assert not torch.equal(*slots)
    ours, reference = (read_frames(str(path), range(6), decoder=name) for name in ("dali", "pyav"))
    for a, b in ((ours, reference), slots):  # DALI interpolates colours between pixels in its own way
        difference = torch.nn.functional.avg_pool2d((a.float() - b.float()).permute(0, 3, 1, 2), 8)
        assert difference.abs().mean() <= MEAN_LEVELS


def test_frames_of_several_sizes_are_left_to_pyav(tmp_path):
    parts = [encode(tmp_path / f"{size[0]}.webm", "libvpx-vp9", 8, size=size) for size in ((64, 96), (96, 64))]
    path = str(joined(tmp_path / "joined.webm", parts))
    with VideoFile(path) as file:
        assert "sizes" in find_obstacle(file, "cpu")
    assert torch.equal(read_frames(path, range(16), decoder="dali"), read_frames(path, range(16)))


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_damage_is_refused_as_pyav_refuses_it(tmp_path, codec):
    sound = encode(tmp_path / "sound.webm", codec, 32, options={"b": "4M"})
    packets = stored(sound)
    damaged = replaced(packets, 5, overwritten(packets[5].content, 60, 160))
    path = str(remux(sound, tmp_path / "damaged.webm", damaged))
    for window in ([5], [7], range(0, 10, 3)):
        with pytest.raises(BadClip):
            read_frames(path, window, decoder="dali")
    assert torch.equal(read_frames(path, [0, 4, 20], decoder="dali"), read_frames(path, [0, 4, 20]))


def test_what_dali_fails_on_is_read_by_pyav(videos, monkeypatch, caplog):
    """The same clips, and none is replaced; the reason is logged once."""

    def fail(*_):
        raise dali.DaliError("DALI: no memory")

    monkeypatch.setattr(dali.ClipPipeline, "decode", fail)
    names = ["vp9.webm", "vp8.webm", "mjpeg.avi"]
    ours, reference = take(with_dali(videos, names), 4), take(with_pyav(videos, names), 4)
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.video, b.video) and torch.equal(a.clip, b.clip) and not a.skipped
    assert sum("DALI: no memory; PyAV" in line for line in caplog.messages) == 1


OF_PYAV = {CPU: ["h264.mp4", "hevc.mp4", "mpeg4.avi"], GPU: ["hevc.mp4", "mpeg4.avi", "mjpeg.avi", "vp9.webm"]}


@pytest.mark.parametrize("device", DEVICES)
def test_what_dali_cannot_decode_is_decoded_by_pyav(videos, device, caplog):
    """Among clips that DALI decodes, in whole batches, and after a file at which DALI failed."""
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
    """One thread has a pipeline, two have none. Each takes the next clip when it is free, and the order stays."""
    names = {CPU: ["vp9.webm", "vp8.webm", "mjpeg.avi"], GPU: ["h264.mp4", "vp8.webm"]}[device]
    ours, reference = take(with_dali(videos, names, device, lanes=1), 12), take(with_pyav(videos, names), 12)
    by_pyav = []
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.clip, b.clip) and torch.equal(a.sample, b.sample) and a.video.device == device
        assert levels(a, b).mean() <= MEAN_LEVELS
        by_pyav += levels(a, b).flatten(1).amax(1).eq(0).tolist()
    assert 0 < sum(by_pyav) < len(by_pyav)


def test_a_lane_that_is_slower_than_a_core_is_closed(videos, monkeypatch, caplog):
    """The clips are then PyAV's, and none is lost or replaced."""
    monkeypatch.setattr(dali.Lane, "is_slower_than", lambda lane, core: bool(core and lane.seconds))
    names = ["vp9.webm", "vp8.webm", "mjpeg.avi"]
    batches, reference = with_dali(videos, names, lanes=1), with_pyav(videos, names)
    differing = left = 0
    while left < 8:  # batches after the lane was closed; it opens late
        a, b = next(batches), next(reference)
        assert torch.equal(a.clip, b.clip) and not a.skipped and levels(a, b).mean() <= MEAN_LEVELS
        differing += int(levels(a, b).flatten(1).amax(1).gt(0).sum())
        left += "an NVDEC lane is closed" in caplog.text
    batches.close()
    assert differing >= 2 and caplog.text.count("an NVDEC lane is closed") == 1


def test_a_lane_is_judged_by_medians_of_enough_clips():
    lane = dali.Lane(CPU)
    lane.seconds.extend([0.1] * (dali.JUDGED_CLIPS - 1))
    assert not lane.is_slower_than([0.01] * dali.JUDGED_CLIPS)
    lane.seconds.append(9.0)
    assert lane.is_slower_than([0.09] * dali.JUDGED_CLIPS) and not lane.is_slower_than([0.11] * dali.JUDGED_CLIPS)
    assert not lane.is_slower_than([0.01] * (dali.JUDGED_CLIPS - 1))


@pytest.mark.parametrize("size, refused", [((48, 64), False), ((48, 66), True), ((50, 64), True)])
def test_nvdec_shares_only_files_for_which_it_needs_no_new_decoder(tmp_path, size, refused):
    path = encode(tmp_path / "some.mp4", "libx264", 8, size=size)
    with VideoFile(str(path)) as file:
        assert find_obstacle(file, "cuda") is None
        assert ("multiples of 16" in (find_obstacle(file, "cuda", reusing=True) or "")) == refused


@pytest.mark.parametrize("decoder, device, training, expected", [
    ("auto", "cuda", True, "shared"),
    ("auto", "cuda", False, "pyav"),
    ("auto", "cpu", True, "pyav"),
    ("pyav", "cuda", True, "pyav"),
    ("dali", "cuda", False, "dali"),
    ("dali", "cpu", True, "dali"),
])  # fmt: skip
def test_who_decodes(monkeypatch, decoder, device, training, expected):
    """Which decoder reads a clip depends on timing in training alone."""
    reading = Reading(FrameSampling(6, 3, "random"), PREPROCESSING)
    monkeypatch.setattr("flperf.data.workers.SharedMemory", lambda pinned: None)  # pinned memory needs a GPU
    reader = open_reader(decoder, [], reading, torch.device(device), training, 10)
    assert type(reader) is (WorkerReader if expected == "pyav" else dali.DaliReader)
    if expected != "pyav":
        assert reader.competing == (expected == "shared")
        assert len(list(islice(reader.lanes_left, 10))) == (NVDEC_LANES if expected == "shared" else 10)
