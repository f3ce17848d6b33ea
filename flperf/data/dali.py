"""The decoder for GPUs: DALI pipelines from file bytes through NVDEC to frames, beside PyAV on the cores.

A worker process (`flperf.data.workers`) opens each file, chooses its frames, and says whether DALI can be relied on for
them. If so, a thread of this process that has a pipeline, called a lane, decodes them; else the worker does. Either way
about one core is busy for each thread, since DALI waits for the device in a loop. Any free thread takes the next clip,
so a slow NVDEC delays only its own clips.

A pipeline holds one clip, because DALI waits for the device at every frame, on one stream for a whole batch: the clips
of a batch would take turns, behind what the training step has queued. On an H100 8 clips of 64 frames took 1.9 s in
this way, beside steps of 0.45 s. One clip a pipeline also shows which file was at fault when DALI fails.

One definition serves both devices: on a CPU it decodes VP8, VP9 and MJPEG, by which tests without a GPU check it.
Frames are resized as PyAV's are. DALI's own resize repeats the pixels at a frame's edge where the Hugging Face
processor leaves them out of the average: a difference of up to 20 levels on white noise.
"""

import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import repeat

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from flperf.data.dali_support import colour_correction, find_obstacle
from flperf.data.decoding import check_indices
from flperf.data.loader import Slot
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import frames_of, in_order, opened
from flperf.data.samplers import ClipRequest
from flperf.data.unreadable import Reasons
from flperf.data.worker_messages import Answer, Reading
from flperf.data.workers import WorkerReader

logger = logging.getLogger(__name__)

DALI_ERRORS = (RuntimeError, IndexError, ValueError)
RESIZED_BYTES = 2**22  # of frames resized by one call; on a GPU they are fp32, four times as large
JUDGED_CLIPS = 8  # by whose median a lane is compared with a core

Inputs = tuple[list, list, list]  # of a pipeline: path, indices of frames, sample


class DaliReader(WorkerReader):
    """Reads clips of video files, uint8 `f h w c` on `device`. The first `lanes` threads have a DALI pipeline each
    (None: all threads), and PyAV for what DALI can't be relied on for; the others use PyAV.

    If `lanes` are given, they compete with PyAV: they leave out files for which DALI would build an NVDEC decoder each
    time, and a lane ends once it has taken longer for a clip than a core takes.
    """

    def __init__(self, paths: list[str], reading: Reading, device: torch.device, lanes: int | None = None):
        super().__init__(paths, replace(reading, device=device.type, reusing=lanes is not None), device)
        self.device, self.competing = device, lanes is not None
        self.lanes_left = repeat(True) if lanes is None else repeat(True, lanes)
        self.core_seconds: deque[float] = deque(maxlen=JUDGED_CLIPS)  # that PyAV took for the last clips
        self.warned: dict[str, object] = {}

    def fill(self, request: ClipRequest, slot: Slot) -> Reasons:
        lane = self._lane()
        answer = self.ask(request, slot.host, with_dali=lane is not None)
        if lane is not None and answer.indices:
            try:
                self._decode(lane, request, answer, slot)
                return answer.reasons
            except DaliError as error:
                answer = replace(self.ask(request, slot.host), obstacle=str(error))
        self._warn_once(answer.obstacle, self.paths[request.clip])
        self.core_seconds.append(answer.seconds)
        return answer.reasons

    def _lane(self) -> "Lane | None":
        """This thread's lane, opened at its first clip; None for a thread that has none."""
        if not hasattr(self.own, "lane"):
            has_one = next(self.lanes_left, False)  # one operation, so that no two threads get the same
            self.own.lane = Lane(self.device) if has_one else None
        return self.own.lane

    def _decode(self, lane: "Lane", request: ClipRequest, answer: Answer, slot: Slot) -> None:
        path = self.paths[request.clip]
        out = slot.host if self.device.type == "cpu" else None
        frames = lane.read(path, answer.indices, request.sample, answer.preprocessing, answer.colours, out)
        slot.on_device = None if out is not None else frames
        if self.competing and lane.is_slower_than(self.core_seconds):
            self.own.lane = None
            logger.warning(
                "an NVDEC lane is closed: a clip takes it %.0f ms, and a core with PyAV %.0f ms",
                1e3 * statistics.median(lane.seconds),
                1e3 * statistics.median(self.core_seconds),
            )

    def _warn_once(self, obstacle: str | None, path: str) -> None:
        mine = object()
        if obstacle and self.warned.setdefault(obstacle, mine) is mine:  # one operation, so that only one thread logs
            logger.warning("%s; PyAV decodes such clips on the CPU. The first: %s", obstacle, path)


class Lane:
    """A pipeline of one thread, on a stream of its own: a thread that waits for its clip waits for nothing else."""

    def __init__(self, device: torch.device):
        self.pipeline = ClipPipeline(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.seconds: deque[float] = deque(maxlen=JUDGED_CLIPS)  # of the last clips, without the first
        self.started = False

    def read(
        self,
        path: str,
        indices: list[int],
        sample: int,
        preprocessing: Preprocessing,
        colours: list[list[float]] | None,
        out: Tensor | None,
    ) -> Tensor:
        """The frames of a clip, resized, cropped and with their colours corrected, uint8 `f h w c`; into `out` if it is
        given. Raises `DaliError`."""
        begun = time.perf_counter()
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            decoded = self.pipeline.decode(path, indices, sample)
            if out is None:
                out = torch.empty(len(decoded), *preprocessing.size, 3, dtype=torch.uint8, device=decoded.device)
            together = max(1, RESIZED_BYTES // decoded[0].nbytes)
            for some, slots in zip(decoded.split(together), out.split(together), strict=True):
                slots.copy_(recolour(preprocessing.apply(some), colours))
            if self.stream:
                self.stream.synchronize()  # DALI may now overwrite its output
        if self.started:
            self.seconds.append(time.perf_counter() - begun)
        self.started = True
        return out

    def is_slower_than(self, core_seconds: Sequence[float]) -> bool:
        """Whether clips take longer than these seconds, once there are enough of both."""
        enough = min(len(self.seconds), len(core_seconds)) == JUDGED_CLIPS
        return enough and statistics.median(self.seconds) > statistics.median(core_seconds)


def read_frames(path: str, indices: list[int], device: torch.device) -> Tensor:
    """Frames of a file, uint8 `f h w c` on the CPU. Raises `BadClip`, and `IndexError` for an index that the file does
    not have."""
    with opened(path) as file:
        if find_obstacle(file, device.type) is None:
            check_indices(file, indices)
            with suppress(DaliError):
                decoded = ClipPipeline(device).decode(path, indices, 0)
                return recolour(decoded, colour_correction(file)).cpu().clone()
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

    def decode(self, path: str, indices: list[int], sample: int) -> Tensor:
        """The frames, uint8 `f h w c` of the file's size, in DALI's memory until the next call. Raises `DaliError` if
        DALI fails, and builds the pipeline again."""
        # not `abspath`, which would leave out a folder with the `..` behind it, and the folder may be a link
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


def recolour(frames: Tensor, colours: list[list[float]] | None) -> Tensor:
    """Correct the colours of frames, uint8 `... c`, by the rows of a matrix."""
    if colours is None:
        return frames
    return (frames.float() @ torch.tensor(colours, device=frames.device).T).round_().clamp_(0, 255).to(torch.uint8)


def _reason(error: Exception) -> str:
    """The line of DALI's message that gives the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return f"DALI: {lines[cause]}"
