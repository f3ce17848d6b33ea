"""The decoder for GPUs: a DALI graph from file bytes through NVDEC to resized frames, handed to torch without a copy.

One definition serves both devices: on a CPU it runs VP8, VP9 and MJPEG, which keeps the GPU's graph honest. What DALI can't decode on a
device (codec, pixel format, a frame too small for NVDEC) PyAV decodes on the CPU, into its place of the batch. DALI fails whole batches
without saying which file was at fault, so files are probed beforehand, and a batch that fails all the same is redone clip by clip: a
bad clip is replaced or left out as with the other decoder, and no good one is lost.

The resize is the processor's within one level, but for the outermost pixels of a crop that reaches the frame's edge (all four edges with
DINOv3, two with 4DS, none with V-JEPA 2): beyond the edge DALI's filter repeats it, the processor's leaves that weight out. On white
noise that made up to 20 levels.
"""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from flperf.config import UserError
from flperf.data.clips import Annotations, Batches, ClipBatch, Draw, Window
from flperf.data.prefetch import BadClip, Faults, Skipped, read_ahead, readable
from flperf.data.preprocessing import Preprocessing, Size
from flperf.data.pyav import DECODE_ERRORS, describe, is_shown, open_video, read_clip, video_stream

logger = logging.getLogger(__name__)

CPU_CODECS = ("vp8", "vp9", "mjpeg")
# The least height and width that NVDEC decodes (Video Codec SDK, NVDEC application note). Not MPEG-4: its frames came out wrong.
GPU_CODECS = {"h264": (16, 48), "hevc": (144, 144), "vp8": (16, 48), "vp9": (128, 128), "av1": (128, 128)}
GPU_FORMATS = ("yuv420p", "yuvj420p")  # what every NVDEC decodes of these
DALI_ERRORS = (RuntimeError, IndexError, ValueError)


@dataclass(frozen=True)
class Request:
    """What the graph is told of one clip."""

    path: str
    start: int
    roi_start: tuple[float, float]
    roi_end: tuple[float, float]


@dataclass(frozen=True)
class Prepared:
    """A batch whose files were probed."""

    step: int
    draws: list[Draw]
    clips: list[Request | Tensor | None]  # for DALI, decoded already by PyAV (uint8 `f h w c` in host memory), or left out
    skipped: Skipped

    @property
    def decoded(self) -> list[Request]:
        """What the graph is asked for."""
        return [clip for clip in self.clips if isinstance(clip, Request)]

    def filled(self, video: Tensor | None) -> list[Tensor | None]:
        """The clips of the batch, those that the graph was asked for being `video`."""
        decoded = iter(() if video is None else video)
        return [next(decoded) if isinstance(clip, Request) else clip for clip in self.clips]

    def arrays(self) -> tuple[list, ...]:
        """What the graph's source emits for each clip: path, start, region's start and end, step id."""
        return (
            [np.frombuffer(os.path.abspath(request.path).encode(), np.uint8) for request in self.decoded],
            [np.int32(request.start) for request in self.decoded],
            [np.float32(request.roi_start) for request in self.decoded],
            [np.float32(request.roi_end) for request in self.decoded],
            [np.int64(self.step) for _ in self.decoded],
        )


class Feed:
    """The graph's source. It remembers what is in flight, and raises nothing but the end: other errors would break the graph, so
    they wait in `error`."""

    def __init__(self, prepared: Iterator[Prepared]):
        self.prepared = prepared
        self.in_flight: deque[Prepared] = deque()
        self.error: UserError | None = None

    def __call__(self) -> tuple[list, ...]:
        try:
            for batch in self.prepared:
                self.in_flight.append(batch)
                if batch.decoded:  # else it waits in flight for its turn
                    return batch.arrays()
        except UserError as error:
            self.error = error
        raise StopIteration

    def start_over(self) -> None:
        """Emit what is in flight once more."""
        self.prepared, self.in_flight = itertools.chain(self.in_flight, self.prepared), deque()


