"""Packets tell what they become: the decoder agrees, for every structure; and any bytes can be scanned."""

import itertools

import av
import numpy as np
import pytest
from odd_videos import encode, orientation_message, remux, replaced, stored, uncoded_h264, with_message

from flperf.data.bitstream import open_scanner, scan_packet
from flperf.data.containers import decode, packet_of
from flperf.data.nal_units import DisplayOrder, orientation_of, read_messages, read_orientation
from flperf.data.packet_content import Content
from flperf.data.pyav import display_orientation
from flperf.data.video_file import VideoFile

X265 = "log-level=error:pools=1:frame-threads=1:scenecut=0:"
STRUCTURES = [
    ("libx264", {"x264-params": "b-pyramid=normal:bframes=7:b-adapt=0:keyint=40:ref=6"}),
    ("libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"}),
    ("libx264", {"x264-params": "intra-refresh=1:bframes=2:keyint=14"}),
    ("libx264", {"x264-params": "bframes=3:slices=4:keyint=20"}),
    ("libx264", {"profile": "baseline"}),
    ("libx264", {"flags": "+ilme+ildct", "x264-params": "tff=1:bframes=2:keyint=20"}),
    ("libx265", {"x265-params": X265 + "open-gop=1:keyint=15:min-keyint=15:bframes=4"}),
    ("libx265", {"x265-params": X265 + "open-gop=0:keyint=16:bframes=6:b-pyramid=1:b-adapt=0"}),
    ("libx265", {"x265-params": X265 + "open-gop=0:radl=2:keyint=16:min-keyint=16:bframes=4:b-adapt=0"}),
    ("libx265", {"x265-params": X265 + "temporal-layers=3:keyint=24:bframes=3"}),
    ("libx265", {"x265-params": X265 + "slices=2:keyint=20:bframes=0"}),
]


def contents(path) -> list[Content]:
    with VideoFile(str(path)) as file:
        return [info.content for info in file.infos]


def order_of_decoding(path) -> list[int]:
    """The packets of frames in the order in which the decoder puts them out."""
    with VideoFile(str(path)) as file:
        packets = itertools.chain(file.packets_from(0), [(-1, None)])
        return [packet_of(frame) for position, packet in packets for frame in decode(file.context, position, packet)]


@pytest.mark.parametrize("extension", ["mp4", "ts"])
@pytest.mark.parametrize(("codec", "options"), STRUCTURES)
def test_the_display_order_is_that_of_the_decoder(tmp_path, codec, options, extension):
    path = encode(tmp_path / f"video.{extension}", codec, 60, options)
    found = contents(path)
    assert all(content.frames == 1 and not content.damage for content in found)
    assert np.argsort([content.order for content in found]).tolist() == order_of_decoding(path)


@pytest.mark.parametrize(("codec", "options", "extension"), [
    ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}, "webm"),
    ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"}, "webm"),
    ("libsvtav1", {}, "mp4"),
    ("libsvtav1", {}, "ivf"),
])  # fmt: skip
def test_hidden_frames_are_not_counted(tmp_path, codec, options, extension):
    path = encode(tmp_path / f"video.{extension}", codec, 60, options)
    found = contents(path)
    shown = [position for position, content in enumerate(found) if content.frames]
    assert len(shown) == 60 == len(order_of_decoding(path))
    assert [content.is_entry for content in found].count(True) >= 3 and found[0].is_entry


@pytest.mark.parametrize(("codec", "options"), STRUCTURES[:3] + STRUCTURES[6:8])
def test_decoding_may_start_where_the_scanner_says(tmp_path, codec, options):
    path = encode(tmp_path / "video.mp4", codec, 60, options)
    found = contents(path)
    with VideoFile(str(path)) as file:
        for start in (position for position, content in enumerate(found) if content.is_entry):
            packets = itertools.chain(file.packets_from(start), [(-1, None)])
            frames = [frame for position, packet in packets for frame in decode(file.context, position, packet)]
            file.reset()
            # those that are shown before the first packet's frame may be missing
            later = [position for position in range(start, 60) if found[position].order >= found[start].order]
            assert set(later) <= {packet_of(frame) for frame in frames}


@pytest.mark.parametrize(("codec", "extension"), [
    ("libx264", "mp4"), ("libx264", "ts"), ("libx265", "mp4"), ("libx265", "ts"), ("libvpx-vp9", "webm"),
    ("libvpx", "webm"), ("libsvtav1", "mp4"),
])  # fmt: skip
def test_any_bytes_can_be_scanned(tmp_path, codec, extension):
    """What is damaged becomes one frame that is refused, or is left to the decoder."""
    path = encode(tmp_path / f"video.{extension}", codec, 20)
    rng = np.random.default_rng(0)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        name, extradata = context.codec.canonical_name, context.extradata
    for packet in stored(path):
        for _ in range(20):
            content = bytearray(packet.content)
            start = int(rng.integers(len(content)))
            content[start : start + 8] = rng.bytes(len(content[start : start + 8]))
            shortened = bytes(content[: int(rng.integers(1, len(content) + 1))])
            found = scan_packet(open_scanner(name, False, extradata), av.Packet(shortened))
            assert found.frames is None or found.frames >= 0


def test_a_field_is_no_frame(tmp_path):
    assert all(content.frames is None for content in contents(uncoded_h264(tmp_path / "fields.ts", "ff")))
    assert all(content.frames == 1 for content in contents(uncoded_h264(tmp_path / "frames.ts", "FF")))


@pytest.mark.parametrize("size", [16, 256])
def test_the_order_goes_on_where_its_bits_start_again(size):
    order = DisplayOrder()
    counts = [0, 4, 2, *range(6, 3 * size, 2)]
    assert [order.of(count % size, size, is_reference=True) for count in counts] == counts
    order.reset()
    assert order.of(0, size, True) > max(counts)
    assert order.of(size - 2, size, False) > max(counts)  # shown before the first picture of its sequence


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_orientations_are_those_of_the_decoder(tmp_path, quarters, flips):
    for codec in ("libx264", "libx265"):
        source = encode(tmp_path / "source.mp4", codec, 4)
        packets = stored(source)
        message = orientation_message(quarters, *flips)
        changed = replaced(packets, 0, with_message(packets[0].content, message, codec == "libx265"))
        path = remux(source, tmp_path / "turned.mp4", changed)
        with VideoFile(str(path)) as file:
            assert file.infos[0].content.orientation == display_orientation(file.first_frame())


def test_messages_of_other_kinds_are_passed_over():
    payload = bytes([5]) + bytes([255, 5]) + b"x" * 260 + bytes([47, 3]) + b"\x08\x00\x00" + b"\x80"
    assert list(read_messages(b"\x06" + payload, 1)) == [5, 47]
    assert read_messages(b"\x06" + b"\x05\x02ab\x80", 1) == {}
    assert read_orientation(b"\x80\x00\x00\x00") is None  # cancelled
    assert orientation_of(0) is None and orientation_of(360) is None
