"""Decodes chosen frames of a video file, and refuses those that are not intact.

Only the packets from the last key frame before the first wanted frame to the last wanted frame are decoded. H.264
frames that are neither wanted nor referenced are skipped, which leaves the others bit-identical. A frame is identified
by the packet that it was decoded from.

A container may mark packets as key frames that are none. So decoding goes on only if the first frame that comes out is
the key frame; otherwise it starts again from an earlier one, and at last from the start of the file.

Decoders put out frames that refer to a damaged or missing one, mostly without a word. So after damage, all frames up to
the next intact key frame are refused.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np
from av.video.frame import PictureType

from flperf.data.containers import DECODE_ERRORS, decode, describe, packet_of
from flperf.data.video_file import VideoFile

ENTRIES = 2  # key frames from which decoding is tried before the start of the file
END = -1  # position of no packet: the decoder is drained


class WrongOrder(Exception):
    """Frames came out in another order than their presentation times; the file's frames have to be counted."""


class _Shown(NamedTuple):
    """A frame in the order in which the decoder put it out."""

    packet: int
    frame: int | None  # its index
    is_clean_entry: bool
    is_wanted: bool


def decode_frames(file: VideoFile, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) of the wanted frames, whose indices ascend. If decoding starts again, frames come again; the last
    ones count. Raises `ValueError` if a frame can't be decoded intact, `WrongOrder`, and `IndexError` for an index that
    the file doesn't have."""
    if not wanted:
        return
    check_indices(file, wanted)
    timeline = file.timeline
    entries = np.flatnonzero(timeline.is_entry[: wanted[0] + 1])[: -ENTRIES - 1 : -1].tolist()
    for entry in [*(entry for entry in entries if timeline.packets[entry]), None]:
        attempt = _Attempt(file, wanted, entry)
        yield from attempt.frames()
        fault = attempt.fault()
        if not fault:
            return
    raise ValueError(fault)


def check_indices(file: VideoFile, indices: Sequence[int]) -> None:
    """Raise `IndexError` if the file doesn't have all of these frames."""
    for index in indices:
        if not 0 <= index < len(file.timeline):
            raise IndexError(f"{file.path} has frames 0 to {len(file.timeline) - 1}, and no frame {index}")


class _Attempt:
    """Decodes a file from a key frame on, or from the start, until all wanted frames have come out. `remaining` are
    those that have not."""

    def __init__(self, file: VideoFile, wanted: list[int], entry: int | None):
        self.file, self.context, self.entry = file, file.context, entry
        self.start = 0 if entry is None else int(file.timeline.packets[entry])
        self.wanted, self.remaining = wanted, set(wanted)
        self.index_of = file.timeline.index_of()
        self.packets = {int(file.timeline.packets[index]) for index in wanted}
        self.counts = entry is None and bool(file.timeline.counted)
        # index → last packet that the decoder needs before it can put out the frame
        self.needed = None if file.timeline.counted else np.maximum.accumulate(file.timeline.packets).tolist()
        self.skips = file.context.name == "h264" and not self.counts
        self.damage: dict[int, str] = {}  # packet → what is wrong with it
        self.shown: list[_Shown] = []
        self.last = -1  # index of the last frame that came

    def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """The wanted frames. Stops early if decoding turns out not to start at a key frame."""
        position, begun, counter = self.start, self.entry is None, itertools.count()
        for position, packet in self._packets():
            for frame in self._decode(position, packet):
                source = packet_of(frame)
                index = next(counter) if self.counts else self.index_of.get(source)
                if not self._note(frame, source, index, position):
                    return self._drain(position)
                begun = begun or (source == self.start and self.file.is_entry(frame))
                if not begun and not self._leads(index):
                    return self._drain(position)
                if index is not None and index in self.remaining:
                    self.remaining.remove(index)
                    yield index, frame
            if not self.remaining:
                break
        self._drain(position)

    def _packets(self) -> Iterator[tuple[int, av.Packet | None]]:
        """(position, packet) to decode, and the end. Damage behind the wanted frames could mix up their order."""
        last = END if self.needed is None else self.needed[self.wanted[-1]]
        for position, packet in self.file.packets_from(self.start):
            if END < last < position and self.file.damage(position, packet):
                break
            yield position, packet
        yield END, None

    def _decode(self, position: int, packet: av.Packet | None) -> list[av.VideoFrame]:
        if packet is not None:
            if self.skips:
                self.context.skip_frame = "DEFAULT" if position in self.packets else "NONREF"
            damage = self.file.damage(position, packet)
            if damage:
                self.damage[position] = damage
        try:
            return decode(self.context, position, packet)
        except DECODE_ERRORS as error:
            self.damage[position] = describe(error)
            return []

    def _note(self, frame: av.VideoFrame, packet: int, index: int | None, position: int) -> bool:
        """Keep what `fault` needs; returns whether frames come in order. Raises `WrongOrder` if presentation times gave
        their order, and no damage has changed it."""
        if frame.is_corrupt:
            self.damage.setdefault(packet, "it is damaged")
        is_in_order = self._is_in_order(index, position)
        is_entry = self.file.is_entry(frame) and frame.pict_type == PictureType.I and packet not in self.damage
        self.shown.append(_Shown(packet, index, is_entry, index in self.remaining))
        if not is_in_order and not self.file.timeline.counted and not self.damage:
            self.file.reset()
            raise WrongOrder
        return is_in_order

    def _is_in_order(self, index: int | None, position: int) -> bool:
        """Whether a frame comes after all those before it."""
        if index is None:
            return True
        last, self.last = self.last, index
        is_early = self.needed is not None and position != END and self.needed[index] > position
        return last < index and not is_early

    def _leads(self, index: int | None) -> bool:
        """Whether a frame is shown before the first key frame, though it was decoded after it."""
        return index is not None and self.entry is not None and index < self.entry

    def _drain(self, position: int) -> None:
        """Take out what the decoder still holds. Frames that have come may refer to it, and it may be damaged."""
        if position != END:
            for frame in self._decode(END, None):
                packet = packet_of(frame)
                self._note(frame, packet, None if self.counts else self.index_of.get(packet), END)
        self.file.reset()

    def fault(self) -> str:
        """What is wrong with the wanted frames: one has not come, is damaged, or may refer to a damaged frame: one that
        was decoded before it, and after the last intact key frame that was shown before it. Empty if they are right."""
        if self.remaining:
            return f"frame {min(self.remaining)} can't be decoded{self._cause()}"
        entry: _Shown | None = None
        for shown in self.shown:
            entry = shown if shown.is_clean_entry else entry
            if not shown.is_wanted:
                continue
            if shown.packet in self.damage:
                return f"frame {shown.frame} can't be decoded intact: {self.damage[shown.packet]}"
            for packet, damage in self.damage.items():
                if packet < shown.packet and self._spreads(packet, entry):
                    return f"frame {shown.frame} follows damage, with no key frame between: {damage}"
        return ""

    def _spreads(self, packet: int, entry: _Shown | None) -> bool:
        """Whether frames after a key frame may refer to a damaged packet. They don't refer to what is shown before the
        key frame."""
        if packet < 0 or not self.file.infos[packet].content.is_reference:
            return False
        if entry is None or entry.frame is None:
            return True
        return packet > entry.packet and self.index_of.get(packet, entry.frame + 1) > entry.frame

    def _cause(self) -> str:
        """What may have made decoding fail, as the end of a sentence."""
        return f": {next(iter(self.damage.values()))}" if self.damage else ""
