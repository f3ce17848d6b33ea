"""NAL units, of which packets of H.264 and HEVC consist."""

import math
from abc import ABC, abstractmethod

from av.buffer import Buffer

from flperf.data.packet_content import Content, Orientation


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

    def are_overwritten(self, packet: Buffer) -> bool:
        """Whether a unit holds three zeros in a row, which no encoder writes."""
        content = bytes(packet)
        if content.find(b"\0\0\0", self.length_size or 1) < 0:  # most packets end here
            return False
        return any(b"\0\0\0" in unit.rstrip(b"\0") for unit in self.of(content) or [])


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


SLICE_HEAD = 20  # bytes of a slice that hold what is read of its header
# Whether others refer to it is not known, but they miss it: in H.264 by their numbers, in HEVC the decoder says so
NO_PICTURE = Content(1, damage="it holds no picture", is_reference=False)
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
        return Content(1, damage="its NAL units don't fit") if units is None else self.scan(units)

    @abstractmethod
    def scan(self, units: list[bytes]) -> Content:
        """What the units of a packet say about it. A damaged packet counts as a frame, so that later ones keep their
        numbers. Raises `ValueError` or `IndexError` if a unit ends too early."""


class DisplayOrder:
    """Picture order counts in full, from their last bits (H.264, 8.2.1.1; HEVC, 8.3.1), and from one sequence to the
    next."""

    def __init__(self) -> None:
        self.start = self.latest = 0  # of the sequence, of all pictures
        self.reference = 0  # count of the last reference

    def reset(self) -> None:
        """A sequence begins: all its pictures are shown after those before."""
        self.start, self.reference = self.latest + 2**17, 0  # counts may be negative

    def of(self, last_bits: int, size: int, is_reference: bool) -> int:
        """The place of a picture. `size` is the number of values of its last bits."""
        ahead = (last_bits - self.reference) % size  # the nearest to the reference, or as far ahead as behind
        count = self.reference + (ahead if 2 * ahead <= size else ahead - size)
        if is_reference:
            self.reference = count
        self.latest = max(self.latest, self.start + count)
        return self.start + count
