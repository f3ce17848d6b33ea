"""The decoder for CPUs: PyAV, one single-threaded decoder a clip, many clips at once.

A file is demuxed from end to end, which is cheap and shows which packet holds which frame. Only the packets from the
last key frame before the first wanted frame to the last wanted frame are decoded. H.264 frames that are neither wanted
nor referenced are skipped, which leaves the others bit-identical. Each wanted frame, or a few small ones together, is
resized while it is still in the processor's cache. The packets of a usual clip are kept in memory in between. Those of
a long video are not: it is demuxed again from the start of the file. Seeking would be quicker, but not every container
reports where it arrived.
"""

import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import av
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from flperf.data.loader import Reader
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import ClipRequest, FrameSampling
from flperf.data.unreadable import BadClip

DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, RuntimeError)  # of a damaged file
KEPT_BYTES = 2**24  # of packets that a thread keeps between demuxing and decoding
# Of frames resized by one call, which has an overhead of 0.15 ms. More would not stay in the processor's cache.
RESIZED_BYTES = 2**18


class PyAVReader(Reader):
    """Reads clips of video files: uint8 `f h w c`."""

    def __init__(self, paths: list[str], frame_sampling: FrameSampling, preprocessing: Preprocessing):
        self.paths, self.frame_sampling, self.preprocessing = paths, frame_sampling, preprocessing
        self.shape = (frame_sampling.n_frames, *preprocessing.size, 3)

    def read(self, request: ClipRequest, slot: Tensor) -> None:
        read_clip(self.paths[request.clip], self.frame_sampling, request.uniform, self.preprocessing, slot)


def read_clip(
    path: str, frame_sampling: FrameSampling, uniform: float, preprocessing: Preprocessing, out: Tensor
) -> None:
    """Decode the sampled frames of a file into `out`, uint8 `f h w c`. Raises `BadClip` if any of them can't be
    decoded."""
    try:
        with open_video(path) as container:
            packets = Packets(path, container, video_stream(container))
            if not packets.length:
                raise ValueError("no video frames")
            _write_frames(packets, frame_sampling.frames(packets.length, uniform), preprocessing, out)
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None


def frame_rate(path: str) -> float:
    """Mean frames a second of a file. Raises `BadClip` if it is unknown."""
    try:
        with open_video(path) as container:
            rate = video_stream(container).average_rate
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None
    if not rate:
        raise BadClip(path, "has no frame rate")
    return float(rate)


def open_video(path: str) -> av.container.InputContainer:
    """Open a regular file only: FFmpeg would take `a:b.webm` for a URL, and wait for ever at a pipe."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("is not a file")
    return av.open(os.path.abspath(path), metadata_errors="ignore")


def video_stream(container) -> av.VideoStream:
    """The first video stream, leaving out cover pictures of audio files."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise ValueError("no decoder for its codec")
            stream.codec_context.thread_count = 1
            return stream
    raise ValueError("no video stream")


def is_shown(packet: av.Packet) -> bool:
    """Whether a packet becomes a frame. Packets before an edit list's start and VP8's hidden golden frames do not."""
    if packet.stream.codec_context.name == "vp8":
        return bool(memoryview(packet)[0] & 0x10)  # show_frame: RFC 6386, 9.1
    return not packet.is_discard


def describe(error: Exception) -> str:
    """A decoding error as one reason: its message and type."""
    return f"{getattr(error, 'strerror', None) or error} ({type(error).__name__})"


class PacketInfo(NamedTuple):
    """What is kept of every packet."""

    pts: int | None
    is_keyframe: bool
    is_shown: bool


