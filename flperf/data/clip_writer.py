"""Writes a video file again as one that decodes fast: the frames that an encoder sees, all of them, at their times.

H.264 with a key frame every 16 frames, no deblocking and no arithmetic coding (x264's `fastdecode`), one reference
frame and macroblocks that are not split. Seven of every eight frames are B-frames that no other frame refers to, so a
reader with a stride can leave out those that it does not want. Colours are those of BT.601 in the limited range, which
all decoders take without a correction. The sound is left out.
"""

import json
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from torch import Tensor

from flperf.data.containers import DECODE_ERRORS, describe
from flperf.data.prepared import Preparation
from flperf.data.preprocessing import Preprocessing, Size, padded
from flperf.data.pyav import in_order, read_pixels
from flperf.data.resizing import resize_into
from flperf.data.unreadable import BadClip
from flperf.data.video_file import DEFAULT_RATE, VideoFile

CODEC = "libx264"
OPTIONS = {
    "preset": "faster",
    "tune": "fastdecode",
    "crf": "21",
    "g": "16",
    "bf": "7",
    # Without its macroblock tree, x264 writes the same file every time.
    "x264-params": "b-adapt=0:b-pyramid=none:ref=1:partitions=none:mbtree=0:threads=1",
}
BT_601, LIMITED_RANGE = 6, 1  # H.273: SMPTE 170M for primaries, transfer and matrix; FFmpeg's number of the range
EXACT = 1e-6  # seconds by which a time may differ once it is written
FINEST = 2**31 - 1  # units a second that an MP4 can hold

# Turns a frame `h w c` as a player shows it into the frame that is stored, without its padding.
Transform = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Plan:
    """How the files of a set are prepared: as `preprocessing` says, or with `short_side` only resized to it."""

    preprocessing: Preprocessing
    short_side: int | None = None

    def of_set(self) -> Preparation:
        """What is true of all files, before any is written."""
        if self.short_side is None:
            return Preparation(
                self.preprocessing.resize, self.preprocessing.crop, None, self.preprocessing.size, shrunk=False
            )
        return Preparation(None, None, self.short_side, (self.short_side, self.short_side), shrunk=True)

    def of_frames(self, size: Size) -> tuple[Preparation, Transform]:
        """What is done to the frames of a file of this size (height, width)."""
        if self.short_side is None:
            return self.of_set(), lambda frame, out: resize_into(frame, out, self.preprocessing)
        shrunk = min(size) > self.short_side  # smaller files are not enlarged: that would add nothing
        shown = replace(self.preprocessing, resize=self.short_side).geometry(*size).resized if shrunk else size
        # Without a size to resize to, frames are taken as they are.
        resizing = replace(self.preprocessing, resize=shown if shrunk else None, crop=shown)
        return (
            Preparation(None, None, self.short_side, shown, shrunk),
            lambda frame, out: resize_into(frame, out, resizing),
        )


def write_clip(file: VideoFile, path: Path, plan: Plan) -> Preparation:
    """Write all frames of an open file. Raises `BadClip` if one can't be decoded intact or stored, `OSError` if the
    file can't be written."""
    return in_order(file, lambda: _write(file, path, plan))


def check_times(file: VideoFile, times: np.ndarray) -> None:
    """Raise `OSError` if a written file does not have frames at these times [f]."""
    found = file.timeline.times
    if len(found) != len(times) or np.abs(found - times).max() > EXACT:
        raise OSError("it has other frames, or at other times, than were written")


def time_grid(file: VideoFile) -> tuple[Fraction, list[int]]:
    """A unit of time, and the times of all frames in it. They are exact in the unit of the file, or in frames if its
    times are not used."""
    times = file.timeline.times
    rates = (file.stream.average_rate, file.stream.guessed_rate, Fraction(DEFAULT_RATE))
    units = [file.stream.time_base, *(1 / Fraction(rate) for rate in rates if rate)]
    for unit in (Fraction(unit) for unit in units if unit):
        counts = np.rint(times / float(unit)).astype(np.int64)
        if unit.denominator <= FINEST and np.abs(counts * float(unit) - times).max() < EXACT:
            return unit, counts.tolist()
    raise BadClip(file.path, "its times have no unit that MP4 can hold")


