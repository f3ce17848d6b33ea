"""Packets of HEVC, which belong to one picture each (ITU-T H.265, chapters 7 and 8)."""

from dataclasses import dataclass
from typing import NamedTuple

from flperf.data.nal_units import (
    NO_PICTURE,
    ORIENTATION,
    SLICE_HEAD,
    Bits,
    DisplayOrder,
    NalScanner,
    read_messages,
    read_orientation,
)
from flperf.data.packet_content import DAMAGED_HEAD, Content

NO_TYPE = range(41, 64)  # of units; encoders write no packet of them


@dataclass(frozen=True)
class SequenceParameters:
    """What a sequence parameter set says of the slices that use it (7.3.2.2)."""

    identifier: int
    separate_planes: bool
    order_bits: int

    @classmethod
    def parse(cls, unit: bytes) -> "SequenceParameters":
        """Raises `ValueError` for a damaged unit."""
        bits = Bits(unit[2:])
        bits.read(4)
        sub_layers = bits.read(3)
        bits.read(1)
        _skip_profile(bits, sub_layers)
        identifier = bits.golomb()
        separate_planes = bits.golomb() == 3 and bool(bits.read(1))
        bits.golomb(), bits.golomb()
        if bits.read(1):  # a conformance window
            for _ in range(4):
                bits.golomb()
        bits.golomb(), bits.golomb()
        return cls(identifier, separate_planes, order_bits=bits.golomb() + 4)


def _skip_profile(bits: Bits, sub_layers: int) -> None:
    """Read a profile_tier_level (7.3.3)."""
    bits.read(96)
    flags = [(bits.read(1), bits.read(1)) for _ in range(sub_layers)]
    if sub_layers:
        bits.read(2 * (8 - sub_layers))
    for has_profile, has_level in flags:
        bits.read(88 * has_profile + 8 * has_level)


class PictureParameters(NamedTuple):
    """What a picture parameter set says of the slices that use it (7.3.2.3)."""

    identifier: int
    sequence: int
    has_output_flags: bool
    extra_bits: int

    @classmethod
    def parse(cls, unit: bytes) -> "PictureParameters":
        """Raises `ValueError` for a damaged unit."""
        bits = Bits(unit[2:SLICE_HEAD])
        identifier, sequence = bits.golomb(), bits.golomb()
        bits.read(1)
        return cls(identifier, sequence, bool(bits.read(1)), bits.read(3))


class _Slice(NamedTuple):
    """The head of a picture's first slice (7.3.6.1)."""

    is_shown: bool
    order: int  # last bits of the picture order count
    order_bits: int


class HevcScanner(NalScanner):
    """Slices are NAL units of types 0 to 31, those from 16 to 23 begin a part that can be decoded on its own; broken
    links (16 to 18) and ends of a sequence (36, 37) make the decoder leave out the pictures that lead the next one."""

    def __init__(self, extradata: bytes):
        is_hvcc = extradata[:1] == b"\1" and len(extradata) > 22
        super().__init__((extradata[21] & 3) + 1 if is_hvcc else None)
        self.sequences: dict[int, SequenceParameters] = {}
        self.pictures: dict[int, PictureParameters] = {}
        self.order = DisplayOrder()
        self.has_ended = False
        self.scanned = 0
        self.highest = 0  # temporal sub-layer
        for unit in _hvcc_parameters(extradata) if is_hvcc else self.units.of(extradata) or []:
            self._read_parameters(unit)

    def scan(self, units: list[bytes]) -> Content:
        frames, slices, first = 0, 0, b""
        is_entry, is_reference, breaks = False, False, self.has_ended
        parameters, messages = b"", {}
        for unit in units:
            kind, layer = unit[0] >> 1 & 63, unit[1] & 7
            if kind < 32 and len(unit) > 2 and not (unit[0] & 1 or unit[1] >> 3):  # of the base layer
                slices += 1
                if unit[2] >> 7:  # first_slice_segment_in_pic_flag
                    frames, first = frames + 1, unit
                if kind >= 16:
                    is_entry |= kind <= 23
                    # the decoder may drop earlier pictures: no_output_of_prior_pics_flag
                    breaks |= self.scanned > 0 and (kind <= 18 or unit[2] >> 6 == 3)
                # even types below 16 are referred to by higher sub-layers only
                self.highest = max(self.highest, layer)
                is_reference |= kind >= 16 or kind % 2 == 1 or layer < self.highest
            elif kind in (33, 34):
                self._read_parameters(unit)
                parameters = unit if kind == 33 else parameters
            elif kind == 39:
                messages |= read_messages(unit, 2)
            self.has_ended |= kind in (36, 37)
        self.scanned += 1
        if slices and not frames:
            return DAMAGED_HEAD
        if not slices and any(unit[0] >> 1 & 63 in NO_TYPE for unit in units or [b"\x7f"]):
            return NO_PICTURE
        head = self._read_slice(first) if first else None
        is_known = frames <= 1 and not breaks and (head is None or head.is_shown)
        order = self._display_order(head, first) if head else None
        orientation = read_orientation(messages[ORIENTATION]) if ORIENTATION in messages else None
        return Content(frames if is_known else None, is_entry, "", is_reference, parameters, orientation, order)

    def _read_parameters(self, unit: bytes) -> None:
        kind = unit[0] >> 1 & 63
        if kind == 33:
            sequence = SequenceParameters.parse(unit)
            self.sequences[sequence.identifier] = sequence
        elif kind == 34:
            picture = PictureParameters.parse(unit)
            self.pictures[picture.identifier] = picture

    def _read_slice(self, unit: bytes) -> _Slice | None:
        """None if its parameters are missing."""
        kind, bits = unit[0] >> 1 & 63, Bits(unit[2:SLICE_HEAD])
        bits.read(2 if 16 <= kind <= 23 else 1)
        picture = self.pictures.get(bits.golomb())
        sequence = self.sequences.get(picture.sequence) if picture else None
        if picture is None or sequence is None:
            return None
        bits.read(picture.extra_bits)
        bits.golomb()
        is_shown = not picture.has_output_flags or bool(bits.read(1))
        if sequence.separate_planes:
            bits.read(2)
        order = 0 if kind in (19, 20) else bits.read(sequence.order_bits)
        return _Slice(is_shown, order, sequence.order_bits)

    def _display_order(self, head: _Slice, unit: bytes) -> int:
        kind, layer = unit[0] >> 1 & 63, unit[1] & 7
        if kind in (19, 20):  # which reset the count
            self.order.reset()
        is_reference = layer == 1 and (kind >= 16 or kind % 2 == 1 and kind not in (7, 9))
        return self.order.of(head.order, 1 << head.order_bits, is_reference)


def _hvcc_parameters(extradata: bytes) -> list[bytes]:
    """The parameter sets of an HEVCDecoderConfigurationRecord (ISO 14496-15, 8.3.3.1)."""
    units, position = [], 23
    for _ in range(extradata[22]):
        count, position = int.from_bytes(extradata[position + 1 : position + 3], "big"), position + 3
        for _ in range(count):
            size = int.from_bytes(extradata[position : position + 2], "big")
            units.append(extradata[position + 2 : position + 2 + size])
            position += 2 + size
    return [unit for unit in units if len(unit) > 2]