@dataclass(frozen=True)
class Graph:
    """The definition of the pipeline. `backend` is "mixed" (NVDEC, GPU `device_id`) or "cpu" (`device_id` None)."""

    window: Window
    size: Size
    backend: str
    device_id: int | None
    threads: int

    def pipeline(self, source: Callable, batch_size: int, ahead: int) -> Pipeline:
        """Path, start, region and step id go in; uint8 `b f h w c` and the step id come out, `ahead` batches decoded in advance."""
        pipeline = Pipeline(batch_size, self.threads, self.device_id, prefetch_queue_depth=ahead, exec_dynamic=True)
        with pipeline:
            path, start, roi_start, roi_end, step = fn.external_source(
                source,
                num_outputs=5,
                dtype=[types.UINT8, types.INT32, types.FLOAT, types.FLOAT, types.INT64],
                ndim=[1, 0, 1, 1, 0],
            )
            encoded = fn.io.file.read(path, dont_use_mmap=True)  # mapping leaks a file descriptor for each empty file
            frames = fn.decoders.video(
                encoded,
                device=self.backend,
                start_frame=start,
                stride=self.window.stride,
                sequence_length=self.window.n_frames,
                pad_mode="edge",
            )
            video = fn.resize(
                frames, size=list(self.size), roi_start=roi_start, roi_end=roi_end, interp_type=types.INTERP_LINEAR, antialias=True
            )
            pipeline.set_outputs(video, step)
        return pipeline

    def batch_of(self, clips: list[Tensor | None]) -> Tensor:
        """Clips from anywhere as one batch on the device, zeros where there is none."""
        device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
        batch = torch.zeros(len(clips), self.window.n_frames, *self.size, 3, dtype=torch.uint8, device=device)
        for place, clip in zip(batch, clips, strict=True):
            if clip is not None:
                place.copy_(clip, non_blocking=True)
        return batch


def read_batches(
    batches: Iterable[list[Draw]],
    order,
    annotations: Annotations,
    window: Window,
    preprocessing: Preprocessing,
    threads: int,
    prefetch: int,
    device: torch.device,
) -> Batches:
    """Yield the batches with their video as uint8 `b f h w c` on `device`."""
    backend, device_id = ("mixed", device.index or 0) if device.type == "cuda" else ("cpu", None)
    graph = Graph(window, preprocessing.size, backend, device_id, threads)

    def prepare(draw: Draw) -> Request | Tensor:
        path = annotations.paths[draw.clip]
        length, height, width, is_for_dali = probe(path, backend)
        if not is_for_dali:
            clip = torch.empty(window.n_frames, *preprocessing.size, 3, dtype=torch.uint8, pin_memory=device.type == "cuda")
            read_clip(path, window, draw.uniform, preprocessing, clip)
            return clip
        geometry = preprocessing.geometry(height, width)
        return Request(path, window.start_frame(length, draw.uniform), geometry.roi_start, geometry.roi_end)

    with Faults(order) as faults:
        for draws, video, skipped in _decoded(graph, _prepared(batches, order, prepare, threads, prefetch), order, prepare, prefetch):
            faults.count(draws, skipped)
            yield ClipBatch.of(draws, annotations.labels, video=video, skipped=skipped)


def _prepared(batches: Iterable[list[Draw]], order, prepare, threads: int, prefetch: int) -> Iterator[Prepared]:
    """Probe the files of each batch ahead of the decoder."""

    def submit(pool: ThreadPoolExecutor, draws: list[Draw]) -> list[Future]:
        return [pool.submit(readable, order, draw, prepare) for draw in draws]

    for step, futures in enumerate(read_ahead(batches, submit, threads, ahead=prefetch)):
        results = [future.result() for future in futures]
        skipped = [fault for _, _, faults in results for fault in faults]
        yield Prepared(step, [draw for draw, _, _ in results], [clip for _, clip, _ in results], skipped)


