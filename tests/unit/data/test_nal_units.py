"""What the units of a packet say about frames, references and damage."""

import av
import numpy as np
import pytest
from odd_videos import encode, overwritten, stored, uncoded_h264

from flperf.data.bitstream import open_scanner, open_zero_search


def scanned(path):
    """(scanner, contents) of a file's packets."""
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        scan = open_scanner(context.codec.canonical_name, context.codec.intra_only, context.extradata)
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return scan, [scan(packet) for packet in packets], packets


def test_a_field_is_no_frame_and_a_frame_between_fields_is_one(tmp_path):
    _, contents, _ = scanned(uncoded_h264(tmp_path / "fields.ts", "FfF"))
    assert [content.frames for content in contents] == [1, None, None, 1]


@pytest.mark.parametrize("options", [{"x264-params": "b-pyramid=0:bframes=2:b-adapt=0"}, {"bf": "0"}])
def test_references_are_those_that_the_encoder_made(tmp_path, options):
    _, contents, packets = scanned(encode(tmp_path / "video.mp4", "libx264", options=options))
    times = [packet.pts for packet in packets]
    shown_before_earlier_ones = [time < max(times[: index + 1]) for index, time in enumerate(times)]
    assert [not content.is_reference for content in contents] == shown_before_earlier_ones


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_missing_frame_shows_in_the_next_numbers(tmp_path, codec):
    """H.264 numbers its frames. HEVC does not: its decoder says which references are missing."""
    path = encode(tmp_path / "video.mp4", codec, options={"bf": "0"})
    scan, _, packets = scanned(path)
    contents = [open_again(path, packets[:5] + packets[6:])[index] for index in range(4, 8)]
    assert bool(contents[1].damage) == (codec == "libx264") and not contents[0].damage and not contents[2].damage


def open_again(path, packets):
    scan, _, _ = scanned(path)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        scan = open_scanner(context.codec.canonical_name, False, context.extradata)
    return [scan(packet) for packet in packets]


def test_zeros_in_a_packet_are_damage(tmp_path):
    for codec in ("libx264", "libx265"):
        path = encode(tmp_path / f"{codec}.mp4", codec)
        is_overwritten = open_zero_search(scanned(path)[0])
        for packet in stored(path):
            assert not is_overwritten(av.Packet(packet.content))
            size = len(packet.content)
            if size > 60:
                middle = int(np.clip(size // 2, 20, size - 20))
                assert is_overwritten(av.Packet(overwritten(packet.content, middle, middle + 8)))
