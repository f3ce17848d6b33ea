"""The decoder for GPUs: DALI graphs from file bytes through NVDEC to frames, beside PyAV on the cores that are there.

A worker reads one clip at a time into its slot of a batch on the device. Some workers have a lane, a DALI graph of
their own, and take what DALI decodes through it; the others, and what DALI can't decode on a device (codec, pixel
format, a frame too small for NVDEC), go through PyAV. Whoever is free takes the next clip, so a slow NVDEC costs
nothing but its own clips. A lane holds one clip because DALI waits for the device at every frame, on one stream for a
whole batch: the clips of a batch would take turns, behind what the training step has queued (8 clips of 64 frames
took 1.9 s so on an H100, beside steps of 0.45 s). It also tells which file was at fault when DALI fails.

One definition serves both devices: on a CPU it runs VP8, VP9 and MJPEG, which keeps the GPU's graph honest. Frames
are resized as PyAV's are: DALI's own resize repeats a frame's edge where the processor's leaves that weight out, up
to 20 levels on white noise.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from flperf.data.annotations import Annotations
from flperf.data.prefetch import BadClip, Buffers, filled_buffers
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import DECODE_ERRORS, describe, is_shown, open_video, read_clip, video_stream
from flperf.data.samplers import Batches, ClipBatch, ClipRequest, FrameSampling

logger = logging.getLogger(__name__)

CPU_CODECS = ("vp8", "vp9", "mjpeg")
# The least height and width that NVDEC decodes (Video Codec SDK, NVDEC application note). Not MPEG-4: its frames came
# out wrong.
GPU_CODECS = {"h264": (16, 48), "hevc": (144, 144), "vp8": (16, 48), "vp9": (128, 128), "av1": (128, 128)}
GPU_FORMATS = ("yuv420p", "yuvj420p")  # what every NVDEC decodes of these
DALI_ERRORS = (RuntimeError, IndexError, ValueError)
RESIZED_BYTES = 2**24  # of frames resized by one call, which on a GPU are four times as many in fp32


def read_batches(
    batches: Iterable[list[ClipRequest]],
    sampler,
    annotations: Annotations,
    window: FrameSampling,
    preprocessing: Preprocessing,
    threads: int,
    prefetch: int,
    device: torch.device,
    lanes: int | None = None,
) -> Batches:
    """Yield the batches with their video as uint8 `b f h w c` on `device`, read by `threads` workers, `lanes` of them
    (null: all) with a DALI graph."""
    graph = Graph(window, "mixed" if device.type == "cuda" else "cpu", device.index or 0)
    workers = Workers(graph, threads if lanes is None else lanes)
    buffers = DeviceBuffers((window.n_frames, *preprocessing.size, 3), torch.uint8, device)

    def fill(draw: ClipRequest, slot: Tensor) -> None:
        path, lane = annotations.paths[draw.clip], workers.lane()
        length, obstacle = probe(path, graph.backend)
        if lane and obstacle is None:
            lane.read(Request(path, window.start_frame(length, draw.uniform), draw.sample), preprocessing, slot)
        else:
            workers.say_once(obstacle, path)
            workers.read_on_cpu(slot, lambda out: read_clip(path, window, draw.uniform, preprocessing, out))

    for draws, video, skipped in filled_buffers(batches, sampler, buffers, fill, threads, prefetch):
        yield ClipBatch.of(draws, annotations.labels, video=video, skipped=skipped)


@dataclass(frozen=True)
class Request:
    """What a graph is told of one clip."""

    path: str
    start: int
    sample: int  # comes out with the frames

    def arrays(self) -> tuple[list, ...]:
        """What the graph's source emits: path, start, sample."""
        path = np.frombuffer(os.path.abspath(self.path).encode(), np.uint8)
        return [path], [np.int32(self.start)], [np.int64(self.sample)]


@dataclass(frozen=True)
class Graph:
    """The definition of a lane's pipeline. `backend` is "mixed" (NVDEC, on GPU `device_id`) or "cpu"."""

    window: FrameSampling
    backend: str
    device_id: int

    def pipeline(self, source: Callable[[], tuple[list, ...]]) -> Pipeline:
        """Path, start and sample go in; uint8 `1 f h w c` of the file's size and the sample come out, one clip at a
        time."""
        device_id = self.device_id if self.backend == "mixed" and torch.cuda.is_available() else None
        pipeline = Pipeline(1, 1, device_id, prefetch_queue_depth=1, exec_dynamic=True)
        with pipeline:
            path, start, sample = fn.external_source(
                source, num_outputs=3, dtype=[types.UINT8, types.INT32, types.INT64], ndim=[1, 0, 0]
            )
            encoded = fn.io.file.read(path, dont_use_mmap=True)  # mapping leaks a file descriptor for each empty file
            frames = fn.decoders.video(
                encoded,
                device=self.backend,
                affine=False,  # else the threads of all lanes would share the first core
                start_frame=start,
                stride=self.window.stride,
                sequence_length=self.window.n_frames,
                pad_mode="edge",
            )
            pipeline.set_outputs(frames, sample)
        return pipeline


