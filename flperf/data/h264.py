"""Packets of H.264, which belong to one picture each (ITU-T H.264, chapters 7 and 8)."""

from dataclasses import dataclass
from typing import NamedTuple

from flperf.data.nal_units import (
    NO_PICTURE,
    ORIENTATION,
    RECOVERY_POINT,
    SLICE_HEAD,
    Bits,
    DisplayOrder,
    NalScanner,
    read_messages,
    read_orientation,
)
from flperf.data.packet_content import DAMAGED_HEAD, Content

MISSING_REFERENCE = "a frame that it refers to is missing"
NO_TYPE = {0, *range(22, 32)}  # of units; encoders write no packet of them


@dataclass(frozen=True)
class SequenceParameters:
    """What a sequence parameter set of H.264 says of the pictures that use it (7.3.2.1.1)."""

    identifier: int
    separate_planes: bool
    frame_number_bits: int
    order_type: int
    order_bits: int
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
        order_type, order_bits = bits.golomb(), 0
        if order_type == 0:
            order_bits = bits.golomb() + 4
        elif order_type == 1:
            bits.read(1)
            bits.signed_golomb(), bits.signed_golomb()
            for _ in range(bits.golomb()):
                bits.signed_golomb()
        bits.golomb()
        has_gaps = bool(bits.read(1))
        bits.golomb(), bits.golomb()
        has_fields = not bits.read(1)
        return cls(identifier, separate_planes, frame_number_bits, order_type, order_bits, has_gaps, has_fields)


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


class _Slice(NamedTuple):
    """The head of a picture's first slice of H.264 (7.3.3)."""

    sequence: SequenceParameters
    number: int  # frame_num
    is_field: bool
    order: int | None  # last bits of the picture order count; None if it has none


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
        self.order = DisplayOrder()
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
            return DAMAGED_HEAD
        if not kinds and any(unit[0] & 31 in NO_TYPE for unit in units or [b"\0"]):
            return NO_PICTURE
        is_reset, is_reference = bool(kinds & 1 << 5), bool(references)
        damage = self._compare(head, is_reset, is_reference) if head else ""
        order = self._display_order(head, is_reset, is_reference) if head else None
        # a recovery point without delay: recovery_frame_cnt is 0
        is_entry = is_reset or messages.get(RECOVERY_POINT, b"\0")[0] >> 7 == 1
        is_known = frames == 0 or frames == 1 and head is not None and not head.is_field
        orientation = read_orientation(messages[ORIENTATION]) if ORIENTATION in messages else None
        return Content(frames if is_known else None, is_entry, damage, is_reference, parameters, orientation, order)

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
        is_field = sequence.has_fields and bool(bits.read(1))
        if is_field or sequence.order_type:
            return _Slice(sequence, number, is_field, None)
        if unit[0] & 31 == 5:
            bits.golomb()
        return _Slice(sequence, number, is_field, bits.read(sequence.order_bits))

    def _compare(self, head: _Slice, is_reset: bool, is_reference: bool) -> str:
        """Compare the number of a frame with that of the last reference (7.4.3, frame_num)."""
        last = self.reference
        if is_reference:
            self.reference = head.number
        if is_reset or last is None or head.sequence.has_gaps:
            return ""
        following = (last + 1) % (1 << head.sequence.frame_number_bits)
        return "" if head.number in (last, following) else MISSING_REFERENCE

    def _display_order(self, head: _Slice, is_reset: bool, is_reference: bool) -> int | None:
        if is_reset:
            self.order.reset()
        if head.order is not None:
            return self.order.of(head.order, 1 << head.sequence.order_bits, is_reference)
        if head.sequence.order_type == 2:  # that of decoding
            self.order.latest += 1
            return self.order.latest
        return None


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
