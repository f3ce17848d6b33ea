"""A video file, opened once: its stream, its packets, and which of them becomes which frame.

Frame i is the i-th frame that decoding the file from start to end puts out. For most files the packets alone show which
one that is, and when it is shown. Otherwise the file is decoded once from start to end, and its frames are counted:
where presentation times are missing, repeated or contradict the decoder, where a packet may hold half a frame or none,
where the file begins between two key frames, and where it is torn.

A file is demuxed from end to end, which is cheap. The packets of a usual clip are kept in memory; a long video is
demuxed again when it is decoded. Seeking would be quicker, but not every container reports where it arrived.
"""

import heapq
import itertools
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import av
import numpy as np

from flperf.data.bitstream import REORDERED, Scan, open_scanner, open_zero_search, scan_packet
from flperf.data.containers import DECODE_ERRORS, decode, demux, open_container, open_context, packet_of, video_stream
from flperf.data.h264 import MISSING_REFERENCE
from flperf.data.packet_content import Content, Orientation

TS_PACKETS = (188, 192, 204)  # sizes of a transport stream's packets
KEPT_BYTES = 2**24  # of packets that a thread keeps between demuxing and decoding
COUNTED_FRAMES = 2**23  # of files whose timelines are kept (13 bytes a frame), so that they are counted only once
# whose header holds the duration; elsewhere FFmpeg estimates it
WITH_DURATION = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "avi", "asf")
CUT_SHORT = 0.02  # a file is cut short if its header promises so much more, and three frames more, than is there
DEFAULT_RATE = 25.0  # of streams without any time, as in FFmpeg
CONTRADICTION = "presentation times contradict the decoder"
# whose decoders mark a frame as a key frame only if decoding may start at it. That of APNG marks others too
KEYED_CODECS = (
    *("h264", "hevc", "vvc", "vp8", "vp9", "av1", "theora", "vp6", "vp6f", "mpeg1video", "mpeg2video", "mpeg4"),
    *("msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "wmv3", "vc1", "h263", "flv1"),
    *("rv10", "rv20", "rv30", "rv40", "ffv1", "cinepak", "zmbv", "snow"),
)


class PacketInfo(NamedTuple):
    """What is kept of every packet."""

    pts: int | None
    is_discarded: bool  # decoded but not shown: an edit list cuts it off
    is_torn: bool
    content: Content


@dataclass(frozen=True)
class Timeline:
    """The frames of a file, in the order in which they are shown."""

    packets: np.ndarray  # int32 [frames]: position of the packet that becomes the frame; -1 if unknown
    times: np.ndarray  # float64 [frames]: seconds since the first frame, strictly increasing
    is_entry: np.ndarray  # bool [frames]: decoding may start at the frame
    counted: str = ""  # why the file had to be decoded to count its frames; empty if the packets showed it

    def __len__(self) -> int:
        return len(self.packets)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last, which is taken to last as long as the mean frame; 0 for
        a single frame."""
        frames = len(self)
        return float(self.times[-1]) * frames / (frames - 1) if frames > 1 else 0.0

    def index_of(self) -> dict[int, int]:
        """Packet → index of its frame, for packets that become one frame."""
        packets, first, counts = np.unique(self.packets, return_index=True, return_counts=True)
        return dict(zip(packets[counts == 1].tolist(), first[counts == 1].tolist(), strict=True))


class VideoFile:
    """An open file; use it as a context manager. One thread uses it. Raises one of DECODE_ERRORS if it is no video."""

    def __init__(self, path: str):
        self.path = path
        self.container = open_container(path)
        try:
            self.stream = video_stream(self.container)
            self.context = open_context(self.stream)
            self.size = self.context.width, self.context.height
            self.reorder_depth = self.context.reorder_depth
            self.has_key_frames = _has_key_frames(self.context)
            self.scan = _scanner(self.context)
            self.is_overwritten = open_zero_search(self.scan)
            self.infos: list[PacketInfo] = []
            self.kept: list[av.Packet] | None = []  # None for a long video
            self.last_byte = 0  # where the last packet begins
            self._read_packets()
            self.timeline = self._timeline()
            if not len(self.timeline):
                raise ValueError("no frame can be decoded" if self.infos else "no video frames")
        except BaseException:
            self.container.close()
            raise

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *_) -> None:
        self.container.close()

    def _read_packets(self) -> None:
        size = 0
        for packet in demux(self.container, self.stream):
            content = scan_packet(self.scan, packet)
            self.infos.append(PacketInfo(packet.pts, packet.is_discard, packet.is_corrupt, content))
            self.last_byte = packet.pos or 0
            size += packet.size
            if size > KEPT_BYTES:
                self.kept = None
            elif self.kept is not None:
                self.kept.append(packet)

    def is_entry(self, frame: av.VideoFrame) -> bool:
        """Whether decoding may start at a frame. For VP9, the decoder also marks those that keep some references."""
        is_key = self.has_key_frames and bool(frame.key_frame)
        if is_key and self.context.codec.canonical_name == "vp9":
            return packet_of(frame) >= 0 and self.infos[packet_of(frame)].content.is_entry
        return is_key

    @cached_property
    def torn(self) -> set[int]:
        """The packets of which a part is lost. In a transport stream the mark is on the packet before, and it is also
        there where recordings were joined: before a key frame. If the stream is cut, the last packet has no mark."""
        marked = {position for position, info in enumerate(self.infos) if info.is_torn}
        if self.container.format.name != "mpegts":
            return marked
        entries = [info.content.is_entry for info in self.infos] + [False, False]
        torn = {position + 1 for position in marked if entries[position + 1] or not entries[position + 2]}
        rest = os.path.getsize(self.path) - self.last_byte
        is_cut = all(rest % size for size in TS_PACKETS)
        return torn | {len(self.infos) - 1} if is_cut else torn

    @cached_property
    def first_size(self) -> tuple[int, int]:
        """Width and height of the first frame, as it is stored."""
        with VideoFile(self.path) as other:
            frame = other.first_frame()
        return frame.width, frame.height

    @cached_property
    def orientations(self) -> list[tuple[int, Orientation]]:
        """(index of the first frame, orientation) by the stream itself, in ascending order. The container may have
        another."""
        if not any(info.content.orientation for info in self.infos):
            return []
        index_of, found = self.timeline.index_of(), []
        for position, info in enumerate(self.infos):
            if info.content.orientation and position in index_of:
                found.append((index_of[position], info.content.orientation))
        return sorted(found)

    def orientation(self, index: int) -> Orientation | None:
        """How the stream says that a frame is turned; None if it doesn't say."""
        found = None
        for first, orientation in self.orientations:
            found = orientation if first <= index else found
        return found

    @property
    def has_one_size(self) -> bool:
        """Whether all frames have the parameters of the first."""
        return len({info.content.parameters for info in self.infos} - {b""}) <= 1

    def reset(self) -> None:
        """Bring the decoder into its first state."""
        self.context.flush_buffers()
        self.context.skip_frame = "DEFAULT"
        self.context.reorder_depth = self.reorder_depth  # it grows where frames turn out to be in another order

    @cached_property
    def has_edits(self) -> bool:
        """Whether an edit list cuts off packets that have to be decoded."""
        return any(info.is_discarded for info in self.infos)

    @property
    def promised_seconds(self) -> float:
        """The duration of the stream by its header; 0 if the header has none."""
        stream = self.stream
        if self.has_edits or self.container.format.name not in WITH_DURATION:
            return 0.0
        by_time = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        by_frames = float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
        by_file = self.container.duration / av.time_base if self.container.duration and self._is_alone else 0.0
        return max(by_time, by_frames, by_file)

    @property
    def _is_alone(self) -> bool:
        """Whether no other stream can be longer than this one."""
        return len(self.container.streams) == 1

    @property
    def is_cut_short(self) -> bool:
        """Whether the header promises more than is there."""
        frames, duration = len(self.timeline), self.timeline.duration
        frame = duration / frames if frames > 1 else 1 / float(self.stream.average_rate or DEFAULT_RATE)
        return self.promised_seconds - duration > max(CUT_SHORT * duration, 3 * frame)

    def packets_from(self, position: int) -> Iterator[tuple[int, av.Packet]]:
        """(position, packet) from a position on."""
        if self.kept is not None:
            yield from enumerate(self.kept[position:], position)
            return
        with open_container(self.path) as container:
            yield from itertools.islice(enumerate(demux(container, video_stream(container))), position, None)

    def damage(self, position: int, packet: av.Packet) -> str:
        """What is known to be wrong with a packet without decoding it; else empty."""
        found = self.infos[position].content.damage
        if found == MISSING_REFERENCE and self.has_edits:  # the list may lead to a frame of another number
            found = ""
        if not found and self.is_overwritten and self.is_overwritten(packet):
            return "a part of it is zeros"
        return found or ("a part of it is lost" if position in self.torn else "")

    @property
    def is_damaged(self) -> bool:
        """Whether something is known to be wrong with a packet without decoding it. Those of a long video are not read
        for that."""
        if any(info.content.damage or info.is_torn for info in self.infos):
            return True
        return any(self.damage(position, packet) for position, packet in enumerate(self.kept or []))

    def first_frame(self) -> av.VideoFrame:
        """The first frame that the decoder puts out. Raises one of DECODE_ERRORS if there is none."""
        errors: list[Exception] = [ValueError("no frame can be decoded")]
        with closing(self._decoded(errors)) as frames:
            for frame in frames:
                return frame
        raise errors[-1]

    def _decoded(self, errors: list[Exception]) -> Generator[av.VideoFrame, None, None]:
        """All frames from start to end. What packets can't be decoded for is added to `errors`."""
        try:
            for position, packet in itertools.chain(self.packets_from(0), [(-1, None)]):
                try:
                    frames = decode(self.context, position, packet)
                except DECODE_ERRORS as error:
                    errors.append(error)
                    continue
                yield from frames
        finally:
            self.reset()

    def _timeline(self) -> Timeline:
        found = self._timeline_of_packets()
        return found if isinstance(found, Timeline) else self._counted_timeline(found)

    def count_frames(self) -> None:
        """Decode the file to count its frames, since they came in another order than their times are."""
        self.timeline = self._counted_timeline(CONTRADICTION)

    def _counted_timeline(self, reason: str) -> Timeline:
        """The timeline by decoding, which is done once for each file."""
        timeline = _COUNTED.get(self._key())
        if timeline is None:
            timeline = self._count(reason)
            _COUNTED.put(self._key(), timeline)
        return timeline

    def _key(self) -> tuple[str, int, int]:
        status = os.stat(self.path)
        return self.path, status.st_size, status.st_mtime_ns

    def _timeline_of_packets(self) -> Timeline | str:
        """The timeline, or the reason why the packets don't show it."""
        reordered = self.context.codec.canonical_name in REORDERED
        obstacle = _obstacle(self.infos, self.reorder_depth if reordered else None)
        if obstacle:
            return obstacle
        shown = [position for position, info in enumerate(self.infos) if info.content.frames and not info.is_discarded]
        if reordered:
            shown.sort(key=lambda position: cast(int, self.infos[position].pts))
        entries = [self.infos[position].content.is_entry and self.has_key_frames for position in shown]
        times = self._seconds([self.infos[position].pts for position in shown])
        return Timeline(np.array(shown, np.int32), times, np.array(entries, bool))

    def _count(self, reason: str) -> Timeline:
        """Decode the file from start to end."""
        packets, times, entries = [], [], []
        errors: list[Exception] = []
        for frame in self._decoded(errors):
            packets.append(packet_of(frame))
            times.append(frame.pts)
            entries.append(packets[-1] >= 0 and self.is_entry(frame) and not frame.is_corrupt)
        if errors and not packets:
            raise errors[0]
        return Timeline(np.array(packets, np.int32), self._seconds(times), np.array(entries, bool), reason)

    def _seconds(self, pts: list[int | None]) -> np.ndarray:
        """Times of frames since the first one; evenly spaced if any is missing or does not increase."""
        if None not in pts and self.stream.time_base:
            times = (np.array(pts, np.int64) - (pts[0] if pts else 0)) * float(self.stream.time_base)
            if (np.diff(times) > 0).all():
                return times
        rate = self.stream.average_rate or self.stream.guessed_rate or DEFAULT_RATE
        return np.arange(len(pts)) / float(rate)


class _Counted:
    """Counted timelines by path, size and time of change of their files; the oldest are forgotten."""

    def __init__(self) -> None:
        self.timelines: dict[tuple[str, int, int], Timeline] = {}
        self.frames = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[str, int, int]) -> Timeline | None:
        return self.timelines.get(key)

    def put(self, key: tuple[str, int, int], timeline: Timeline) -> None:
        with self.lock:
            self.frames += len(timeline) - len(self.timelines.pop(key, ()))
            self.timelines[key] = timeline
            while self.frames > COUNTED_FRAMES:
                self.frames -= len(self.timelines.pop(next(iter(self.timelines))))


