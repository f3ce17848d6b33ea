"""What the packets of a video stream say about themselves, without decoding them.

`open_scanner` returns a function that reads the first bytes of a packet: how many frames it becomes, whether decoding
can start there, and whether it is damaged. For codecs that are not here, and for streams in which a packet may be half
a frame, only the decoder knows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from av.buffer import Buffer

Orientation = tuple[int, ...]
"""Signs of (a, b, c, d) in x' = a x + c y, y' = b x + d y, by which a frame is turned and mirrored for display, with x
to the right and y downwards."""


class Content(NamedTuple):
    """What one packet holds."""

    frames: int | None  # that it becomes; None if only the decoder knows
    is_entry: bool = False  # decoding may start here; frames that come later but are shown before may not be decodable
    damage: str = ""  # why it, or what it refers to, can't be intact
    is_reference: bool = True  # later frames may refer to it
    parameters: bytes = b""  # of the sequence, which tell the size of its frames; empty if the packet has none
    orientation: Orientation | None = None  # of its frame and those shown after it


Scan = Callable[[Buffer], Content]

UNKNOWN = Content(None)
INTRA = Content(1, is_entry=True)
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


def scan_vp8(buffer: Buffer) -> Content:
    """RFC 6386, 9.1: the first bit is 0 in a key frame, the fifth 1 in a frame that is shown."""
    packet = bytes(buffer)
    is_key = not packet[0] & 1
    return Content(packet[0] >> 4 & 1, is_key, parameters=packet[6:10] if is_key else b"")


def scan_vp9(buffer: Buffer) -> Content:
    """A frame, or a superframe of several, of which some are not shown (VP9 bitstream specification, annex B)."""
    frames = list(_vp9_frames(bytes(buffer)))
    if any(frame[0] >> 6 != 2 for frame in frames):  # frame_marker
        return UNKNOWN
    shown = [_vp9_header(frame[0]) for frame in frames]
    is_key = shown[0][1]
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


class NalUnits:
    """Splits packets of H.264 and HEVC into NAL units: with lengths in MP4 and Matroska, with start codes elsewhere."""

    def __init__(self, length_size: int | None):
        self.length_size = length_size

    def of(self, packet: bytes) -> list[bytes] | None:
        """The units of a packet; None if their lengths don't add up. Some writers put start codes into MP4, too."""
        if self.length_size is None or packet.startswith(b"\0\0\0\1"):
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


def is_overwritten(scan: Scan | None, packet: Buffer) -> bool:
    """Whether a packet holds zeros that its encoder can't have written: a part of the file was never written, or is
    lost. Three are enough in a NAL unit (H.264, 7.4.1; HEVC, 7.4.2.2). Arithmetic coders write a few."""
    content = bytes(packet)
    if b"\0\0\0" not in content:  # most packets end here
        return False
    if isinstance(scan, NalScanner):
        return any(b"\0\0\0" in unit.rstrip(b"\0") for unit in scan.units.of(content) or [])
    return scan in ARITHMETIC and bytes(MANY_ZEROS) in content.rstrip(b"\0")


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
        self.left = 2 * rest.bit_length() - self.left - 1  # as many zeros come before the first 1 as bits behind it
        if self.left < 0:
            raise ValueError("a NAL unit ends too early")
        return (rest >> self.left) - 1

    def signed_golomb(self) -> int:
        number = self.golomb()
        return (number + 1) // 2 if number % 2 else -(number // 2)


@dataclass(frozen=True)
class SequenceParameters:
    """What a sequence parameter set of H.264 says of the pictures that use it (7.3.2.1.1)."""

    identifier: int
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
        identifier = bits.golomb()
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
        return cls(identifier, separate_planes, frame_number_bits, has_gaps, has_fields=not bits.read(1))


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
DAMAGED = Content(1, damage="the head of a slice is damaged or missing")
# Whether others refer to it is not known, but they miss it: in H.264 by their numbers, in HEVC the decoder says so
LOST = Content(1, damage="it holds no picture", is_reference=False)
NO_TYPE_OF_H264, NO_TYPE_OF_HEVC = {0, *range(22, 32)}, range(41, 64)  # of NAL units; encoders write no packet of them
RECOVERY_POINT, ORIENTATION = 6, 47  # types of messages, in H.264 and HEVC


