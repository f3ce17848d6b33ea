"""Frame i is the i-th that decoding from start to end puts out, for every kind of file; what can't be decoded intact is
refused, and nothing else is."""

import os
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from odd_videos import (
    Stored,
    add_stream,
    decoded,
    encode,
    fill,
    joined,
    not_coded,
    orientation_message,
    overwritten,
    picture,
    remux,
    replaced,
    stored,
    uncoded_h264,
    with_edits,
    with_message,
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


@pytest.mark.parametrize(("codec", "extension", "pixels"), [
    ("ffv1", "mkv", "yuv420p"), ("cinepak", "avi", "rgb24"), ("zmbv", "avi", "bgr0"), ("snow", "avi", "yuv420p"),
])  # fmt: skip
def test_windows_of_rare_codecs_begin_at_key_frames(tmp_path, codec, extension, pixels):
    """Each frame but key frames builds on the one before."""
    path = tmp_path / f"video.{extension}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", "strict": "-2"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, pixels
        for index in range(48):
            if index % 9 == 0:
                image = picture(index)
            image[8:24, index : index + 6] = 5 * index  # the rest stays
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixels)))
        container.mux(stream.encode(None))
    with VideoFile(str(path)) as file:
        assert file.timeline.is_entry[1:].any()
    assert check(path, decoded(path)) == 0


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


INTERLACED = {"flags": "+ilme+ildct", "x264-params": "tff=1:bframes=2"}


@pytest.mark.parametrize(("codec", "extension", "frames", "options"), [
    ("libx264", "mp4", 48, {}), ("libx265", "mkv", 48, {}), ("libx264", "ts", 48, {}), ("libvpx-vp9", "webm", 48, {}),
    ("libsvtav1", "mp4", 48, {}), ("libx264", "mp4", 1, {}), ("libx265", "mp4", 2, {}),
    ("libx264", "ts", 48, INTERLACED),
])  # fmt: skip
def test_sound_files_are_not_decoded_to_be_counted(tmp_path, codec, extension, frames, options):
    """Key frames and presentation times are enough, also with B-frames."""
    assert not counted(encode(tmp_path / f"video.{extension}", codec, frames, options))


def test_presentation_times_that_are_repeated_or_contradict_the_decoder(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264")
    packets, expected = stored(path), decoded(path)
    first_two = sorted({packet.pts for packet in packets})[4:6]
    doubled = [replace(packet, pts=first_two[0]) if packet.pts == first_two[1] else packet for packet in packets]
    for name, changed in {
        "doubled.mkv": doubled,
        "of_decoding.mkv": [replace(packet, pts=packet.dts) for packet in packets],
        "shuffled.mkv": exchanged(packets, range(21, 47, 2)),
    }.items():
        other = remux(path, tmp_path / name, changed)
        assert check(other, expected) == 0, name


def exchanged(packets: list[Stored], indices: Iterable[int]) -> list[Stored]:
    """Packets of which some have changed their presentation times with the next."""
    found = list(packets)
    for index in indices:
        found[index] = replace(packets[index], pts=packets[index + 1].pts)
        found[index + 1] = replace(packets[index + 1], pts=packets[index].pts)
    return found


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_one_wrong_presentation_time_is_enough(tmp_path, codec):
    """Each window is the first that is read of a file; none of them sees more than its own frames."""
    path = encode(tmp_path / "video.mp4", codec)
    expected = decoded(path)
    for index in range(20, 30):
        try:
            other = remux(path, tmp_path / f"{index}.mkv", exchanged(stored(path), [index]))
        except av.error.ArgumentError:  # a time of presentation before that of decoding
            continue
        for wanted in range(16, 34):
            assert np.array_equal(read_frames(str(other), [wanted])[0].numpy(), expected[wanted]), (index, wanted)


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


@pytest.mark.parametrize(("codec", "options"), [
    ("libx264", {}),
    ("libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"}),
    ("libx265", {"x265-params": "log-level=error:pools=1:open-gop=1:bframes=3:keyint=12:min-keyint=12"}),
    ("libvpx-vp9", {}),
])  # fmt: skip
@pytest.mark.parametrize(
    "edits", [[(30, 18)], [(0, 20)], [(10, 20), (10, 20)], [(5, 7), (12, 9), (30, 11)], [(24, 24), (0, 24)]]
)
def test_edit_lists_show_parts_in_any_order(tmp_path, codec, options, edits):
    whole = encode(tmp_path / "whole.mp4", codec, options=options)
    path = with_edits(whole, tmp_path / "edited.mp4", edits)
    expected = decoded(path)
    assert frames_of(path) == len(expected) and check(path, expected) == 0


def test_a_part_cut_from_a_file_is_not_decoded_to_be_counted(tmp_path):
    whole = encode(tmp_path / "whole.mp4", "libx264")
    assert not counted(with_edits(whole, tmp_path / "part.mp4", [(20, 15)]))