_COUNTED = _Counted()


def _has_key_frames(context: av.VideoCodecContext) -> bool:
    """Whether decoding may start at the frames that the decoder calls key frames. A palette may have come before."""
    codec = context.codec
    return (codec.intra_only or codec.canonical_name in KEYED_CODECS) and context.pix_fmt != "pal8"


def _scanner(context: av.VideoCodecContext) -> Scan | None:
    try:
        return open_scanner(context.codec.canonical_name, context.codec.intra_only, context.extradata)
    except (ValueError, IndexError):  # damaged extradata
        return None


def _obstacle(infos: list[PacketInfo], reorder_depth: int | None) -> str:
    """Why the packets alone don't show which of them becomes which frame; empty if they do. `reorder_depth` is the
    number of frames that the decoder holds back to bring them into order; None if it doesn't reorder them."""
    if any(info.content.frames is None for info in infos):
        return "a packet may become no frame, or half of one"
    if any(info.is_torn for info in infos):
        return "packets are torn"
    frames = [info for info in infos if info.content.frames]
    if any(info.content.frames != 1 for info in frames):
        return "a packet holds several frames"
    if not frames or not (frames[0].content.is_entry or frames[0].content.damage):
        return "it does not begin with a key frame"
    return "" if reorder_depth is None else _obstacle_of_times(frames, reorder_depth)