def read_messages(unit: bytes, header: int) -> dict[int, bytes]:
    """Type → payload of the supplemental messages of a unit whose header has so many bytes (H.264, 7.3.2.3; HEVC,
    7.3.2.4). Those without a recovery point and an orientation may be left out."""
    if RECOVERY_POINT not in unit[header:] and ORIENTATION not in unit[header:]:
        return {}
    content, found, position = unit[header:].replace(b"\0\0\3", b"\0\0"), {}, 0
    while position + 2 < len(content):
        numbers = []
        for _ in range(2):  # type and size: each the sum of its bytes, of which the last is below 255
            start = position
            while content[position] == 255:
                position += 1
            numbers.append(255 * (position - start) + content[position])
            position += 1
        kind, size = numbers
        found.setdefault(kind, content[position : position + size])
        position += size
    return found


def read_orientation(payload: bytes) -> Orientation | None:
    """A display orientation (H.264, D.1.27; HEVC, D.2.17); None if it changes nothing."""
    bits = Bits(payload)
    if bits.read(1):  # cancelled
        return None
    horizontal, vertical = [-1 if bits.read(1) else 1 for _ in range(2)]
    # the flips come before the turn there, and behind it here
    return orientation_of(horizontal * vertical * 360 * bits.read(16) / 2**16, horizontal, vertical)


def orientation_of(degrees: float, horizontal: int = 1, vertical: int = 1) -> Orientation | None:
    """A turn counterclockwise, then flips where a sign is -1. None if it changes nothing."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    values = horizontal * cosine, -vertical * sine, horizontal * sine, vertical * cosine
    found = tuple(0 if abs(value) < 0.01 else int(math.copysign(1, value)) for value in values)
    return None if found == (1, 0, 0, 1) else found


class NalScanner(ABC):
    """Scans packets of NAL units."""

    def __init__(self, length_size: int | None):
        self.units = NalUnits(length_size)

    def __call__(self, packet: Buffer) -> Content:
        units = self.units.of(bytes(packet))
        if units is None:
            return Content(1, damage="its NAL units don't fit")
        try:
            return self.scan(units)
        except (ValueError, IndexError):  # a unit ends too early
            return DAMAGED

    @abstractmethod
    def scan(self, units: list[bytes]) -> Content:
        """What the units of a packet say about it. A damaged packet counts as a frame, so that later ones keep their
        numbers. Raises `ValueError` or `IndexError` if a unit ends too early."""


class _Slice(NamedTuple):
    """The head of a picture's first slice of H.264 (7.3.3)."""

    sequence: SequenceParameters
    number: int  # frame_num
    is_field: bool


class H264Scanner(NalScanner):
    """Slices are NAL units of type 1 and 5 (a picture that can be decoded without any other). They name a set of
    picture parameters (8), which names one of sequence parameters (7)."""

    def __init__(self, extradata: bytes):
        is_avcc = extradata[:1] == b"\1" and len(extradata) > 6
        super().__init__((extradata[4] & 3) + 1 if is_avcc else None)
        self.parsed: dict[bytes, SequenceParameters] = {}
        self.sequences: dict[int, SequenceParameters] = {}
        self.pictures: dict[int, int] = {}  # identifier → that of the sequence parameters
        self.reference: int | None = None  # number of the last frame that others refer to
        for unit in _avcc_parameters(extradata) if is_avcc else self.units.of(extradata) or []:
            self._read_parameters(unit)

    def scan(self, units: list[bytes]) -> Content:
        kinds, references, frames = 0, 0, 0
        head, parameters, messages = None, b"", {}
        for unit in units:
            kind = unit[0] & 31
            if kind in (1, 2, 5):
                kinds |= 1 << kind
                references |= unit[0] & 0x60
                if unit[1] & 128:  # first_mb_in_slice is 0
                    frames += 1
                    head = head or self._read_slice(unit)
            elif kind == 6:
                messages |= read_messages(unit, 1)
            elif kind in (7, 8):
                self._read_parameters(unit)
                parameters = unit if kind == 7 else parameters
        if kinds and not frames:
            return DAMAGED
        if not kinds and any(unit[0] & 31 in NO_TYPE_OF_H264 for unit in units or [b"\0"]):
            return LOST
        is_reset, is_reference = bool(kinds & 1 << 5), bool(references)
        damage = self._compare(head, is_reset, is_reference) if head else ""
        # a recovery point without delay: recovery_frame_cnt is 0
        is_entry = is_reset or messages.get(RECOVERY_POINT, b"\0")[0] >> 7 == 1
        is_known = frames == 0 or frames == 1 and head is not None and not head.is_field
        orientation = read_orientation(messages[ORIENTATION]) if ORIENTATION in messages else None
        return Content(frames if is_known else None, is_entry, damage, is_reference, parameters, orientation)

    def _read_parameters(self, unit: bytes) -> None:
        kind = unit[0] & 31
        if kind == 7:
            if unit not in self.parsed:
                self.parsed[unit] = SequenceParameters.parse(unit)
            self.sequences[self.parsed[unit].identifier] = self.parsed[unit]
        elif kind == 8:
            bits = Bits(unit[1:SLICE_HEAD])
            self.pictures[bits.golomb()] = bits.golomb()

    def _read_slice(self, unit: bytes) -> _Slice | None:
        """None if its parameters are missing."""
        bits = Bits(unit[1:SLICE_HEAD])
        bits.golomb(), bits.golomb()
        sequence = self.sequences.get(self.pictures.get(bits.golomb(), -1))
        if sequence is None:
            return None
        if sequence.separate_planes:
            bits.read(2)
        number = bits.read(sequence.frame_number_bits)
        return _Slice(sequence, number, sequence.has_fields and bool(bits.read(1)))

    def _compare(self, head: _Slice, is_reset: bool, is_reference: bool) -> str:
        """Compare the number of a frame with that of the last reference (7.4.3, frame_num)."""
        last = self.reference
        if is_reference:
            self.reference = head.number
        if is_reset or last is None or head.sequence.has_gaps:
            return ""
        following = (last + 1) % (1 << head.sequence.frame_number_bits)
        return "" if head.number in (last, following) else "a frame that it refers to is missing"