@pytest.mark.parametrize(("codec", "extension"), [
    ("libx264", "h264"), ("libx264", "ts"), ("libx265", "ts"), ("libvpx-vp9", "webm"), ("libvpx", "webm"),
])  # fmt: skip
def test_frames_have_the_size_of_the_first(tmp_path, codec, extension):
    """Recordings of other sizes are joined; a player shows them in one window."""
    sizes = [(64, 96), (80, 128)]
    parts = [encode(tmp_path / f"{size[0]}.{extension}", codec, 20, size=size) for size in sizes]
    path = tmp_path / f"joined.{extension}"
    if extension in ("ts", "h264"):
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    else:
        joined(path, parts)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [
            frame.to_ndarray(width=96, height=64, format="rgb24", interpolation="BICUBIC")
            for frame in container.decode(video=0)
        ]
    assert len(frames) == 40 and check(path, np.stack(frames)) == 0


def test_recordings_that_were_joined_are_read_in_order(tmp_path):
    """Their times overlap or go back, and the join looks like a lost packet."""
    for codec in ("libx264", "libx265"):
        parts = [encode(tmp_path / f"{name}.ts", codec, 24) for name in "ab"]
        path = tmp_path / "joined.ts"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        expected = np.concatenate([decoded(part) for part in parts])
        assert check(path, expected) == 0


def test_frames_are_cropped_exactly(tmp_path):
    path = uncoded_h264(tmp_path / "cropped.ts", "FFF", width=96, cropped=10)
    assert read_frames(str(path), [0, 2]).shape == (2, 32, 86, 3)


