"""Opens video files with PyAV: their stream, its packets, and what its decoder makes of them."""

import os
import stat
from collections.abc import Iterator
from typing import cast

import av
from av.codec.context import Flags
from av.stream import Disposition

from flperf.data.unreadable import BadClip

DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, RuntimeError)  # of a damaged file
CANT_DEMUX = (av.error.InvalidDataError, av.error.PatchWelcomeError)  # the rest of a damaged file
DEFAULT_PIXELS = 5_000_000  # by which FFmpeg favours a default stream when it chooses the one of the most pixels
PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


def open_container(path: str) -> av.container.InputContainer:
    """Open a regular file only: FFmpeg would take `a:b.webm` for a URL, and wait for ever at a pipe."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("is not a file")
    return av.open(os.path.join(os.getcwd(), path), metadata_errors="ignore")


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The stream that FFmpeg would choose: by size and default disposition. Covers and tracks of a single picture
    are chosen only if there is no other."""
    streams = [stream for stream in container.streams.video if not stream.disposition & PICTURES]
    usable = [stream for stream in streams if stream.codec_context is not None]
    if not usable:
        raise ValueError("no decoder for its codec" if streams else "no video stream")
    if len(usable) == 1:
        return usable[0]
    moving = _moving(container.name, usable)

    def rank(stream: av.VideoStream) -> tuple:
        size = stream.codec_context.width * stream.codec_context.height
        is_default = bool(stream.disposition & Disposition.default)
        return stream.index in moving, size + DEFAULT_PIXELS * is_default, -stream.index

    return max(usable, key=rank)


def _moving(path: str, streams: list[av.VideoStream]) -> set[int]:
    """Indices of the streams with more than one packet."""
    counts = dict.fromkeys((stream.index for stream in streams), 0)
    with open_container(path) as container:
        for packet in demux(container, [container.streams[index] for index in counts]):
            counts[packet.stream_index] += 1
            if min(counts.values()) > 1:
                break
    return {index for index, count in counts.items() if count > 1}


def open_context(stream: av.VideoStream) -> av.VideoCodecContext:
    """The stream's decoder, in one thread, whose frames carry the position of their packet and are cropped exactly."""
    context = stream.codec_context
    context.thread_count = 1
    context.flags |= Flags.unaligned
    context.copy_opaque = True
    return context


def demux(container: av.container.InputContainer, streams) -> Iterator[av.Packet]:
    """The non-empty packets of one stream or several. A packet of a stream that appears late in the file, as a damaged
    byte of a transport stream makes it appear, is passed over, as `ffmpeg` does: PyAV raises LookupError for it or not,
    depending on what lies in memory behind its list of streams. A part that can't be demuxed ends the packets; those
    before it are read."""
    found = False
    while True:
        try:
            for packet in container.demux(streams):
                if packet.size:
                    found = True
                    yield packet
            return
        except LookupError:
            continue
        except CANT_DEMUX:
            if not found:
                raise
            return


def decode(context: av.VideoCodecContext, position: int, packet: av.Packet | None) -> list[av.VideoFrame]:
    """The frames that a packet makes the decoder put out; `packet_of` finds the packet that each was decoded from."""
    if packet is not None:
        packet.opaque = [position]  # a new object: PyAV looks it up by its address
    return context.decode(packet)


def packet_of(frame: av.VideoFrame) -> int:
    """Position of the packet that a frame was decoded from; -1 if the decoder does not pass it on."""
    opaque = cast(list[int] | None, frame.opaque)
    return opaque[0] if opaque else -1


def frame_rate(path: str) -> float:
    """Mean frames a second of a file. Raises `BadClip` if it is unknown."""
    try:
        with open_container(path) as container:
            rate = video_stream(container).average_rate
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None
    if not rate:
        raise BadClip(path, "has no frame rate")
    return float(rate)


def describe(error: Exception) -> str:
    """A decoding error as one reason: its message and type."""
    return f"{getattr(error, 'strerror', None) or error} ({type(error).__name__})"
