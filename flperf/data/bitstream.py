"""What the packets of a video stream say about themselves, without decoding them.

`open_scanner` returns a function that reads the first bytes of a packet: how many frames it becomes, whether decoding
can start there, and whether it is damaged. For codecs that are not here, and for streams in which a packet may be half
a frame, only the decoder knows.
"""

from collections.abc import Callable, Iterator

from av.buffer import Buffer

from flperf.data.h264 import H264Scanner
from flperf.data.hevc import HevcScanner
from flperf.data.nal_units import NalScanner
from flperf.data.packet_content import DAMAGED_HEAD, INTRA, UNKNOWN, Content

Scan = Callable[[Buffer], Content]

REORDERED = ("h264", "hevc")  # the scanned codecs whose packets are in another order than their frames


def open_scanner(codec: str, intra_only: bool, extradata: bytes | None) -> Scan | None:
    """The scanner of a stream, called with its packets in the order of the file; None for other codecs."""
    if intra_only:
        return lambda packet: INTRA
    match codec:
        case "vp8":
            return scan_vp8
        case "vp9":
            return scan_vp9
        case "av1":
            return scan_av1
        case "h264":
            return H264Scanner(extradata or b"")
        case "hevc":
            return HevcScanner(extradata or b"")
    return None


def scan_packet(scan: Scan | None, packet: Buffer) -> Content:
    """What a packet holds. A damaged one counts as a frame, so that later ones keep their numbers."""
    if scan is None:
        return UNKNOWN
    try:
        return scan(packet)
    except (ValueError, IndexError):  # it ends too early
        return DAMAGED_HEAD


def scan_vp8(buffer: Buffer) -> Content:
    """RFC 6386, 9.1: the first bit is 0 in a key frame, the fifth 1 in a frame that is shown."""
    packet = bytes(buffer)
    is_key = not packet[0] & 1
    if is_key and packet[3:6] != b"\x9d\1\x2a":  # start code
        return DAMAGED_HEAD
    return Content(packet[0] >> 4 & 1, is_key, parameters=packet[6:10] if is_key else b"")


def scan_vp9(buffer: Buffer) -> Content:
    """A frame, or a superframe of several, of which some are not shown (VP9 bitstream specification, annex B)."""
    frames = list(_vp9_frames(bytes(buffer)))
    if any(frame[0] >> 6 != 2 for frame in frames):  # frame_marker
        return DAMAGED_HEAD
    shown = [_vp9_header(frame[0]) for frame in frames]
    is_key = shown[0][1]
    if is_key and frames[0][0] >> 4 & 3 < 3 and frames[0][1:4] != b"\x49\x83\x42":  # frame_sync_code
        return DAMAGED_HEAD
    return Content(sum(is_shown for is_shown, _ in shown), is_key, parameters=frames[0][4:8] if is_key else b"")


def _vp9_header(first: int) -> tuple[bool, bool]:
    """(is shown, is a key frame) by the first byte of the uncompressed header."""
    bits = first << (1 if first >> 4 & 3 == 3 else 0)  # profile 3 has a reserved bit
    if bits & 8:  # show_existing_frame
        return True, False
    return bool(bits & 2), not bits & 4


def _vp9_frames(packet: bytes) -> Iterator[bytes]:
    """The frames of a superframe by the index at its end; any other packet is one frame."""
    marker = packet[-1]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    size = 2 + count * width
    if marker >> 5 != 6 or len(packet) < size or packet[-size] != marker:
        yield packet
        return
    start = 0
    for offset in range(len(packet) - size + 1, len(packet) - 1, width):
        length = int.from_bytes(packet[offset : offset + width], "little")
        if length:
            yield packet[start : start + length]
        start += length


def scan_av1(buffer: Buffer) -> Content:
    """A temporal unit, which has one shown frame unless it has several layers (AV1 specification, 7.5). A key frame
    comes with a sequence header."""
    shown, parameters = 0, b""
    for kind, payload in _av1_units(bytes(buffer)):
        if kind == 1:
            parameters = payload
        elif kind in (3, 6):  # a frame header, alone or with its frame
            shown += payload[0] >> 7 or payload[0] >> 4 & 1  # show_existing_frame, show_frame
    return Content(1 if shown == 1 else None, bool(parameters), parameters=parameters)


def _av1_units(packet: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, first bytes of the payload) of the open bitstream units (5.3)."""
    position = 0
    while position < len(packet):
        header = packet[position]
        position += 2 if header & 4 else 1
        size = len(packet) - position  # without a size it is the last
        if header & 2:
            encoded = packet[position : position + 8]  # leb128 (4.10.5)
            length = next((index for index, byte in enumerate(encoded, 1) if byte < 128), 8)
            size = sum((byte & 127) << 7 * index for index, byte in enumerate(encoded[:length]))
            position += length
        yield header >> 3 & 15, packet[position : position + min(size, 16)]
        position += size


ARITHMETIC, MANY_ZEROS = (scan_vp8, scan_vp9), 64  # AV1 may be padded


def open_zero_search(scan: Scan | None) -> Callable[[Buffer], bool] | None:
    """Whether a packet holds zeros that its encoder can't have written: a part of the file was never written, or is
    lost. Three are enough in a NAL unit (H.264, 7.4.1; HEVC, 7.4.2.2). Arithmetic coders write a few. None for codecs
    whose packets can't be judged."""
    if isinstance(scan, NalScanner):
        return scan.units.are_overwritten
    if scan in ARITHMETIC:
        return lambda packet: bytes(MANY_ZEROS) in bytes(packet).rstrip(b"\0")
    return None