Decoded = tuple[list[Draw], Tensor, Skipped]


def _decoded(graph: Graph, prepared: Iterator[Prepared], order, prepare, prefetch: int) -> Iterator[Decoded]:
    """Run the graph; a batch that it fails is redone clip by clip, and a new graph goes on behind it."""
    first = next(prepared, None)
    if first is None:
        return
    feed = Feed(itertools.chain([first], prepared))
    pipeline = graph.pipeline(feed, len(first.draws), prefetch)
    try:
        while True:
            try:
                video = _run(pipeline, feed)
            except DALI_ERRORS:
                video = None
            yield from _without_dali(graph, feed)
            batch = feed.in_flight.popleft()
            if video is None:
                feed.start_over()
                pipeline = graph.pipeline(feed, len(batch.draws), prefetch)
                yield _clip_by_clip(graph, batch, order, prepare)
            else:
                whole = len(batch.decoded) == len(batch.clips)
                yield batch.draws, video if whole else graph.batch_of(batch.filled(video)), batch.skipped
    except StopIteration:
        yield from _without_dali(graph, feed)
        if feed.error:
            raise feed.error from None
    finally:
        prepared.close()  # a pipeline is part of a cycle, and would keep the probing threads until it is collected


def _run(pipeline: Pipeline, feed: Feed) -> Tensor:
    video, step = pipeline.run()
    expected = next(batch.step for batch in feed.in_flight if batch.decoded)
    if not (step.as_array() == expected).all():
        raise AssertionError(f"DALI returned batch {step.as_array().tolist()} where {expected} was due")
    return torch.from_dlpack(video.as_tensor())


def _without_dali(graph: Graph, feed: Feed) -> Iterator[Decoded]:
    """The batches that come next and of which the graph was asked for no clip."""
    while feed.in_flight and not feed.in_flight[0].decoded:
        batch = feed.in_flight.popleft()
        yield batch.draws, graph.batch_of(batch.filled(None)), batch.skipped


def _clip_by_clip(graph: Graph, failed: Prepared, order, prepare) -> Decoded:
    """Redo a failed batch one clip at a time; no good clip is lost."""

    def decode(draw: Draw) -> Tensor:
        clip = prepare(draw)
        if not isinstance(clip, Request):
            return clip
        feed = Feed(iter([Prepared(draw.sample, [draw], [clip], [])]))
        try:
            return _run(graph.pipeline(feed, batch_size=1, ahead=1), feed)[0]
        except DALI_ERRORS as error:
            raise BadClip(clip.path, _reason(error)) from None

    results = [
        readable(order, draw, decode) if isinstance(clip, Request) else (draw, clip, [])
        for draw, clip in zip(failed.draws, failed.clips, strict=True)
    ]
    video = graph.batch_of([clip for _, clip, _ in results])
    return [draw for draw, _, _ in results], video, failed.skipped + [fault for _, _, faults in results for fault in faults]


@cache
def probe(path: str, backend: str) -> tuple[int, int, int, bool]:
    """(frames, height, width, whether DALI decodes it on this device) of a file from its header; the packets are counted where the header
    doesn't tell."""
    try:
        with open_video(path) as container:
            stream = video_stream(container)
            context = stream.codec_context
            length = stream.frames or sum(packet.size > 0 and is_shown(packet) for packet in container.demux(stream))
            if not length or not context.height or not context.width:
                raise ValueError("no video frames")
            obstacle = _obstacle(context, backend)
            if obstacle:
                _say_once(f"{obstacle}; PyAV decodes such clips on the CPU. The first: {path}", obstacle)
            return length, context.height, context.width, not obstacle
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


_said: set[str] = set()


def _say_once(message: str, about: str) -> None:
    if about not in _said:
        _said.add(about)
        logger.warning(message)


def _reason(error: Exception) -> str:
    """The line of DALI's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return f"DALI: {lines[telling]}"