class Packets:
    """The non-empty packets of a video stream in the order of the file; `length` of them become frames."""

    def __init__(self, path: str, container, stream: av.VideoStream):
        self.path, self.context = path, stream.codec_context
        self.infos: list[PacketInfo] = []
        self.kept: list[av.Packet] | None = []  # None for a long video
        size = 0
        for packet in demux(container, stream):
            self.infos.append(PacketInfo(packet.pts, packet.is_keyframe, is_shown(packet)))
            size += packet.size
            if size > KEPT_BYTES:
                self.kept = None
            elif self.kept is not None:
                self.kept.append(packet)
        self.length = sum(info.is_shown for info in self.infos)

    def frame_indices(self) -> dict[int | None, int]:
        """Presentation time → index of the frame. Empty if times are missing or repeated, as in some AVI files: a
        frame's index is then its position in the decoder's output, and everything must be decoded."""
        shown = [info.pts for info in self.infos if info.is_shown]
        times = {time for time in shown if time is not None}
        if len(times) < len(shown):
            return {}
        return {time: index for index, time in enumerate(sorted(times))}

    def key_frame(self, index_of: dict[int | None, int], first: int) -> int:
        """Position of the packet of the last key frame that is shown no later than frame `first`; 0 if there is
        none."""
        keys = [
            position
            for position, info in enumerate(self.infos)
            if info.is_keyframe and index_of.get(info.pts, first + 1) <= first
        ]
        return keys[-1] if keys else 0

    def starting_at(self, position: int) -> Iterator[av.Packet]:
        """The packets from a position on."""
        if self.kept is not None:
            yield from self.kept[position:]
            return
        with open_video(self.path) as container:
            yield from itertools.islice(demux(container, video_stream(container)), position, None)


def demux(container, stream) -> Iterator[av.Packet]:
    """The non-empty packets of a stream. A packet of a stream that appears late in the file, as a damaged byte of a
    transport stream makes it appear, is passed over, as `ffmpeg` does: PyAV raises LookupError for it or not, depending
    on what lies in memory behind its list of streams."""
    while True:
        try:
            yield from (packet for packet in container.demux(stream) if packet.size)
            return
        except LookupError:
            continue


def _write_frames(packets: Packets, frames: list[int], preprocessing: Preprocessing, out: Tensor) -> None:
    """Write frames into `out`. Their indices are in presentation order and ascend; a short file repeats the last."""
    slots = {frame: slot for slot, frame in reversed(list(enumerate(frames)))}  # index → its first position in `out`
    for group in _groups(_decode(packets, slots)):
        indices, pixels = zip(*group, strict=True)
        together = torch.stack(pixels) if len(pixels) > 1 else pixels[0][None]
        for index, resized in zip(indices, preprocessing.apply(together), strict=True):
            out[slots[index]].copy_(resized)
    out[len(slots) :] = out[len(slots) - 1]


def _groups(frames: Iterator[tuple[int, av.VideoFrame]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Decoded frames as uint8 `h w c`, grouped by size into what one call resizes."""
    reformatter, group = VideoReformatter(), []
    for index, frame in frames:
        pixels = torch.from_numpy(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())
        if group and (pixels.shape != group[0][1].shape or (len(group) + 1) * pixels.nbytes > RESIZED_BYTES):
            yield group
            group = []
        group.append((index, pixels))
    yield group


def _decode(packets: Packets, wanted) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame) for every wanted index, or raise."""
    context, remaining, decoded = packets.context, set(wanted), itertools.count()
    index_of = packets.frame_indices()
    start = packets.key_frame(index_of, min(wanted)) if index_of else 0
    skipping = index_of and context.name == "h264"
    for packet in itertools.chain(packets.starting_at(start), [None]):  # None: the end, at which the decoder is drained
        if skipping and packet:
            context.skip_frame = "DEFAULT" if index_of.get(packet.pts) in remaining else "NONREF"
        for frame in context.decode(packet):
            index = index_of.get(frame.pts) if index_of else next(decoded)
            if index is not None and index in remaining:
                if frame.is_corrupt:
                    raise ValueError(f"frame {index} is damaged")
                remaining.remove(index)
                yield index, frame
        if not remaining:
            return
    raise ValueError(f"frame {min(remaining)} can't be decoded")
