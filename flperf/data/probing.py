"""What an index says of one video file. The file is demuxed from end to end and its first frame is decoded, so that it
shows whether it is missing, empty, cut short or no video."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
import torch

from flperf.data.containers import DECODE_ERRORS, demux, describe, open_container
from flperf.data.pyav import display_orientation, turn
from flperf.data.samplers import TIME_TOLERANCE
from flperf.data.video_file import CUT_SHORT, VideoFile

ONE_DURATION = ("matroska,webm", "flv")  # formats whose header holds one duration: that of the longest stream


@dataclass(frozen=True)
class Row:
    """One file. If `error` gives a reason, the file is unusable and the numbers may be 0."""

    path: str  # absolute, or relative to the index
    label: int
    codec: str = ""
    pixel_format: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    frame_rate: float = 0.0  # frames a second, on average
    duration: float = 0.0  # seconds
    # seconds from one frame to the next, at least and at most; 0 if unknown
    shortest_interval: float = 0.0
    longest_interval: float = 0.0
    error: str = ""
    notes: str = ""  # what is unusual about a usable file

    @property
    def seconds(self) -> float:
        """Seconds from the first frame to the last; infinite if unknown, so that the file does not count as short."""
        if self.frames <= 1:
            return 0.0
        return self.duration * (self.frames - 1) / self.frames or math.inf

    @property
    def is_variable(self) -> bool:
        """Whether the frame rate is variable. Rounded times alone differ by less than twice the tolerance."""
        return self.longest_interval - self.shortest_interval > 2 * TIME_TOLERANCE


def probe_file(folder: str, path: str, label: int) -> Row:
    """Demux one file and decode its first frame; `path` is relative to `folder`. A file whose packets don't show its
    frames is decoded from end to end."""
    try:
        with VideoFile(os.path.join(folder, path)) as file:
            first, context = file.first_frame(), file.context
            frames, duration = len(file.timeline), file.timeline.duration
            shortest, longest = frame_intervals(file.timeline.times)
            height, width = turn(torch.empty(first.height, first.width, 1), display_orientation(first)).shape[:2]
            return Row(
                path,
                label,
                codec=context.name,
                pixel_format=context.pix_fmt or "",
                width=width,
                height=height,
                frames=frames,
                frame_rate=round(frames / duration if duration else float(file.stream.average_rate or 0), 4),
                duration=round(duration, 4),
                shortest_interval=shortest,
                longest_interval=longest,
                error="the first frame is damaged" if first.is_corrupt else "",
                notes="; ".join(_notes(file, first)),
            )
    except DECODE_ERRORS as error:
        return Row(path, label, error=" ".join(describe(error).split()))


def _notes(file: VideoFile, first: av.VideoFrame) -> Iterator[str]:
    """What a user should know about a usable file."""
    if file.is_cut_short:
        yield f"cut short: {file.timeline.duration:.2f} of {file.promised_seconds:.2f} s"
    elif ends_early := _ends_early(file):
        yield f"cut short: {ends_early[0]:.2f} of {ends_early[1]:.2f} s"
    shape = file.stream.sample_aspect_ratio
    if shape and shape != 1:
        yield f"pixels are not square: {shape.numerator}:{shape.denominator}"
    if display_orientation(first):
        yield "turned or mirrored"
    if file.timeline.counted:
        yield f"frames are counted by decoding: {file.timeline.counted}"


def _ends_early(file: VideoFile) -> tuple[float, float] | None:
    """Seconds that are there, and those that the header promises if all streams end earlier. The other streams are read
    only if the video ends early, since sound may be longer."""
    container = file.container
    # FFmpeg gives a stream of such a file a duration only if the header has none and it estimates all of them.
    if container.format.name not in ONE_DURATION or not container.duration or file.stream.duration:
        return None
    promised = container.duration / av.time_base
    allowed = promised - max(CUT_SHORT * promised, 3 * file.timeline.duration / len(file.timeline))
    if file.timeline.duration >= allowed:
        return None
    with open_container(file.path) as again:
        packets = (packet for packet in demux(again, list(again.streams)) if packet.pts is not None)
        end = max(float((packet.pts + (packet.duration or 0)) * packet.time_base) for packet in packets)
    return (end, promised) if end < allowed else None


def frame_intervals(times: np.ndarray) -> tuple[float, float]:
    """The shortest and the longest time from one frame to the next, in seconds to 0.1 ms; `times` [f] ascend. Zeros for
    a single frame."""
    intervals = np.diff(times)
    return (round(float(intervals.min()), 4), round(float(intervals.max()), 4)) if len(intervals) else (0.0, 0.0)
