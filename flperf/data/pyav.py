"""The decoder for CPUs: PyAV, one single-threaded decoder a clip, many clips at once.

A file is demuxed from end to end, which is cheap and tells which packet is which frame; then only the packets between
the last key frame before the window and its end are decoded, and H.264 frames that are neither wanted nor referenced
are skipped undecoded, which leaves the others bit-identical. Every wanted frame, or a few small ones together, is
resized while it is still in the processor's cache. The packets of a usual clip are kept in between; those of a long
video are not, and are demuxed again up to the window's end, from the start of the file: seeking would be quicker, but
not every container says where it arrived.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from flperf.data.annotations import Annotations
from flperf.data.prefetch import BadClip, Buffers, filled_buffers
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import Batches, ClipBatch, ClipRequest, FrameSampling

# What a damaged file makes FFmpeg, PyAV, NumPy and torch raise: PyAV looks streams up by their number, also those
# that turn up late.
DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, RuntimeError, LookupError)
KEPT_BYTES = 2**24  # of packets between the two looks at a file; each thread keeps no more
# of frames resized by one call, which costs 0.15 ms by itself; more would leave the processor's cache
RESIZED_BYTES = 2**18


def read_batches(
    batches: Iterable[list[ClipRequest]],
    sampler,
    annotations: Annotations,
    window: FrameSampling,
    preprocessing: Preprocessing,
    threads: int,
    prefetch: int,
    device: torch.device,
) -> Batches:
    """Yield the batches with their video as uint8 `b f h w c` in host memory, pinned where `device` is CUDA."""

    buffers = Buffers((window.n_frames, *preprocessing.size, 3), torch.uint8, device)

    def fill(draw: ClipRequest, slot: Tensor) -> None:
        read_clip(annotations.paths[draw.clip], window, draw.uniform, preprocessing, slot)

    for draws, video, skipped in filled_buffers(batches, sampler, buffers, fill, threads, prefetch):
        yield ClipBatch.of(draws, annotations.labels, video=video, skipped=skipped)


def read_clip(path: str, window: FrameSampling, uniform: float, preprocessing: Preprocessing, out: Tensor) -> None:
    """Decode one window of a file into `out`, uint8 `f h w c`; raises `BadClip` if any of its frames can't be had."""
    try:
        with open_video(path) as container:
            packets = Packets(path, container, video_stream(container))
            if not packets.length:
                raise ValueError("no video frames")
            _write_frames(packets, window.frames(packets.length, uniform), preprocessing, out)
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None


def frame_rate(path: str) -> float:
    """Frames a second of a file, on average; raises `BadClip` if that can't be had."""
    try:
        with open_video(path) as container:
            rate = video_stream(container).average_rate
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None
    if not rate:
        raise BadClip(path, "has no frame rate")
    return float(rate)


def open_video(path: str) -> av.container.InputContainer:
    """Open a file, and nothing but a file: FFmpeg would take `a:b.webm` for a URL, and wait at a pipe for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("is not a file")
    return av.open(os.path.abspath(path), metadata_errors="ignore")


def video_stream(container) -> av.VideoStream:
    """The first video stream that isn't the cover picture of an audio file."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise ValueError("no decoder for its codec")
            stream.codec_context.thread_count = 1
            return stream
    raise ValueError("no video stream")


def is_shown(packet: av.Packet) -> bool:
    """Whether a packet becomes a frame: not those before an edit list's start, nor VP8's hidden golden frames."""
    if packet.stream.codec_context.name == "vp8":
        return bool(memoryview(packet)[0] & 0x10)  # show_frame: RFC 6386, 9.1
    return not packet.is_discard


def describe(error: Exception) -> str:
    return f"{getattr(error, 'strerror', None) or error} ({type(error).__name__})"


class Mark(NamedTuple):
    """What is remembered of every packet."""

    pts: int | None
    is_keyframe: bool
    is_shown: bool


class Packets:
    """The packets of a video stream in the order of the file, none of them empty; `length` of them become frames."""

    def __init__(self, path: str, container, stream: av.VideoStream):
        self.path, self.context = path, stream.codec_context
        self.marks: list[Mark] = []
        self.kept: list[av.Packet] | None = []  # None for a long video
        size = 0
        for packet in demux(container, stream):
            self.marks.append(Mark(packet.pts, packet.is_keyframe, is_shown(packet)))
            size += packet.size
            if size > KEPT_BYTES:
                self.kept = None
            elif self.kept is not None:
                self.kept.append(packet)
        self.length = sum(mark.is_shown for mark in self.marks)

    def frame_indices(self) -> dict[int, int]:
        """Presentation time → index of the frame. Empty where times are missing or doubled, as in some AVI files:
        there a frame's index is its place in the decoder's output, and everything must be decoded."""
        times = [mark.pts for mark in self.marks if mark.is_shown]
        if None in times or len(set(times)) < len(times):
            return {}
        return {time: index for index, time in enumerate(sorted(times))}

    def key_frame(self, index_of: dict[int, int], first: int) -> int:
        """The place of the last key frame that is shown no later than frame `first`; 0 where there is none."""
        keys = [
            place
            for place, mark in enumerate(self.marks)
            if mark.is_keyframe and index_of.get(mark.pts, first + 1) <= first
        ]
        return keys[-1] if keys else 0

    def from_place(self, place: int) -> Iterator[av.Packet]:
        """The packets from a place on."""
        if self.kept is not None:
            yield from self.kept[place:]
            return
        with open_video(self.path) as container:
            yield from itertools.islice(demux(container, video_stream(container)), place, None)


def demux(container, stream) -> Iterator[av.Packet]:
    """The packets of a stream that hold something."""
    return (packet for packet in container.demux(stream) if packet.size)


def _write_frames(packets: Packets, frames: list[int], preprocessing: Preprocessing, out: Tensor) -> None:
    """Write frames (ascending indices in presentation order, the last one repeated in short files) into the slots of
    `out`."""
    slots = {frame: slot for slot, frame in reversed(list(enumerate(frames)))}  # each frame's first slot
    for group in _groups(_decode(packets, slots)):
        indices, pixels = zip(*group, strict=True)
        together = torch.stack(pixels) if len(pixels) > 1 else pixels[0][None]
        for index, resized in zip(indices, preprocessing.apply(together), strict=True):
            out[slots[index]].copy_(resized)
    out[len(slots) :] = out[len(slots) - 1]


def _groups(frames: Iterator[tuple[int, av.VideoFrame]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Decoded frames as uint8 `h w c`, as many of one size together as one call resizes."""
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
    skipping = index_of and context.name == "h264"
    for packet in itertools.chain(
        packets.from_place(packets.key_frame(index_of, min(wanted)) if index_of else 0), [None]
    ):
        if skipping and packet:
            context.skip_frame = "DEFAULT" if index_of.get(packet.pts) in remaining else "NONREF"
        for frame in context.decode(packet):
            index = index_of.get(frame.pts) if index_of else next(decoded)
            if index in remaining:
                if frame.is_corrupt:
                    raise ValueError(f"frame {index} is damaged")
                remaining.remove(index)
                yield index, frame
        if not remaining:
            return
    raise ValueError(f"frame {min(remaining)} can't be decoded")