class Lane:
    """A pipeline and the one thread that uses it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.request: Request | None = None
        self.pipeline = graph.pipeline(self._source)

    def _source(self) -> tuple[list, ...]:
        """Never raises: an error in it would break the graph."""
        return self.request.arrays()

    def read(self, request: Request, preprocessing: Preprocessing, out: Tensor) -> None:
        """Decode a clip into `out`, uint8 `f h w c`; raises `BadClip` where DALI fails, which then takes a new
        pipeline."""
        self.request = request
        try:
            frames, sample = self.pipeline.run()
        except DALI_ERRORS as error:
            self.pipeline = self.graph.pipeline(self._source)
            raise BadClip(request.path, _reason(error)) from None
        if sample.as_array().item() != request.sample:
            raise AssertionError(f"DALI returned sample {sample.as_array().item()} where {request.sample} was due")
        decoded = torch.from_dlpack(frames.as_tensor())[0]
        together = max(1, RESIZED_BYTES // decoded[0].nbytes)
        for some, slots in zip(decoded.split(together), out.split(together), strict=True):
            slots.copy_(preprocessing.apply(some))
        if out.is_cuda:
            torch.cuda.current_stream().synchronize()  # DALI's memory is its own again


class Workers:
    """What the threads of one stream of batches have: some a lane, and all host memory for PyAV."""

    def __init__(self, graph: Graph, lanes: int):
        self.graph = graph
        self.unclaimed = [None] * lanes
        self.own = threading.local()
        self.said: dict[str, object] = {}

    def lane(self) -> Lane | None:
        """This thread's own, made at its first clip."""
        if not hasattr(self.own, "lane"):
            try:
                self.unclaimed.pop()
                self.own.lane = Lane(self.graph)
            except IndexError:
                self.own.lane = None
        return self.own.lane

    def read_on_cpu(self, slot: Tensor, read: Callable[[Tensor], None]) -> None:
        """Have `read` write a clip into the slot, through pinned memory where that is on a GPU."""
        if not slot.is_cuda:
            read(slot)
            return
        if not hasattr(self.own, "pinned"):
            self.own.pinned = torch.empty(slot.shape, dtype=slot.dtype, pin_memory=True)
        read(self.own.pinned)
        slot.copy_(self.own.pinned, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def say_once(self, obstacle: str | None, path: str) -> None:
        mark = object()
        if obstacle and self.said.setdefault(obstacle, mark) is mark:  # one step, so that no two threads say it
            logger.warning("%s; PyAV decodes such clips on the CPU. The first: %s", obstacle, path)


class DeviceBuffers(Buffers):
    """Batches on the device, written on a stream of their own, beside the one that computes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        super().__init__(shape, dtype, torch.device("cpu"))
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def writing(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else super().writing()

    def take(self, b: int) -> Tensor:
        if self.stream is None:
            return super().take(b)
        with self.writing():
            return torch.empty(b, *self.shape, dtype=self.dtype, device=self.device)

    def hand_over(self, buffer: Tensor) -> Tensor:
        """The stream that computes waits for the writes, and the memory stays until that stream is done with it."""
        if self.stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            buffer.record_stream(computing)
        return buffer


@cache
def probe(path: str, backend: str) -> tuple[int, str | None]:
    """(frames, why DALI can't decode it on this device) of a file from its header; where that doesn't tell, the
    packets are counted."""
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            context = stream.codec_context
            length = stream.frames or sum(packet.size > 0 and is_shown(packet) for packet in container.demux(stream))
            if not length or not context.height or not context.width:
                raise ValueError("no video frames")
            return length, _obstacle(context, backend)
    except DECODE_ERRORS as error:
        raise BadClip(path, describe(error)) from None


def _obstacle(context, backend: str) -> str | None:
    """Why DALI can't decode a file with this codec context, or None."""
    codec = context.codec.canonical_name
    if codec not in (CPU_CODECS if backend == "cpu" else GPU_CODECS):
        return f"DALI doesn't decode {codec} on a {'CPU' if backend == 'cpu' else 'GPU'}"
    if backend == "mixed":
        least = GPU_CODECS[codec]
        if context.pix_fmt not in GPU_FORMATS:
            return f"NVDEC doesn't decode {codec} in {context.pix_fmt}"
        if context.height < least[0] or context.width < least[1]:
            return f"NVDEC doesn't decode {codec} of less than {least[1]} x {least[0]} pixels"
    return None


def _reason(error: Exception) -> str:
    """The line of DALI's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return f"DALI: {lines[telling]}"