def _write(file: VideoFile, path: Path, plan: Plan) -> Preparation:
    writer: _Writer | None = None
    try:
        with closing(_frames(file)) as frames:
            for index, pixels in frames:
                if index == 0:  # also if decoding starts again
                    if writer:
                        writer.close()
                    writer = _Writer(file, path, plan, (pixels.shape[0], pixels.shape[1]))
                if writer:
                    writer.add(index, pixels)
        if writer is None:
            raise BadClip(file.path, "its first frame can't be decoded")
        writer.finish()
        return writer.preparation
    finally:
        if writer:
            writer.close()


def _frames(file: VideoFile) -> Generator[tuple[int, Tensor], None, None]:
    """All frames. Errors of reading are told from those of writing here: both may be `OSError`."""
    try:
        yield from read_pixels(file, list(range(len(file.timeline))))
    except DECODE_ERRORS as error:
        raise BadClip(file.path, describe(error)) from None


class _Writer:
    """Encodes the frames of a file in their order."""

    def __init__(self, file: VideoFile, path: Path, plan: Plan, size: Size):
        self.path, self.size, (self.preparation, self.transform) = file.path, size, plan.of_frames(size)
        self.unit, self.pts = time_grid(file)
        self.pts.append(self.pts[-1] + max(1, round(file.timeline.duration / len(self.pts) / self.unit)))  # the end
        self.added, self.place = 0, {pts: place for place, pts in enumerate(self.pts)}
        height, width = padded(self.preparation.shown)
        self.canvas = np.empty((height, width, 3), np.uint8)
        self.frame = torch.empty(*self.preparation.shown, 3, dtype=torch.uint8)
        self.reformatter = VideoReformatter()
        self.container = av.open(
            os.path.abspath(path), "w", format="mp4", options={"video_track_timescale": str(self.unit.denominator)}
        )
        self.container.metadata["comment"] = json.dumps(self.preparation.as_json())
        self.stream = cast(
            av.VideoStream,
            self.container.add_stream(CODEC, rate=file.stream.average_rate or Fraction(DEFAULT_RATE), options=OPTIONS),
        )
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        context = self.stream.codec_context
        context.time_base, context.thread_count = self.unit, 1
        context.colorspace = context.color_primaries = context.color_trc = BT_601
        context.color_range = LIMITED_RANGE

    def add(self, index: int, pixels: Tensor) -> None:
        """Encode frame `h w c`."""
        if index != self.added:
            raise BadClip(self.path, f"frame {self.added} can't be decoded")
        if pixels.shape[:2] != self.size and self.preparation.short_side:
            raise BadClip(self.path, "its frames are turned in different ways")
        height, width = self.preparation.shown
        self.transform(pixels, self.frame)
        self.canvas[:height, :width] = self.frame.numpy()
        self.canvas[height:, :width] = self.canvas[height - 1, :width]
        self.canvas[:, width:] = self.canvas[:, width - 1 : width]
        # FFmpeg's fast conversion to RGB, by which files are read, rounds down: a level on average.
        rgb = av.VideoFrame.from_ndarray(self.canvas + (self.canvas < 255), format="rgb24")
        frame = self.reformatter.reformat(
            rgb,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation="AREA",
            threads=1,
        )
        frame.pts, frame.time_base = self.pts[index], self.unit
        self._mux(frame)
        self.added += 1

    def finish(self) -> None:
        """Write what the encoder still holds, and the header. Raises `BadClip` if frames are missing."""
        if self.added != len(self.pts) - 1:
            raise BadClip(self.path, f"frame {self.added} can't be decoded")
        self._mux(None)
        self.container.close()

    def close(self) -> None:
        """Give up the file, if it is not finished."""
        self.container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        try:
            packets = self.stream.encode(frame)
        except DECODE_ERRORS as error:
            raise BadClip(self.path, f"can't be encoded: {describe(error)}") from None
        for packet in packets:
            place = self.place[cast(int, packet.pts)]
            packet.duration = self.pts[place + 1] - self.pts[place]
            self.container.mux(packet)
