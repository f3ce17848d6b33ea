"""Prepared files: the same frames at the same times, in the same colours, in a form that all decoders take."""

from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import odd_videos
import pytest
import torch

from flperf.config import Backbone
from flperf.data import read_frames
from flperf.data.clip_writer import Plan, time_grid, write_clip
from flperf.data.dali_support import find_obstacle
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import PyAVReader, opened
from flperf.data.samplers import ClipRequest, FrameSampling
from flperf.data.unreadable import BadClip

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 64}))
ODD_CROP = Preprocessing.of(Backbone(architecture={"crop_size": 50}))
PLAN = Plan(PREPROCESSING)
SOURCES = (
    *("h264.mp4", "portrait.mp4", "short.mp4", "hevc.mp4", "mpeg4.avi", "vp9.webm", "vp8.webm", "mjpeg.avi"),
    *("h264.ts", "variable.mkv"),
)
WINDOWS = [
    *(FrameSampling(5, stride, "random") for stride in (1, 3)),
    *(FrameSampling(6, 1, start, fps) for start in ("random", "center") for fps in (3.0, 10.0, 12.5, 25.0, 30.0)),
]


def prepare(source, target, plan=PLAN):
    with opened(str(source)) as file:
        return write_clip(file, target, plan)


def clip(path, preprocessing, window=WINDOWS[0], uniform=0.4):
    reader = PyAVReader([str(path)], window, preprocessing)
    out = torch.empty(reader.shape, dtype=torch.uint8)
    reader.read(ClipRequest(0, 0, 0, uniform, valid=True), out)
    return out


def distance(one, other) -> float:
    """Mean difference in luma: half the resolution of the colours is lost, and these textures are full of colour."""
    luma = torch.tensor([0.299, 0.587, 0.114])
    return float((one.float() @ luma - other.float() @ luma).abs().mean())


def bias(one, other) -> float:
    """Largest difference of the channels' means."""
    return float((one.float() - other.float()).mean((0, 1, 2)).abs().max())


@pytest.mark.parametrize("name", SOURCES)
def test_training_chooses_the_same_frames(videos, tmp_path, name):
    prepare(videos / name, tmp_path / "prepared.mp4")
    with opened(str(videos / name)) as file, opened(str(tmp_path / "prepared.mp4")) as prepared:
        assert np.allclose(prepared.timeline.times, file.timeline.times, rtol=0, atol=1e-12)
        assert not prepared.timeline.counted
        for window in WINDOWS:
            for uniform in (0.0, 0.3, 0.77, 0.999):
                chosen = (window.frames(each.timeline.times, uniform) for each in (prepared, file))
                assert next(chosen) == next(chosen), (window, uniform)


@pytest.mark.parametrize("name", SOURCES)
def test_pixels_are_those_that_the_encoder_would_see(videos, tmp_path, name):
    prepare(videos / name, tmp_path / "prepared.mp4")
    expected, found = (clip(path, PREPROCESSING) for path in (videos / name, tmp_path / "prepared.mp4"))
    assert distance(found, expected) < 4 and bias(found, expected) < 1
    if name != "short.mp4":
        assert distance(found, clip(videos / name, PREPROCESSING, uniform=0.9)) > 20


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24), Fraction(600)])
@pytest.mark.parametrize("extension", ["mp4", "mkv", "avi", "flv"])
def test_times_of_containers_with_other_units(tmp_path, rate, extension):
    source = tmp_path / f"source.{extension}"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("mpeg4" if extension == "avi" else "libx264", rate=rate)
        stream.height, stream.width = odd_videos.SIZE
        odd_videos.fill(container, stream, 12)
    prepare(source, tmp_path / "prepared.mp4")
    with opened(str(source)) as file, opened(str(tmp_path / "prepared.mp4")) as prepared:
        assert np.abs(prepared.timeline.times - file.timeline.times).max() < 1e-12


def test_frames_without_times_are_spaced_as_the_reader_spaces_them(tmp_path):
    encoded = odd_videos.encode(tmp_path / "source.mp4", "libx264", 12, {"bf": "0"})
    raw = tmp_path / "raw.h264"
    raw.write_bytes(b"".join(_annex_b(encoded)))
    with opened(str(raw)) as file:
        unit, counts = time_grid(file)
        assert np.allclose(np.array(counts) * float(unit), file.timeline.times, rtol=0, atol=1e-12)
    prepare(raw, tmp_path / "prepared.mp4")
    with opened(str(raw)) as file, opened(str(tmp_path / "prepared.mp4")) as prepared:
        assert np.allclose(prepared.timeline.times, file.timeline.times, rtol=0, atol=1e-12)


