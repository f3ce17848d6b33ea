"""Batches of clips, read ahead by a pool of threads.

Each clip is one task, which writes its slot of a preallocated batch; a fixed number of batches is in flight. No task
waits for another, so nothing can hang, and closing or dropping the iterator cancels the tasks that have not started.
Video is decoded in processes, one for each thread, which then only waits (`flperf.data.workers`).
"""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from flperf.data.samplers import Batches, ClipBatch, ClipRequest, Sampler
from flperf.data.shared_memory import SharedMemory
from flperf.data.unreadable import BadClip, Reasons, UnusableClips, read_or_replace


@dataclass
class Slot:
    """Where a clip goes: into its part of the batch on the host, or into memory of its own on a GPU."""

    host: Tensor
    on_device: Tensor | None = None


class Reader(ABC):
    """Reads single clips of one split; several threads call it at once."""

    shape: tuple[int, ...]  # of one clip: `f h w c` of video, `t h w d` of latents
    dtype = torch.uint8
    field = "video"  # of `ClipBatch`; or "latents"
    device = torch.device("cpu")  # where its batches are
    memory: SharedMemory | None = None  # where its slots have to be, if not in any memory

    @abstractmethod
    def read(self, request: ClipRequest, slot: Tensor) -> Reasons | None:
        """Write a clip into `slot`, a tensor of `shape` with arbitrary content. Returns what `shortage` of
        `flperf.data.unreadable` does, if the file may be short. Raises `BadClip` if the clip can't be used, `UserError`
        to end the run."""

    def fill(self, request: ClipRequest, slot: Slot) -> Reasons:
        """`read`, or the same into `slot.on_device`."""
        return self.read(request, slot.host) or []

    def close(self) -> None:  # noqa: B027 (most readers have nothing to end)
        """End what reads, in the middle of a clip if need be."""


def load_batches(
    reader: Reader,
    requests: Iterable[list[ClipRequest]],
    sampler: Sampler,
    labels: list[int],
    threads: int,
    prefetch: int,
    device: torch.device,
) -> Batches:
    """Yield the requested batches, with the clips [b, …] on the reader's device; host memory is pinned if `device`, on
    which they will be used, is a GPU. Unusable clips of validation are zeros. In the end the reader is closed.

    `sampler` made the requests, which all have the same length; `labels` are those of all clips of the split.
    `prefetch` batches are read ahead, and at least two clips a thread: else threads would wait for the slowest clip.
    """
    requests = iter(requests)
    first = next(requests, None)
    if first is None:
        reader.close()
        return
    memory = BatchMemory(reader, len(first), device)
    ahead = max(prefetch, -(-2 * threads // len(first)))

    def submit(pool: ThreadPoolExecutor, batch: list[ClipRequest]):
        buffer = memory.take()
        tasks = [
            pool.submit(read_or_replace, sampler, request, partial(_read, reader, slot))
            for request, slot in zip(batch, buffer.slots, strict=True)
        ]
        return buffer, tasks

    with closing(reader), UnusableClips(sampler) as unusable:
        for buffer, tasks in read_ahead(itertools.chain([first], requests), submit, threads, ahead):
            readings = [task.result() for task in tasks]
            unusable.count(readings)
            content, on_release = memory.hand_over(buffer)
            yield ClipBatch.of(
                [reading.request for reading in readings],
                labels,
                skipped=[clip for reading in readings for clip in reading.unreadable],
                short=[clip for reading in readings for clip in reading.too_short + reading.padded],
                on_release=on_release,
                **{reader.field: content},
            )


def _read(reader: Reader, slot: Slot, request: ClipRequest) -> Reasons:
    slot.on_device = None
    try:
        return reader.fill(request, slot)
    except BadClip:
        slot.host.zero_()
        raise


@dataclass
class Buffer:
    """Memory for a batch on the host, and its slots."""

    tensor: Tensor  # [b, …]
    slots: list[Slot]
    release: Callable[[], object] | None  # gives the memory to a later batch

    @classmethod
    def of(cls, tensor: Tensor, release: Callable[[], object] | None) -> "Buffer":
        return cls(tensor, [Slot(part) for part in tensor], release)


class BatchMemory:
    """Memory for the batches of one stream.

    It is used again once a batch is released, since the page faults of fresh memory take longer than reading latents
    into it, except pinned memory from torch, whose allocator does the same and knows when a copy is done.
    """

    def __init__(self, reader: Reader, batch_size: int, device: torch.device):
        self.reader, self.shape = reader, (batch_size, *reader.shape)
        self.stream = torch.cuda.Stream(reader.device) if reader.device.type == "cuda" else None
        self.pinned = device.type == "cuda"
        self.released: list[Tensor] = []
        self.copied: deque[tuple[torch.cuda.Event, Buffer]] = deque()  # to the reader's device, and perhaps still read

    def take(self) -> Buffer:
        """Memory with arbitrary content."""
        if self.reader.memory:
            flat, release = self.reader.memory.take(torch.Size(self.shape).numel() * self.reader.dtype.itemsize)
            return Buffer.of(flat.view(self.reader.dtype).view(self.shape), release)
        if self.released:
            tensor = self.released.pop()
        else:
            tensor = torch.empty(self.shape, dtype=self.reader.dtype, pin_memory=self.pinned)
        return Buffer.of(tensor, None if self.pinned else partial(self.released.append, tensor))

    def hand_over(self, buffer: Buffer) -> tuple[Tensor, Callable[[], object] | None]:
        """A written batch [b, …] on the reader's device, ready for the current stream; and what releases it, if
        anything does."""
        if self.stream is None:
            return buffer.tensor, buffer.release
        while self.copied and self.copied[0][0].query():
            _, copied = self.copied.popleft()
            if copied.release:
                copied.release()
        computing = torch.cuda.current_stream(self.reader.device)
        with torch.cuda.stream(self.stream):
            batch = torch.empty(self.shape, dtype=self.reader.dtype, device=self.reader.device)
            if any(slot.on_device is None for slot in buffer.slots):
                batch.copy_(buffer.tensor, non_blocking=True)
            for part, slot in zip(batch, buffer.slots, strict=True):
                if slot.on_device is not None:
                    part.copy_(slot.on_device)
                    slot.on_device.record_stream(self.stream)
            event = self.stream.record_event()
        self.copied.append((event, buffer))
        computing.wait_event(event)
        batch.record_stream(computing)
        return batch, None


def read_ahead(tasks: Iterable, submit: Callable[[ThreadPoolExecutor, Any], Any], threads: int, ahead: int) -> Iterator:
    """Yield `submit(pool, task)` for each task in order; `ahead` more are submitted before one is yielded."""
    pool = ThreadPoolExecutor(threads, "flperf-data", use_one_thread, (torch.get_num_threads(),))
    pending = deque()
    try:
        for task in tasks:
            pending.append(submit(pool, task))
            if len(pending) > ahead:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        # Also reached when the iterator is closed or dropped. It does not wait: the garbage collector may run this in
        # one of the pool's own threads.
        pool.shutdown(wait=False, cancel_futures=True)


def use_one_thread(others: int) -> None:
    """Have torch's operators in this thread use no other threads: OpenMP teams that wait for each other on busy cores
    made decoding eight times slower. OpenMP keeps the number for each thread, but torch also keeps it as the default of
    new threads; a short-lived thread sets that back to `others`."""
    torch.get_num_threads()  # initialises this thread; a later initialisation would undo the next line
    torch.set_num_threads(1)
    restorer = Thread(target=torch.set_num_threads, args=(others,))
    restorer.start()
    restorer.join()
