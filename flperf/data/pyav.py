"""The decoder for CPUs: PyAV, one single-threaded decoder a clip, many clips at once.

Each wanted frame is resized while it is still in the processor's cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import numpy as np
import torch
from av.buffer import Buffer
from av.sidedata.sidedata import Type as SideData
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

from flperf.data.containers import DECODE_ERRORS, describe
from flperf.data.decoding import WrongOrder, decode_frames
from flperf.data.loader import Reader
from flperf.data.nal_units import orientation_of
from flperf.data.packet_content import Orientation
from flperf.data.prepared import remaining_preprocessing
from flperf.data.preprocessing import Preprocessing
from flperf.data.resizing import compiled_kernel, resize_into
from flperf.data.samplers import ClipRequest, FrameSampling
from flperf.data.unreadable import BadClip, Reasons, shortage
from flperf.data.video_file import VideoFile

Result = TypeVar("Result")


class PyAVReader(Reader):
    """Reads clips of video files: uint8 `f h w c`."""

    def __init__(self, paths: list[str], frame_sampling: FrameSampling, preprocessing: Preprocessing):
        self.paths, self.frame_sampling, self.preprocessing = paths, frame_sampling, preprocessing
        self.shape = (frame_sampling.n_frames, *preprocessing.size, 3)
        compiled_kernel()  # not in the threads that read

    def read(self, request: ClipRequest, slot: Tensor) -> Reasons:
        with opened(self.paths[request.clip]) as file:
            return in_order(file, lambda: self._read(file, request, slot))

    def _read(self, file: VideoFile, request: ClipRequest, slot: Tensor) -> Reasons:
        times = file.timeline.times
        short = shortage(file.path, self.frame_sampling, times)
        indices = self.frame_sampling.frames(times, request.uniform)
        write_frames(file, indices, slot, remaining_preprocessing(self.preprocessing, file))
        return short


def read_frames(path: str, indices: list[int]) -> Tensor:
    """Frames of a file, uint8 `f h w c`. Raises `BadClip`, and `IndexError` for an index that the file doesn't have."""
    with opened(path) as file:
        return in_order(file, lambda: frames_of(file, indices))


@contextmanager
def opened(path: str) -> Iterator[VideoFile]:
    """An open file. What is wrong with it is raised as `BadClip`."""
    try:
        with VideoFile(path) as file:
            yield file
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None


def in_order(file: VideoFile, read: Callable[[], Result]) -> Result:
    """Call `read`; once more, with counted frames, if the decoder contradicts the order of presentation times."""
    try:
        return read()
    except WrongOrder:
        file.count_frames()
        return read()


def frames_of(file: VideoFile, indices: list[int]) -> Tensor:
    """Frames of an open file, uint8 `f h w c`. Raises one of DECODE_ERRORS."""
    frames = dict(read_pixels(file, sorted(set(indices or [0]))))
    if len({frame.shape for frame in frames.values()}) > 1:
        raise ValueError("its frames are turned in different ways")
    return torch.stack([frames[index] for index in indices or [0]])[: len(indices)]


def write_frames(file: VideoFile, indices: list[int], out: Tensor, preprocessing: Preprocessing) -> None:
    """Decode frames of a file, in any order, into `out`, uint8 `f h w c`, resized and cropped. Raises one of
    DECODE_ERRORS if any of them can't be decoded intact."""
    first = {index: slot for slot, index in reversed(list(enumerate(indices)))}  # index → its first slot
    for index, frame in read_pixels(file, sorted(first)):
        resize_into(frame, out[first[index]], preprocessing)
    for slot, index in enumerate(indices):
        if slot != first[index]:
            out[slot] = out[first[index]]


def read_pixels(file: VideoFile, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(index, frame as uint8 `h w c`, turned as it is displayed) of the wanted frames. All have the size of the file's
    first frame, as in FFmpeg. A frame may come twice, if decoding starts again; the last one counts."""
    reformatter, orientation = VideoReformatter(), None
    for number, (index, frame) in enumerate(decode_frames(file, wanted)):
        if number == 0:  # the container's is that of all frames; looking it up takes a third of a conversion's time
            orientation = display_orientation(frame)
        width, height = file.size if (frame.width, frame.height) == file.size else file.first_size
        # The converted frame is not bound to a name: its memory is used for the next one while it is in the cache.
        pixels = pixels_of(reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1))
        yield index, turn(pixels, file.orientation(index) or orientation)


def pixels_of(frame: VideoFrame) -> Tensor:
    """The pixels of an RGB frame, uint8 `h w c`, in its own memory. Rows may have gaps between them."""
    plane = frame.planes[0]
    size, strides = (frame.height, frame.width, 3), (plane.line_size, 3, 1)
    return torch.frombuffer(plane, dtype=torch.uint8).as_strided(size, strides)


def turn(pixels: Tensor, orientation: Orientation | None) -> Tensor:
    """Turn and mirror pixels `h w c` as they are displayed. Raises `ValueError` for another angle than a quarter
    turn."""
    match orientation:
        case None:
            return pixels
        case (0, vertical, horizontal, 0) if vertical and horizontal:
            pixels = pixels.transpose(0, 1)
        case (horizontal, 0, 0, vertical) if vertical and horizontal:
            pass
        case _:
            raise ValueError("its display matrix is no quarter turn; turn its pixels with ffmpeg")
    return pixels.flip([axis for axis, sign in enumerate((vertical, horizontal)) if sign < 0]).contiguous()


def display_orientation(frame: VideoFrame) -> Orientation | None:
    """The orientation by a frame's display matrix; None for a frame that is displayed as it is stored."""
    try:
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX.name)
    except ValueError:  # the frame has data that PyAV doesn't know, such as EXIF
        return orientation_of(frame.rotation)
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(cast(Buffer, matrix)), np.int32)[:5].astype(float)
    if a == c == 0 or b == d == 0:  # FFmpeg takes no notice of a matrix that leaves nothing
        return None
    small = 0.01 * max(abs(a), abs(b), abs(c), abs(d))
    signs = tuple(0 if abs(value) < small else int(np.sign(value)) for value in (a, b, c, d))
    return None if signs == (1, 0, 0, 1) else signs