def _obstacle_of_times(frames: list[PacketInfo], reorder_depth: int) -> str:
    """Why presentation times don't show the order in which packets become frames."""
    shown = [info for info in frames if not info.is_discarded]
    times = [info.pts for info in shown if info.pts is not None]
    if len(set(times)) < len(shown) or any(info.pts is None for info in frames):
        return "presentation times are missing or repeated"
    if times and min(times) < frames[0].pts:
        return "it begins with frames that refer to earlier ones"
    if _jumps(frames):
        return "an edit list jumps within it"
    orders = [info.content.order for info in shown if info.content.order is not None]
    if len(orders) < len(shown) and reorder_depth and len(times) > 1 and times == sorted(times):
        return "presentation times are those of decoding"
    is_whole = len(orders) == len(shown) and _can_be_ordered(orders, reorder_depth)  # else a key frame is missing
    by_time = [order for _, order in sorted(zip(times, orders, strict=False))]
    if is_whole and by_time != sorted(orders) or not _can_be_ordered(times, reorder_depth):
        return CONTRADICTION
    return ""


def _jumps(frames: list[PacketInfo]) -> bool:
    """Whether an edit list leads from one part of a file to another: back to a key frame, whose frames are decoded and
    not shown."""
    if not any(info.is_discarded for info in frames):
        return False
    latest: int | None = None  # time shown
    last = -1  # place of a key frame in the order of display
    for info in frames:
        time, order = cast(int, info.pts), info.content.order
        if info.content.is_entry:
            if info.is_discarded and latest is not None and time < latest or order is not None and order <= last:
                return True
            last = last if order is None else order
        if not info.is_discarded:
            latest = time if latest is None else max(latest, time)
    return False


def _can_be_ordered(times: list[int], depth: int) -> bool:
    """Whether a decoder that holds back so many frames puts them out by time."""
    held: list[int] = []
    last = min(times, default=0)
    for time in times:
        heapq.heappush(held, time)
        if len(held) > depth:
            released = heapq.heappop(held)
            if released < last:
                return False
            last = released
    return True
