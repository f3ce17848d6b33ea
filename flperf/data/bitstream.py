"""What the packets of a video stream say about themselves, without decoding them.

`open_scanner` returns a function that reads the first bytes of a packet: how many frames it becomes, whether decoding
can start there, and whether it is damaged. For codecs that are not here, and for streams in which a packet may be half
a frame, only the decoder knows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from av.buffer import Buffer


class Content(NamedTuple):
    """What one packet holds."""

    frames: int | None  # that it becomes; None if only the decoder knows
    is_entry: bool = False  # all that the codec needs to start decoding here
    damage: str = ""  # why it, or what it refers to, can't be intact
    is_reference: bool = True  # later frames may refer to it


Scan = Callable[[Buffer], Content]

UNKNOWN = Content(None)
INTRA = Content(1, is_entry=True)
REORDERED = ("h264", "hevc")  # the scanned codecs whose packets are in another order than their frames


def open_scanner(codec: str, intra_only: bool, extradata: bytes | None) -> Scan | None:
    """The scanner of a stream, called with its packets in the order of the file; None for other codecs."""
    match codec:
        case _ if intra_only:
            return lambda packet: INTRA
        case "vp8":
            return lambda packet: scan_vp8(bytes(packet))
        case "vp9":
            return lambda packet: scan_vp9(bytes(packet))
        case "av1":
            return lambda packet: scan_av1(bytes(packet))
        case "h264":
            return H264Scanner(extradata or b"")
        case "hevc":
            return HevcScanner(extradata or b"")
    return None


def scan_vp8(packet: bytes) -> Content:
    """RFC 6386, 9.1: the first bit is 0 in a key frame, the fifth 1 in a frame that is shown."""
    return Content(packet[0] >> 4 & 1, not packet[0] & 1)


def scan_vp9(packet: bytes) -> Content:
    """A frame, or a superframe of several, of which some are not shown (VP9 bitstream specification, annex B)."""
    frames = list(_vp9_frames(packet))
    if any(frame[0] >> 6 != 2 for frame in frames):  # frame_marker
        return UNKNOWN
    shown = [_vp9_header(frame[0]) for frame in frames]
    return Content(sum(is_shown for is_shown, _ in shown), shown[0][1])


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


def scan_av1(packet: bytes) -> Content:
    """A temporal unit: one shown frame (AV1 specification, 7.5). A key frame comes with a sequence header."""
    return Content(1, any(kind == 1 for kind in _av1_units(packet)))


def _av1_units(packet: bytes) -> Iterator[int]:
    """The types of the open bitstream units (5.3)."""
    position = 0
    while position < len(packet):
        header = packet[position]
        yield header >> 3 & 15
        position += 2 if header & 4 else 1
        if not header & 2:  # without a size it is the last
            return
        encoded = packet[position : position + 8]  # leb128 (4.10.5)
        length = next((index for index, byte in enumerate(encoded, 1) if byte < 128), 8)
        size = sum((byte & 127) << 7 * index for index, byte in enumerate(encoded[:length]))
        position += length + size


class NalUnits:
    """Splits packets of H.264 and HEVC into NAL units: with lengths in MP4 and Matroska, with start codes elsewhere."""

    def __init__(self, length_size: int | None):
        self.length_size = length_size

    def of(self, packet: bytes) -> list[bytes] | None:
        """The units of a packet; None if their lengths don't add up."""
        if self.length_size is None:
            parts = packet.split(b"\0\0\1")[1:]
            return [unit for unit in (part.rstrip(b"\0") for part in parts) if unit]
        units, position, size = [], 0, len(packet)
        while position < size:
            start = position + self.length_size
            position = start + int.from_bytes(packet[position:start], "big")
            if position > size:
                return None
            if position > start:
                units.append(packet[start:position])
        return units

    def are_overwritten(self, packet: bytes) -> bool:
        """Whether a unit holds three zeros, which encoders break up (H.264, 7.4.1; HEVC, 7.4.2.2): a part of the file
        was never written, or is lost."""
        return any(b"\0\0\0" in unit.rstrip(b"\0") for unit in self.of(packet) or [])