def _annex_b(path):
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        units = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", video)
        for packet in container.demux(video):
            yield from (bytes(found) for found in units.filter(packet if packet.size else None))


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, ODD_CROP])
@pytest.mark.parametrize("short_side", [None, 80])
def test_nvdec_can_keep_its_decoder(videos, tmp_path, preprocessing, short_side):
    """Whole blocks without cropping, and nothing for which DALI would leave the file to PyAV."""
    for name in ("h264.mp4", "variable.mkv"):
        prepare(videos / name, tmp_path / "prepared.mp4", Plan(preprocessing, short_side))
        with opened(str(tmp_path / "prepared.mp4")) as file:
            assert not any(length % 16 for length in file.size)
            assert find_obstacle(file, "cuda", reusing=True) is None
            assert find_obstacle(file, "cpu") == "DALI doesn't decode h264 on a CPU"
            entries = np.flatnonzero(file.timeline.is_entry)
            assert np.diff([*entries, len(file.timeline)]).max() <= 16 and entries[0] == 0


def test_sound_is_left_out(tmp_path):
    source = tmp_path / "source.mp4"
    with av.open(str(source), "w") as container:
        stream = odd_videos.add_stream(container, "libx264")
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 16_000, 0
        container.mux(sound.encode(samples))
        odd_videos.fill(container, stream, 10)
    prepare(source, tmp_path / "prepared.mp4")
    with av.open(str(tmp_path / "prepared.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_pixels_are_turned_and_the_mark_is_gone(tmp_path, degrees, hflip):
    source = odd_videos.encode(
        tmp_path / "turned.mp4", "libx264", 9, prepare=lambda stream: stream.set_display_rotation(degrees, hflip)
    )
    prepare(source, tmp_path / "prepared.mp4")
    assert distance(clip(source, PREPROCESSING), clip(tmp_path / "prepared.mp4", PREPROCESSING)) < 4
    with opened(str(tmp_path / "prepared.mp4")) as file:
        assert file.first_frame().rotation == 0


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, ODD_CROP])
def test_prepared_frames_are_taken_as_they_are(videos, tmp_path, preprocessing):
    prepare(videos / "h264.mp4", tmp_path / "prepared.mp4", Plan(preprocessing))
    stored = read_frames(tmp_path / "prepared.mp4", WINDOWS[0].frames(np.arange(70) / 25, 0.4))
    height, width = preprocessing.size
    assert torch.equal(clip(tmp_path / "prepared.mp4", preprocessing), stored[:, :height, :width])


@pytest.mark.parametrize("name", ["h264.mp4", "portrait.mp4"])
def test_a_short_side_is_cropped_again(videos, tmp_path, name):
    """Also by a backbone without a crop. Files that are smaller keep their size."""
    whole = replace(PREPROCESSING, resize=(48, 48), crop=None)
    for short_side, shrinks in ((80, name == "h264.mp4"), (200, False)):
        prepared = prepare(videos / name, tmp_path / "prepared.mp4", Plan(PREPROCESSING, short_side))
        assert prepared.shrunk == (min(prepared.shown) == 80) and (prepared.shrunk or not shrinks)
        for preprocessing in (PREPROCESSING, whole):
            expected, found = (clip(path, preprocessing) for path in (videos / name, tmp_path / "prepared.mp4"))
            assert distance(found, expected) < 4


@pytest.mark.parametrize("matrix", [1, 6, None])
def test_colours_keep_their_values_and_places(tmp_path, matrix):
    """A file in BT.709, in BT.601, and one that doesn't say."""
    source, size = tmp_path / "source.mp4", (96, 96)
    picture = np.full((*size, 3), 90, np.uint8)
    for number, colour in enumerate([(220, 40, 40), (40, 200, 60), (50, 60, 210), (230, 220, 50), (120, 120, 120)]):
        picture[8 + 16 * number : 20 + 16 * number, 10 + 14 * number : 30 + 14 * number] = colour
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = size
        if matrix:
            stream.codec_context.colorspace = matrix
            stream.codec_context.color_range = 1
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix or 5, dst_color_range=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    window, plain = FrameSampling(2, 1, "first"), replace(PREPROCESSING, resize=size, crop=None)
    assert distance(clip(source, plain, window), torch.from_numpy(picture)) < 3
    prepare(source, tmp_path / "prepared.mp4", Plan(plain))
    expected, found = (clip(path, plain, window).float() for path in (source, tmp_path / "prepared.mp4"))
    assert bias(found, expected) < 1
    differences = {
        (down, right): distance(found.roll((down, right), (1, 2)), expected)
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    assert min(differences, key=differences.get) == (0, 0)
    red = (expected - found)[..., 0] - (expected - found)[..., 1]
    assert red.abs().mean() < 2.5


def test_a_file_that_is_not_intact_is_refused(videos, tmp_path):
    for name in ("damaged.webm", "text.mp4", "empty.webm", "no_frames.mp4", "audio.mp4", "nowhere.mp4"):
        with pytest.raises(BadClip):
            prepare(videos / name, tmp_path / "prepared.mp4")
    packets = odd_videos.stored(videos / "h264.mp4")
    broken = odd_videos.overwritten(packets[30].content, 20, len(packets[30].content))
    odd_videos.remux(videos / "h264.mp4", tmp_path / "holed.mp4", odd_videos.replaced(packets, 30, broken))
    with pytest.raises(BadClip):
        prepare(tmp_path / "holed.mp4", tmp_path / "prepared.mp4")
