"""The decoder for GPUs: DALI pipelines from file bytes through NVDEC to frames, beside PyAV on the cores.

A thread reads one clip at a time into its slot of a batch on the device. Some threads own a DALI pipeline and decode
with it what it supports. The others, and all clips that DALI doesn't support on the device (codec, pixel format, frames
too small for NVDEC), use PyAV. Any free thread takes the next clip, so a slow NVDEC delays only its own clips.

A pipeline holds one clip, because DALI waits for the device at every frame, on one stream for a whole batch: the clips
of a batch would take turns, behind what the training step has queued. On an H100 8 clips of 64 frames took 1.9 s in
this way, beside steps of 0.45 s. One clip a pipeline also shows which file was at fault when DALI fails.

One definition serves both devices: on a CPU it decodes VP8, VP9 and MJPEG, by which tests without a GPU check it.
Frames are resized as PyAV's are. DALI's own resize repeats the pixels at a frame's edge where the Hugging Face
processor leaves them out of the average: a difference of up to 20 levels on white noise.
"""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import repeat

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from flperf.data.decoding import check_indices
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import PyAVReader, display_orientation, frames_of, in_order, opened
from flperf.data.samplers import ClipRequest, FrameSampling
from flperf.data.video_file import VideoFile

logger = logging.getLogger(__name__)

CPU_CODECS = ("vp8", "vp9", "mjpeg")
# Smallest height and width that NVDEC decodes (Video Codec SDK, NVDEC application note). MPEG-4 is left out: its frames
# came out wrong.
GPU_CODECS = {"h264": (16, 48), "hevc": (144, 144), "vp8": (16, 48), "vp9": (128, 128), "av1": (128, 128)}
GPU_FORMATS = ("yuv420p", "yuvj420p")  # every NVDEC decodes these codecs in these pixel formats
# Shares of red and blue in luma, by colour space (ITU-T H.273, MatrixCoefficients). DALI always converts by BT.601
BT_601 = 0.299, 0.114
LUMA_SHARES = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)} | dict.fromkeys((2, 4, 5, 6), BT_601)
PROGRESSIVE = 1  # field order (FFmpeg, AVFieldOrder); 0 is unknown
DALI_ERRORS = (RuntimeError, IndexError, ValueError)
RESIZED_BYTES = 2**24  # of frames resized by one call; on a GPU they are fp32, four times as large

Inputs = tuple[list, list, list]  # of a pipeline: path, indices of frames, sample


