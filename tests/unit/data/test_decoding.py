"""Frame i is the i-th that decoding from start to end puts out, for every kind of file; what can't be decoded intact is
refused, and nothing else is."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from odd_videos import (
    add_stream,
    decoded,
    encode,
    fill,
    not_coded,
    overwritten,
    picture,
    remux,
    replaced,
    stored,
    uncoded_h264,
)

from flperf.data import read_frames
from flperf.data.unreadable import BadClip
from flperf.data.video_file import VideoFile


def windows(frames: int) -> list[list[int]]:
    """Windows from the first frame to the last, of several lengths and strides, and single frames."""
    found = [[index] for index in (0, frames // 3, frames - 1)]
    for length, stride in ((4, 1), (5, 2), (3, 5), (frames, 1)):
        last = frames - 1 - (length - 1) * stride
        found += [
            [start + stride * step for step in range(length)]
            for start in {0, last // 3, last // 2 + 1, last}
            if start >= 0
        ]
    return [window for window in found if window[-1] < frames]


def check(path: Path, expected: np.ndarray, refusable: set[int] = frozenset()) -> int:
    """Every window has the expected frames, or is refused and holds a refusable one; returns how many are refused."""
    refused = 0
    for window in windows(len(expected)):
        try:
            found = read_frames(str(path), window).numpy()
        except BadClip as error:
            assert refusable & set(window), f"{window}: {error}"
            refused += 1
            continue
        assert np.array_equal(found, expected[window]), window
    return refused


def frames_of(path: Path) -> int:
    with VideoFile(str(path)) as file:
        return len(file.timeline)


def counted(path: Path) -> bool:
    with VideoFile(str(path)) as file:
        return bool(file.timeline.counted)


FORMATS = [
    ("libx264", "mp4 mkv avi asf ts flv mov mpg h264"),
    ("libx265", "mp4 mkv ts hevc"),
    ("libvpx-vp9", "webm mp4 avi"),
    ("libvpx", "webm avi"),
    ("libsvtav1", "mp4 mkv"),
    ("mpeg4", "mp4 avi mkv ts"),
    ("mpeg2video", "ts mpg avi"),
    ("flv", "flv"),
    ("wmv2", "asf"),
    ("msmpeg4", "avi"),
    ("mjpeg", "avi mov"),
]


@pytest.mark.parametrize("codec, extension", [(codec, name) for codec, names in FORMATS for name in names.split()])
def test_windows_are_those_of_decoding_from_the_start(tmp_path, codec, extension):
    path = encode(tmp_path / f"video.{extension}", codec)
    expected = decoded(path)
    assert frames_of(path) == len(expected) == 48
    assert check(path, expected) == 0


@pytest.mark.parametrize("extension", ["mp4", "avi"])
@pytest.mark.parametrize("options", [
    {"bf": "0"},
    {"bf": "4", "g": "30"},
    {"x264-params": "b-pyramid=strict:bframes=5:keyint=20"},
    {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"},
    {"x264-params": "intra-refresh=1:keyint=10"},
    {"x264-params": "intra-refresh=1:bframes=2:keyint=14"},
    {"x264-params": "keyint=1"},
    {"x264-params": "slices=4:bframes=2"},
    {"flags": "+ilme+ildct", "x264-params": "tff=1:bframes=2"},
])  # fmt: skip
def test_every_structure_of_h264(tmp_path, options, extension):
    path = encode(tmp_path / f"video.{extension}", "libx264", options=options)
    assert check(path, decoded(path)) == 0


def test_sound_files_are_not_decoded_to_be_counted(tmp_path):
    """Key frames and presentation times are enough, also with B-frames."""
    for codec, extension in [("libx264", "mp4"), ("libx265", "mkv"), ("libx264", "ts"), ("libvpx-vp9", "webm")]:
        assert not counted(encode(tmp_path / f"video.{extension}", codec))


def test_presentation_times_that_are_repeated_or_contradict_the_decoder(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264")
    packets, expected = stored(path), decoded(path)
    first_two = sorted({packet.pts for packet in packets})[4:6]
    doubled = [replace(packet, pts=first_two[0]) if packet.pts == first_two[1] else packet for packet in packets]
    for name, changed in {
        "doubled.mkv": doubled,
        "of_decoding.mkv": [replace(packet, pts=packet.dts) for packet in packets],
        "shuffled.mkv": [
            replace(packet, pts=packets[index ^ 1].pts if index > 20 else packet.pts)
            for index, packet in enumerate(packets)
        ],
    }.items():
        other = remux(path, tmp_path / name, changed)
        assert check(other, expected) == 0, name


@pytest.mark.parametrize("codec, extension", [
    ("libx264", "ts"), ("libx264", "mkv"), ("libx264", "mp4"), ("libx265", "ts"), ("libx265", "mkv"),
    ("mpeg2video", "ts"), ("mpeg4", "avi"), ("libvpx-vp9", "webm"),
])  # fmt: skip
def test_a_recording_that_begins_between_key_frames(tmp_path, codec, extension):
    whole = encode(tmp_path / f"whole.{extension}", codec)
    path = remux(whole, tmp_path / f"part.{extension}", stored(whole)[5:])
    expected = decoded(path)
    assert counted(path) and frames_of(path) == len(expected)
    assert check(path, expected) == 0


@pytest.mark.parametrize("codec, extension", [
    ("libx264", "mp4"), ("libx264", "avi"), ("libx265", "mp4"), ("mpeg4", "mp4"), ("msmpeg4", "avi"),
    ("libvpx-vp9", "mp4"), ("libvpx-vp9", "webm"),
])  # fmt: skip
def test_packets_that_are_marked_as_key_frames_and_are_none(tmp_path, codec, extension):
    sound = encode(tmp_path / f"sound.{extension}", codec)
    packets = [replace(packet, is_keyframe=True) for packet in stored(sound)]
    path = remux(sound, tmp_path / f"marked.{extension}", packets)
    assert check(path, decoded(sound)) == 0


@pytest.mark.parametrize("extension", ["ts", "mkv"])
@pytest.mark.parametrize("kinds", ["F" * 12, "f" * 12, "FFfffFFFfFfF"])
def test_a_packet_may_be_half_a_frame(tmp_path, kinds, extension):
    path = uncoded_h264(tmp_path / f"fields.{extension}", kinds)
    expected = decoded(path)
    assert frames_of(path) == len(expected) == len(kinds)
    assert len(np.unique(expected.mean((1, 2, 3)))) == len(kinds)
    assert check(path, expected) == 0


@pytest.mark.parametrize("extension", ["avi", "mp4", "mkv"])
def test_pictures_that_are_not_coded_are_no_frames(tmp_path, extension):
    sound = encode(tmp_path / "sound.mp4", "mpeg4", options={"bf": "0"})
    packets, with_empty = stored(sound), []
    step = packets[1].dts - packets[0].dts
    for index, packet in enumerate(packets):
        for kept in [packet] + [replace(packet, content=not_coded(index % 25), is_keyframe=False)] * (index in (7, 20)):
            time = len(with_empty) * step
            with_empty.append(replace(kept, pts=time, dts=time))
    path = remux(sound, tmp_path / f"not_coded.{extension}", with_empty)
    expected = decoded(path)
    assert len(with_empty) == 50 and len(expected) == 48
    assert frames_of(path) == 48 and check(path, expected) == 0


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
@pytest.mark.parametrize("cut", [0, 5, 17])
def test_an_edit_list_cuts_off_the_beginning(tmp_path, codec, cut):
    whole = encode(tmp_path / "whole.mp4", codec)
    packets = stored(whole)
    offset = cut * (sorted(packet.pts for packet in packets)[1] - min(packet.pts for packet in packets))
    shifted = [replace(packet, pts=packet.pts - offset, dts=packet.dts - offset) for packet in packets]
    path = remux(whole, tmp_path / "cut.mp4", shifted, {"avoid_negative_ts": "disabled", "use_editlist": "1"})
    expected = decoded(whole)[cut:]
    assert np.array_equal(decoded(path), expected)
    assert frames_of(path) == len(expected) and check(path, expected) == 0


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_display_matrices_are_applied(tmp_path, codec, degrees, hflip):
    """The frames are turned counterclockwise, then mirrored."""
    path = encode(
        tmp_path / "turned.mp4", codec, 20, prepare=lambda stream: stream.set_display_rotation(degrees, hflip)
    )
    stored_frames = decoded(path)
    turned = np.rot90(stored_frames, degrees // 90, axes=(1, 2))
    expected = np.ascontiguousarray(turned[:, :, ::-1] if hflip else turned)
    assert check(path, expected) == 0
    if degrees or hflip:
        assert np.array_equal(read_frames(str(path), [3, 1], decoder="dali").numpy(), expected[[3, 1]])


def test_an_oblique_display_matrix_is_refused(tmp_path):
    path = encode(tmp_path / "oblique.mp4", "libx264", 8, prepare=lambda stream: stream.set_display_rotation(30))
    with pytest.raises(BadClip, match="no quarter turn"):
        read_frames(str(path), [0])


def test_the_stream_is_the_one_that_a_player_shows(tmp_path):
    """Neither a track of one picture, nor a cover, nor a smaller video that is not the default."""
    single, small = (128, 192), (32, 48)
    for name, streams in {
        "picture.mkv": [("mjpeg", 1, single, Disposition.default), ("libx264", 40, (64, 96), Disposition(0))],
        "cover.mp4": [("mjpeg", 1, single, Disposition.attached_pic), ("libx264", 40, (64, 96), Disposition(0))],
        "small.mkv": [("libx264", 40, small, Disposition(0)), ("libx264", 40, (64, 96), Disposition(0))],
        "small.ts": [("libx264", 40, small, Disposition(0)), ("libx264", 40, (64, 96), Disposition(0))],
        "default.mkv": [("libx264", 40, single, Disposition(0)), ("libx264", 40, (64, 96), Disposition.default)],
    }.items():
        with av.open(str(tmp_path / name), "w") as container:
            opened = [add_stream(container, codec, size=size) for codec, _, size, _ in streams]
            for stream, (_, _, _, disposition) in zip(opened, streams, strict=True):
                stream.disposition = disposition
            for seed, (stream, (_, frames, size, _)) in enumerate(zip(opened, streams, strict=True)):
                fill(container, stream, frames, size, seed)
        expected = decoded(tmp_path / name, stream=0 if name == "cover.mp4" else 1)
        assert len(expected) == 40 and check(tmp_path / name, expected) == 0, name


DAMAGES = {
    "zeros": lambda content: overwritten(content, len(content) // 2, len(content) // 2 + 16),
    "half": lambda content: content[: len(content) // 2],
    "missing": None,
}


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("hit", [16, 17, 33])
def test_damage_does_not_spread(tmp_path, codec, damage, hit):
    """Frames are exact or refused, and none is refused before the damage or from the next key frame on."""
    sound = encode(tmp_path / "sound.mp4", codec, options={"bf": "0", "x265-params": NO_B_FRAMES})
    packets, expected = stored(sound), decoded(sound)
    assert [index for index, packet in enumerate(packets) if packet.is_keyframe] == [0, 16, 32]
    change = DAMAGES[damage]
    changed = replaced(packets, hit, change(packets[hit].content)) if change else [*packets[:hit], *packets[hit + 1 :]]
    path = remux(sound, tmp_path / "damaged.mp4", changed)
    end = 32 if hit < 32 else 48
    if change is None:  # what is missing is no frame
        expected, end = np.delete(expected, hit, axis=0), end - 1
    refused = check(path, expected, set(range(hit, end)))
    assert refused or change is None and hit == 16  # without the key frame there is no frame to the next one
    for index in range(hit, end):
        if change is not None or hit != 16:
            with pytest.raises(BadClip):
                read_frames(str(path), [index])


NO_B_FRAMES = "log-level=error:keyint=16:min-keyint=16:bframes=0:scenecut=0:pools=1:frame-threads=1"


def test_damage_of_a_frame_that_no_other_refers_to_is_its_own(tmp_path):
    sound = encode(tmp_path / "sound.mp4", "libx264", options={"x264-params": "b-pyramid=0:bframes=2:b-adapt=0"})
    packets, expected = stored(sound), decoded(sound)
    order = sorted(range(len(packets)), key=lambda index: packets[index].pts)
    hit = 5  # a B-frame: the one before it is shown after it
    assert packets[hit - 1].pts > packets[hit].pts
    changed = replaced(packets, hit, overwritten(packets[hit].content, 10, 20))
    path = remux(sound, tmp_path / "damaged.mp4", changed)
    assert check(path, expected, {order.index(hit)}) > 0


@pytest.mark.parametrize("codec, extension", [
    ("libx264", "mp4"), ("libx264", "mkv"), ("libx264", "ts"), ("libx264", "flv"), ("libvpx-vp9", "webm"),
    ("libx265", "mp4"), ("mpeg4", "avi"), ("mjpeg", "avi"),
])  # fmt: skip
def test_a_file_that_is_cut_short(tmp_path, codec, extension):
    """All frames that are there are read, but for the torn one."""
    whole = encode(tmp_path / f"whole.{extension}", codec)
    path = remux(whole, tmp_path / f"cut.{extension}", stored(whole), {"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    frames = frames_of(path)
    assert 4 < frames < 48
    expected = decoded(path)
    assert frames == len(expected)
    check(path, expected, {frames - 1, frames - 2})
    with VideoFile(str(path)) as file:
        assert file.is_cut_short or extension == "ts"  # whose header promises nothing
    with VideoFile(str(whole)) as file:
        assert not file.is_cut_short


def test_indices_may_come_in_any_order_and_repeat(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264")
    wanted = [30, 2, 2, 47, 0, 30]
    assert np.array_equal(read_frames(str(path), wanted).numpy(), decoded(path)[wanted])


def test_mistakes_are_named(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264", 8)
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"frames 0 to 7, and no frame {index}"):
            read_frames(str(path), [0, index])
    with pytest.raises(ValueError, match="'nvdec' is neither"):
        read_frames(str(path), [0], decoder="nvdec")
    with pytest.raises(BadClip, match="No such file"):
        read_frames(str(tmp_path / "none.mp4"), [0])


def test_a_file_that_changes_is_counted_again(tmp_path):
    path = encode(tmp_path / "video.avi", "libx264", 20)
    assert frames_of(path) == 20
    encode(path, "libx264", 33)
    assert frames_of(path) == 33 and check(path, decoded(path)) == 0


def test_pictures_tell_frames_apart():
    """Or the tests above would show nothing."""
    frames = np.stack([picture(index) for index in range(48)]).astype(int)
    assert min(np.abs(a - b).mean() for index, a in enumerate(frames) for b in frames[:index]) > 4


def test_a_recording_that_changes_its_size_keeps_that_of_its_first_frame(tmp_path):
    """Two recordings in one transport stream, as FFmpeg reads them: later frames are resized."""
    parts = [encode(tmp_path / f"{size}.ts", "libx264", 20, size=(size, size)) for size in (64, 96)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = read_frames(str(path), [3, 19, 20, 37]).numpy()
    assert frames_of(path) == 40 and found.shape == (4, 64, 64, 3)
    assert np.array_equal(found[:2], decoded(parts[0])[[3, 19]])
    smaller = torch.nn.functional.interpolate(
        torch.from_numpy(decoded(parts[1])[[0, 17]]).permute(0, 3, 1, 2).float(), (64, 64), mode="area"
    )
    assert np.abs(found[2:] - smaller.permute(0, 2, 3, 1).numpy()).mean() < 10


@pytest.mark.parametrize("degrees", [90, 180])
def test_an_orientation_in_the_stream_is_applied(tmp_path, degrees):
    """A message of H.264, not of the container."""
    bare = encode(tmp_path / "bare.mkv", "libx264", 20)
    with av.open(str(bare)) as source, av.open(str(tmp_path / "turned.mkv"), "w") as target:
        video = source.streams.video[0]
        stream = target.add_stream_from_template(video)
        turn = BitStreamFilterContext(f"h264_metadata=display_orientation=insert:rotate={degrees}", video)
        for packet in source.demux(video):
            for turned in turn.filter(packet if packet.size else None):
                turned.stream = stream
                target.mux_one(turned)
    expected = np.ascontiguousarray(np.rot90(decoded(bare), degrees // 90, axes=(1, 2)))
    assert check(tmp_path / "turned.mkv", expected) == 0