def test_codecs_whose_frames_build_on_earlier_ones(tmp_path):
    """Of which the decoder marks all as key frames; or whose colours come with the first packet alone."""
    for name in ("video.apng", "video.gif"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(Path(name).suffix[1:], rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "rgb24" if name.endswith("apng") else "rgb8"
            image = picture(0)
            for index in range(20):
                image[8:24, 4 * index : 4 * index + 4] = 10 * index  # the rest stays
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert check(tmp_path / name, decoded(tmp_path / name)) == 0
    with av.open(str(tmp_path / "palette.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "pal8"
        palette = np.random.default_rng(0).integers(0, 256, (256, 4), np.uint8)
        for index in range(8):
            frame = av.VideoFrame.from_ndarray((picture(index)[..., 0], palette), format="pal8")
            container.mux(stream.encode(frame))
    assert check(tmp_path / "palette.avi", decoded(tmp_path / "palette.avi")) == 0


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


def test_an_orientation_in_the_stream_holds_for_all_later_frames(tmp_path):
    source = encode(tmp_path / "source.mp4", "libx264")
    packets, expected = stored(source), decoded(source)
    packets = replaced(packets, 16, with_message(packets[16].content, orientation_message(2), is_hevc=False))
    path = remux(source, tmp_path / "turned.mp4", packets)
    expected[16:] = expected[16:, ::-1, ::-1]
    assert check(path, expected) == 0


def test_data_that_pyav_does_not_know_are_no_obstacle(tmp_path):
    """Such as EXIF, which also tells how a frame is turned."""
    source = encode(tmp_path / "source.mkv", "mjpeg", 8)
    tiff = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + bytes(4)
    exif = b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff
    packets = [replace(packet, content=packet.content[:2] + exif + packet.content[2:]) for packet in stored(source)]
    path = remux(source, tmp_path / "turned.mkv", packets)
    assert check(path, np.rot90(decoded(source), -1, axes=(1, 2))) == 0


def test_an_empty_display_matrix_changes_nothing(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264", 8)
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(path.read_bytes().replace(identity, bytes(36)))
    assert check(path, decoded(path)) == 0


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
        "large.mkv": [("libx264", 40, (64, 96), Disposition.default), ("libx264", 3, (2304, 2304), Disposition(0))],
    }.items():
        with av.open(str(tmp_path / name), "w") as container:
            opened = [add_stream(container, codec, size=size) for codec, _, size, _ in streams]
            for stream, (_, _, _, disposition) in zip(opened, streams, strict=True):
                stream.disposition = disposition
            for seed, (stream, (_, frames, size, _)) in enumerate(zip(opened, streams, strict=True)):
                fill(container, stream, frames, size, seed)
        expected = decoded(tmp_path / name, stream=0 if name == "cover.mp4" else 1)
        assert len(expected) == streams[1][1] and check(tmp_path / name, expected) == 0, name


DAMAGES = {
    "zeros": lambda content: overwritten(content, len(content) // 2, len(content) // 2 + 16),
    "half": lambda content: content[: len(content) // 2],
    "head": lambda content: content[:4] + bytes(byte ^ 0x5A for byte in content[4:12]) + content[12:],
    "all": lambda content: bytes(len(content)),
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
    assert frames_of(path) == len(expected) and check(path, expected, set(range(hit, end))) > 0
    for index in range(hit, end):
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


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_missing_key_frame_does_not_mix_up_the_frames_before_it(tmp_path, codec):
    """With B-frames the decoder puts them out after those that follow."""
    sound = encode(tmp_path / "sound.mp4", codec)
    packets, expected = stored(sound), decoded(sound)
    assert packets[16].is_keyframe
    path = remux(sound, tmp_path / "damaged.mkv", packets[:16] + packets[17:])
    assert check(path, np.delete(expected, 16, axis=0), set(range(16, 31))) > 0


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_parts_that_were_never_written_are_noticed(tmp_path, codec):
    """Their decoders take zeros for pictures."""
    sound = encode(tmp_path / "sound.mkv", codec, options={"b": "4M"})
    packets, expected = stored(sound), decoded(sound)
    hit = 5
    assert len(packets[hit].content) > 200
    path = remux(sound, tmp_path / "damaged.mkv", replaced(packets, hit, overwritten(packets[hit].content, 60, 160)))
    assert check(path, expected, set(range(hit, 48))) > 0


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_lost_packets_of_a_transport_stream(tmp_path, codec):
    """The frame that misses a part and those that follow it are refused, whether the decoder notices or not."""
    sound = encode(tmp_path / "sound.ts", codec)
    expected, content = decoded(sound), sound.read_bytes()
    pieces = [content[start : start + 188] for start in range(0, len(content), 188)]
    inside = [
        index for index, piece in enumerate(pieces) if not piece[1] & 0x40 and (piece[1] & 31, piece[2]) == (1, 0)
    ]
    for lost in inside[len(inside) // 3 : len(inside) * 3 // 5 : 5]:
        path = tmp_path / f"{lost}.ts"
        path.write_bytes(b"".join(piece for index, piece in enumerate(pieces) if index != lost))
        if frames_of(path) == len(expected):
            assert check(path, expected, set(range(48))) > 0
            read_frames(str(path), [0, 47])


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


@pytest.mark.parametrize("extension", ["mp4", "mkv"])
def test_a_single_frame_is_a_whole_file(tmp_path, extension):
    """Its end is not known from the frame after it."""
    with VideoFile(str(encode(tmp_path / f"one.{extension}", "libx264", 1))) as file:
        assert len(file.timeline) == 1 and not file.is_cut_short


def test_a_transport_stream_that_begins_within_a_packet(tmp_path):
    """Its end is whole, though its size is no multiple of its packets'."""
    whole = encode(tmp_path / "whole.ts", "libx264")
    path = tmp_path / "part.ts"
    path.write_bytes(whole.read_bytes()[100:])
    assert check(path, decoded(path)) == 0


@pytest.mark.parametrize(("codec", "extension"), [("libx265", "ts"), ("libsvtav1", "obu"), ("apng", "apng")])
def test_the_last_frame_of_a_file_that_is_cut_anywhere(tmp_path, codec, extension):
    """Where the decoder does not notice that it is torn, or the rest can't be demuxed."""
    whole = encode(tmp_path / f"whole.{extension}", codec)
    expected, content = decoded(whole), whole.read_bytes()
    for percent in (50, 61, 72, 83):
        path = tmp_path / f"{percent}.{extension}"
        path.write_bytes(content[: len(content) * percent // 100 // 188 * 188 - 1])
        frames, found = frames_of(path), []
        assert frames > 10
        for index in range(frames):
            try:
                found.append(read_frames(str(path), [index])[0].numpy())
            except BadClip:
                assert index >= frames - 5
        # frames that are shown before the torn one may be missing
        assert all(any(np.array_equal(frame, other) for other in expected) for frame in found)


def test_indices_may_come_in_any_order_and_repeat(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264")
    wanted = [30, 2, 2, 47, 0, 30]
    assert np.array_equal(read_frames(str(path), wanted).numpy(), decoded(path)[wanted])


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_paths_and_indices_of_every_type(tmp_path, decoder):
    path = encode(tmp_path / "a:b 100%d é.webm", "libvpx-vp9", 8)
    os.rename(path, os.fsencode(tmp_path) + b"/\xff.webm")
    names = [os.fsencode(tmp_path) + b"/\xff.webm", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.webm")]
    names.append(Path(names[1]))
    expected = read_frames(names[0], [3, 1], decoder)
    for name in names:
        for indices in (np.array([3, 1]), torch.tensor([3, 1]), range(3, 0, -2), iter([3, 1])):
            assert torch.equal(read_frames(name, indices, decoder), expected)
    assert read_frames(names[0], [], decoder).shape == (0, 64, 96, 3)
    for indices in ([1.0], ["1"], [None]):
        with pytest.raises(TypeError):
            read_frames(names[0], indices, decoder)


def test_mistakes_are_named(tmp_path):
    path = encode(tmp_path / "video.mp4", "libx264", 8)
    for name in ("", "pipe:0", "http://127.0.0.1:1/video.mp4", "a\0b", str(tmp_path)):
        with pytest.raises(BadClip):
            read_frames(name, [0])
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
def test_start_codes_in_matroska_and_an_orientation_in_the_stream(tmp_path, degrees):
    """PyAV's filter writes start codes where the container has lengths; FFmpeg reads them."""
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


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_a_path_through_a_link_leads_where_the_system_says(tmp_path, decoder):
    (tmp_path / "folder/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder/inner")
    path = encode(tmp_path / "folder/clip.webm", "libvpx-vp9", 4)
    found = read_frames(str(tmp_path / "link/../clip.webm"), [1], decoder=decoder)
    assert np.array_equal(found, read_frames(str(path), [1], decoder=decoder))