class DaliReader(PyAVReader):
    """Reads clips of video files, uint8 `f h w c` on `device`: `pipelines` threads with DALI (None: all threads), which
    are added to those that were asked for, the others with PyAV."""

    def __init__(
        self,
        paths: list[str],
        frame_sampling: FrameSampling,
        preprocessing: Preprocessing,
        device: torch.device,
        pipelines: int | None = None,
    ):
        super().__init__(paths, frame_sampling, preprocessing)
        self.device = device
        self.extra_threads = pipelines or 0
        self.pipelines_left = repeat(True) if pipelines is None else repeat(True, pipelines)
        self.own = threading.local()  # of each thread: its pipeline and its pinned memory
        self.warned: dict[str, object] = {}

    def write(self, file: VideoFile, request: ClipRequest, indices: list[int], slot: Tensor) -> None:
        pipeline = self._pipeline()
        obstacle = find_obstacle(file, self.device) if pipeline else None
        if pipeline and obstacle is None:
            try:
                colours = colour_correction(file, slot.device)
                return pipeline.read(file.path, indices, request.sample, self.preprocessing, slot, colours)
            except DaliError as error:
                obstacle = str(error)
        self._warn_once(obstacle, file.path)
        self._write_with_pyav(file, request, indices, slot)

    def _pipeline(self) -> "ClipPipeline | None":
        """This thread's pipeline, built at its first clip; None for a thread that has none."""
        if not hasattr(self.own, "pipeline"):
            has_one = next(self.pipelines_left, False)  # one operation, so that no two threads get the same
            self.own.pipeline = ClipPipeline(self.device) if has_one else None
        return self.own.pipeline

    def _write_with_pyav(self, file: VideoFile, request: ClipRequest, indices: list[int], slot: Tensor) -> None:
        """Decode on the CPU; to a GPU through pinned memory."""
        if not slot.is_cuda:
            super().write(file, request, indices, slot)
            return
        if not hasattr(self.own, "pinned"):
            self.own.pinned = torch.empty(slot.shape, dtype=slot.dtype, pin_memory=True)
        super().write(file, request, indices, self.own.pinned)
        slot.copy_(self.own.pinned, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def _warn_once(self, obstacle: str | None, path: str) -> None:
        mine = object()
        if obstacle and self.warned.setdefault(obstacle, mine) is mine:  # one operation, so that only one thread logs
            logger.warning("%s; PyAV decodes such clips on the CPU. The first: %s", obstacle, path)


def read_frames(path: str, indices: list[int], device: torch.device) -> Tensor:
    """Frames of a file, uint8 `f h w c` on the CPU. Raises `BadClip`, and `IndexError` for an index that the file does
    not have."""
    with opened(path) as file:
        if find_obstacle(file, device) is None:
            check_indices(file, indices)
            with suppress(DaliError):
                decoded = ClipPipeline(device).decode(path, indices, 0)
                return recolour(decoded, colour_correction(file, device)).cpu().clone()
        return in_order(file, lambda: frames_of(file, indices))


class DaliError(Exception):
    """DALI failed on a clip; the text gives its reason."""


class ClipPipeline:
    """A DALI pipeline that decodes one clip at a time, used by one thread."""

    def __init__(self, device: torch.device):
        self.device = device
        self.inputs: Inputs | None = None
        self._build()

    def _build(self) -> None:
        # The source never raises: an exception in it would break the pipeline.
        backend = "mixed" if self.device.type == "cuda" else "cpu"
        self.pipeline = build_pipeline(lambda: self.inputs, backend, self.device.index or 0)

    def read(
        self,
        path: str,
        indices: list[int],
        sample: int,
        preprocessing: Preprocessing,
        out: Tensor,
        colours: Tensor | None,
    ) -> None:
        """Decode the frames of a clip into `out`, uint8 `f h w c`, with their colours corrected. Raises `DaliError` if
        DALI fails, and builds the pipeline again."""
        decoded = self.decode(path, indices, sample)
        together = max(1, RESIZED_BYTES // decoded[0].nbytes)
        for some, slots in zip(decoded.split(together), out.split(together), strict=True):
            slots.copy_(recolour(preprocessing.apply(some), colours))
        if out.is_cuda:
            torch.cuda.current_stream().synchronize()  # DALI may now overwrite its output

    def decode(self, path: str, indices: list[int], sample: int) -> Tensor:
        """The frames, uint8 `f h w c` of the file's size, in DALI's memory until the next call."""
        name = np.frombuffer(os.path.join(os.getcwdb(), os.fsencode(path)), np.uint8)
        self.inputs = [name], [np.array(indices, np.int32)], [np.int64(sample)]
        try:
            frames, decoded_sample = self.pipeline.run()
        except DALI_ERRORS as error:
            self._build()
            raise DaliError(_reason(error)) from None
        if decoded_sample.as_array().item() != sample:
            raise AssertionError(f"DALI returned sample {decoded_sample.as_array().item()} instead of {sample}")
        return torch.from_dlpack(frames.as_tensor())[0]


def build_pipeline(source: Callable[[], Inputs | None], backend: str, device_id: int) -> Pipeline:
    """A pipeline whose inputs are path, indices of frames and sample, and whose outputs are uint8 `1 f h w c` of the
    file's size and the sample. `backend` is "mixed" (NVDEC on GPU `device_id`) or "cpu"."""
    gpu = device_id if backend == "mixed" and torch.cuda.is_available() else None
    pipeline = Pipeline(1, 1, gpu, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        path, indices, sample = fn.external_source(
            source, num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT64], ndim=[1, 1, 0]
        )
        encoded = fn.io.file.read(path, dont_use_mmap=True)  # mapping leaks a file descriptor for each empty file
        # affine: else the threads of all pipelines would share the first core
        frames = fn.decoders.video(encoded, device=backend, affine=False, frames=indices)
        pipeline.set_outputs(frames, sample)
    return pipeline


def colour_correction(file: VideoFile, device: torch.device) -> Tensor | None:
    """The matrix, fp32 `c c`, that maps RGB as DALI converts it to that of the file's colour space; None if they agree.
    It is the same for the full and the limited range."""
    shares = LUMA_SHARES[file.context.colorspace]
    if shares == BT_601:
        return None
    return (_to_rgb(*shares) @ torch.linalg.inv(_to_rgb(*BT_601))).float().to(device)


def _to_rgb(red: float, blue: float) -> Tensor:
    """The matrix from (Y, U, V) to RGB by the shares of red and blue in luma."""
    green = 1 - red - blue
    of_u = [0, -2 * blue * (1 - blue) / green, 2 * (1 - blue)]
    of_v = [2 * (1 - red), -2 * red * (1 - red) / green, 0]
    return torch.tensor([[1, 1, 1], of_u, of_v], dtype=torch.float64).T


def recolour(frames: Tensor, colours: Tensor | None) -> Tensor:
    """Correct the colours of frames, uint8 `... c`."""
    if colours is None:
        return frames
    return (frames.float() @ colours.T).round_().clamp_(0, 255).to(torch.uint8)


def find_obstacle(file: VideoFile, device: torch.device) -> str | None:
    """Why DALI can't decode a file on this device, or might choose other frames than PyAV; None if nothing is known
    against it. DALI relies on the header and the order of presentation times."""
    if file.timeline.counted:
        return f"DALI can't tell the frames of a file if {file.timeline.counted}"
    if file.stream.frames not in (0, len(file.infos)) or file.is_cut_short:
        return "the header of a file does not agree with its packets"
    if file.has_edits:
        return "DALI doesn't apply edit lists"
    if len(file.container.streams.video) > 1:
        return "DALI doesn't choose between video streams"
    if file.context.field_order > PROGRESSIVE:
        return "DALI doesn't say what it does with interlaced video"
    if not file.has_one_size:
        return "DALI doesn't decode frames of several sizes"
    unsupported = _unsupported(file.context, "mixed" if device.type == "cuda" else "cpu")
    if unsupported:
        return unsupported
    if file.context.colorspace not in LUMA_SHARES:
        return f"DALI doesn't convert colour space {file.context.colorspace}"
    # last, since they read all packets or decode a frame
    if file.is_damaged:
        return "DALI doesn't notice damage"
    if file.orientations or display_orientation(file.first_frame()):
        return "DALI doesn't apply display matrices"
    return None


def _unsupported(context, backend: str) -> str | None:
    """Why DALI can't decode the codec of this context, or None."""
    codec = context.codec.canonical_name
    if codec not in (CPU_CODECS if backend == "cpu" else GPU_CODECS):
        return f"DALI doesn't decode {codec} on a {'CPU' if backend == 'cpu' else 'GPU'}"
    if backend == "mixed":
        height, width = GPU_CODECS[codec]
        if context.pix_fmt not in GPU_FORMATS:
            return f"NVDEC doesn't decode {codec} in {context.pix_fmt}"
        if context.height < height or context.width < width:
            return f"NVDEC doesn't decode {codec} of less than {width} x {height} pixels"
    return None


def _reason(error: Exception) -> str:
    """The line of DALI's message that gives the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return f"DALI: {lines[cause]}"