class Bits:
    """Reads the head of a NAL unit; the bytes that break up forbidden ones are taken out."""

    def __init__(self, unit: bytes):
        raw = unit.replace(b"\0\0\3", b"\0\0")
        self.value, self.left = int.from_bytes(raw, "big"), 8 * len(raw)

    def read(self, count: int) -> int:
        """An unsigned number of `count` bits. Raises `ValueError` past the end."""
        self.left -= count
        if self.left < 0:
            raise ValueError("a NAL unit ends too early")
        return self.value >> self.left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb number (H.264, 9.1)."""
        rest = self.value & ((1 << self.left) - 1)
        zeros = self.left - rest.bit_length()
        return self.read(2 * zeros + 1) - 1

    def signed_golomb(self) -> int:
        number = self.golomb()
        return (number + 1) // 2 if number % 2 else -(number // 2)


@dataclass(frozen=True)
class SequenceParameters:
    """What a sequence parameter set of H.264 says of the pictures that use it (7.3.2.1.1)."""

    separate_planes: bool
    frame_number_bits: int
    has_gaps: bool  # frame numbers may have gaps, as in streams whose layers were thinned out
    has_fields: bool

    @classmethod
    def parse(cls, unit: bytes) -> "SequenceParameters":
        """Raises `ValueError` for a damaged unit."""
        bits = Bits(unit)
        bits.read(8)
        profile = bits.read(8)
        bits.read(16)
        bits.golomb()
        separate_planes = False
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            separate_planes = _skip_high_profile(bits)
        frame_number_bits = bits.golomb() + 4
        match bits.golomb():  # pic_order_cnt_type
            case 0:
                bits.golomb()
            case 1:
                bits.read(1)
                bits.signed_golomb(), bits.signed_golomb()
                for _ in range(bits.golomb()):
                    bits.signed_golomb()
        bits.golomb()
        has_gaps = bool(bits.read(1))
        bits.golomb(), bits.golomb()
        return cls(separate_planes, frame_number_bits, has_gaps, has_fields=not bits.read(1))


def _skip_high_profile(bits: Bits) -> bool:
    """Read the part of a sequence parameter set that only high profiles have; returns whether planes are separate."""
    chroma = bits.golomb()
    separate_planes = bool(bits.read(1)) if chroma == 3 else False
    bits.golomb(), bits.golomb(), bits.read(1)
    if bits.read(1):
        for index in range(12 if chroma == 3 else 8):
            if bits.read(1):
                _skip_scaling_list(bits, 16 if index < 6 else 64)
    return separate_planes


def _skip_scaling_list(bits: Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last


SLICE_HEAD = 32  # bytes of a slice that hold what is read of its header


class NalScanner(ABC):
    """Scans packets of NAL units."""

    def __init__(self, length_size: int | None):
        self.units = NalUnits(length_size)

    def __call__(self, packet: Buffer) -> Content:
        units = self.units.of(bytes(packet))
        return Content(1, damage="its NAL units don't fit") if units is None else self.scan(units)

    @abstractmethod
    def scan(self, units: list[bytes]) -> Content:
        """What the units of a packet say about it."""


class H264Scanner(NalScanner):
    """Slices are NAL units of type 1 and 5 (a picture that can be decoded without any other), parameters of type 7."""

    def __init__(self, extradata: bytes):
        is_avcc = extradata[:1] == b"\1" and len(extradata) > 6
        super().__init__((extradata[4] & 3) + 1 if is_avcc else None)
        self.parameters: SequenceParameters | None = None
        self.known: dict[bytes, SequenceParameters] = {}
        self.reference: int | None = None  # number of the last frame that others refer to
        for unit in _avcc_parameters(extradata) if is_avcc else self.units.of(extradata) or []:
            self._read_parameters(unit)

    def scan(self, units: list[bytes]) -> Content:
        frames, is_entry, damage, is_reference = 0, False, "", False
        for unit in units:
            kind = unit[0] & 31
            if kind == 7:
                self._read_parameters(unit)
            elif kind in (1, 2, 5):
                is_entry |= kind == 5
                is_reference |= bool(unit[0] >> 5 & 3)
                if unit[1] & 128:  # first_mb_in_slice is 0
                    frames += 1
                    damage = damage or self._count(unit, kind)
        is_known = self.parameters is not None and not self.parameters.has_fields and frames <= 1
        return Content(frames if is_known else None, is_entry, damage, is_reference)

    def _read_parameters(self, unit: bytes) -> None:
        if unit[0] & 31 == 7:
            if unit not in self.known:
                self.known[unit] = SequenceParameters.parse(unit)
            self.parameters = self.known[unit]

    def _count(self, unit: bytes, kind: int) -> str:
        """Compare the number of a frame with that of the last reference (7.4.3, frame_num)."""
        if self.parameters is None:
            return ""
        bits = Bits(unit[1:SLICE_HEAD])
        bits.golomb(), bits.golomb(), bits.golomb()
        if self.parameters.separate_planes:
            bits.read(2)
        number, last = bits.read(self.parameters.frame_number_bits), self.reference
        if unit[0] >> 5 & 3:  # others refer to it
            self.reference = number
        if kind == 5 or last is None or self.parameters.has_gaps:
            return ""
        following = (last + 1) % (1 << self.parameters.frame_number_bits)
        return "" if number in (last, following) else "a frame that it refers to is missing"


def _avcc_parameters(extradata: bytes) -> list[bytes]:
    """The sequence parameter sets of an AVCDecoderConfigurationRecord (ISO 14496-15, 5.3.3.1)."""
    units, position = [], 6
    for _ in range(extradata[5] & 31):
        size = int.from_bytes(extradata[position : position + 2], "big")
        units.append(extradata[position + 2 : position + 2 + size])
        position += 2 + size
    return [unit for unit in units if unit]


class HevcScanner(NalScanner):
    """Slices are NAL units of types 0 to 31, those from 16 on begin a part that can be decoded on its own; broken links
    (16 to 18) and ends of a sequence (36, 37) make the decoder leave out the pictures that lead the next one."""

    def __init__(self, extradata: bytes):
        is_hvcc = extradata[:1] == b"\1" and len(extradata) > 22
        super().__init__((extradata[21] & 3) + 1 if is_hvcc else None)
        self.has_ended = False
        self.scanned = 0
        self.highest = 0  # temporal sub-layer

    def scan(self, units: list[bytes]) -> Content:
        frames, is_entry, breaks, damage, is_reference = 0, False, self.has_ended, "", False
        for unit in units:
            kind, layer = unit[0] >> 1 & 63, unit[1] & 7
            if kind < 32 and len(unit) > 2 and not (unit[0] & 1 or unit[1] >> 3):  # of the base layer
                frames += unit[2] >> 7  # first_slice_segment_in_pic_flag
                is_entry |= 16 <= kind <= 23
                breaks |= 16 <= kind <= 18 and self.scanned > 0
                # even types below 16 are referred to by higher sub-layers only
                self.highest = max(self.highest, layer)
                is_reference |= kind >= 16 or kind % 2 == 1 or layer < self.highest
            self.has_ended |= kind in (36, 37)
        self.scanned += 1
        return Content(None if breaks or frames > 1 else frames, is_entry, damage, is_reference)