def _avcc_parameters(extradata: bytes) -> list[bytes]:
    """The parameter sets of an AVCDecoderConfigurationRecord (ISO 14496-15, 5.3.3.1)."""
    units, position = [], 5
    for mask in (31, 255):  # sequence, picture
        count = extradata[position] & mask
        position += 1
        for _ in range(count):
            size = int.from_bytes(extradata[position : position + 2], "big")
            units.append(extradata[position + 2 : position + 2 + size])
            position += 2 + size
    return [unit for unit in units if unit]


class HevcScanner(NalScanner):
    """Slices are NAL units of types 0 to 31, those from 16 to 23 begin a part that can be decoded on its own; broken
    links (16 to 18) and ends of a sequence (36, 37) make the decoder leave out the pictures that lead the next one."""

    def __init__(self, extradata: bytes):
        is_hvcc = extradata[:1] == b"\1" and len(extradata) > 22
        super().__init__((extradata[21] & 3) + 1 if is_hvcc else None)
        self.has_ended = False
        self.scanned = 0
        self.highest = 0  # temporal sub-layer

    def scan(self, units: list[bytes]) -> Content:
        frames, is_entry, breaks, is_reference = 0, False, self.has_ended, False
        slices, parameters, messages = 0, b"", {}
        for unit in units:
            kind, layer = unit[0] >> 1 & 63, unit[1] & 7
            if kind < 32 and len(unit) > 2 and not (unit[0] & 1 or unit[1] >> 3):  # of the base layer
                slices += 1
                frames += unit[2] >> 7  # first_slice_segment_in_pic_flag
                if kind >= 16:
                    is_entry |= kind <= 23
                    # the decoder may drop earlier pictures: no_output_of_prior_pics_flag
                    breaks |= self.scanned > 0 and (kind <= 18 or unit[2] >> 6 == 3)
                # even types below 16 are referred to by higher sub-layers only
                self.highest = max(self.highest, layer)
                is_reference |= kind >= 16 or kind % 2 == 1 or layer < self.highest
            elif kind == 33:
                parameters = unit
            elif kind == 39:
                messages |= read_messages(unit, 2)
            self.has_ended |= kind in (36, 37)
        self.scanned += 1
        if slices and not frames:
            return DAMAGED
        if not slices and any(unit[0] >> 1 & 63 in NO_TYPE_OF_HEVC for unit in units or [b"\x7f"]):
            return LOST
        is_known = frames <= 1 and not breaks
        orientation = read_orientation(messages[ORIENTATION]) if ORIENTATION in messages else None
        return Content(frames if is_known else None, is_entry, "", is_reference, parameters, orientation)
