"""Batches of clips, read ahead by a pool of threads.

Each clip is one task, which writes its slot of a preallocated batch; a fixed number of batches is in flight. No task
waits for another, so nothing can hang, and closing or dropping the iterator cancels the tasks that have not started.
"""

import itertools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from flperf.data.samplers import Batches, ClipBatch, ClipRequest, Sampler
from flperf.data.unreadable import BadClip, Reasons, UnusableClips, read_or_replace


class Reader(ABC):
    """Reads single clips of one split; several threads call it at once."""

    shape: tuple[int, ...]  # of one clip: `f h w c` of video, `t h w d` of latents
    dtype = torch.uint8
    field = "video"  # of `ClipBatch`; or "latents"
    device = torch.device("cpu")  # where it writes; on a GPU the current stream is the loader's own
    extra_threads = 0  # beside those that were asked for

    @abstractmethod
    def read(self, request: ClipRequest, slot: Tensor) -> Reasons | None:
        """Write a clip into `slot`, a tensor of `shape` with arbitrary content. Returns what `shortage` of
        `flperf.data.unreadable` does, if the file may be short. Raises `BadClip` if the clip can't be used, `UserError`
        to end the run."""


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
    which they will be used, is a GPU. Unusable clips of validation are zeros.

    `sampler` made the requests, which all have the same length; `labels` are those of all clips of the split.
    `prefetch` batches are read ahead, and at least two clips a thread: else threads would wait for the slowest clip.
    """
    requests = iter(requests)
    first = next(requests, None)
    if first is None:
        return
    memory = BatchMemory(reader, len(first), device)
    threads += reader.extra_threads
    ahead = max(prefetch, -(-2 * threads // len(first)))

    def submit(pool: ThreadPoolExecutor, batch: list[ClipRequest]):
        buffer = memory.take()
        tasks = [
            pool.submit(read_or_replace, sampler, request, partial(_read, reader, memory, slot))
            for request, slot in zip(batch, buffer, strict=True)
        ]
        return buffer, tasks

    with UnusableClips(sampler) as unusable:
        for buffer, tasks in read_ahead(itertools.chain([first], requests), submit, threads, ahead):
            readings = [task.result() for task in tasks]
            unusable.count(readings)
            yield ClipBatch.of(
                [reading.request for reading in readings],
                labels,
                skipped=[clip for reading in readings for clip in reading.unreadable],
                short=[clip for reading in readings for clip in reading.too_short + reading.padded],
                on_release=memory.hand_over(buffer),
                **{reader.field: buffer},
            )


def _read(reader: Reader, memory: "BatchMemory", slot: Tensor, request: ClipRequest) -> Reasons:
    with memory.writing():
        try:
            return reader.read(request, slot) or []
        except BadClip:
            slot.zero_()
            raise


class BatchMemory:
    """Memory for the batches of one stream.

    Pageable memory is used again once a batch is released, since the page faults of fresh memory take longer than
    reading latents into it. Pinned memory and a GPU's come from torch, whose allocators keep them and know when a copy
    or kernel is done with them. A GPU's memory is written on a stream of its own, beside the one that computes.
    """

    def __init__(self, reader: Reader, batch_size: int, device: torch.device):
        self.shape, self.dtype, self.device = (batch_size, *reader.shape), reader.dtype, reader.device
        self.stream = torch.cuda.Stream(reader.device) if reader.device.type == "cuda" else None
        self.pinned = self.stream is None and device.type == "cuda"
        self.released: list[Tensor] = []

    def writing(self) -> AbstractContextManager:
        """The context in which a thread writes a slot."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def take(self) -> Tensor:
        """A tensor [b, …] with arbitrary content."""
        if self.released:
            return self.released.pop()
        with self.writing():
            return torch.empty(self.shape, dtype=self.dtype, device=self.device, pin_memory=self.pinned)

    def hand_over(self, buffer: Tensor) -> Callable[[], None] | None:
        """Make a written batch [b, …] ready for the current stream; returns what releases it, if anything does."""
        if self.stream is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.stream)
            buffer.record_stream(computing)
        reused = self.stream is None and not self.pinned
        return partial(self.released.append, buffer) if reused else None


def read_ahead(tasks: Iterable, submit: Callable[[ThreadPoolExecutor, Any], Any], threads: int, ahead: int) -> Iterator:
    """Yield `submit(pool, task)` for each task in order; `ahead` more are submitted before one is yielded."""
    pool = ThreadPoolExecutor(threads, "flperf-data", _use_one_thread, (torch.get_num_threads(),))
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


def _use_one_thread(others: int) -> None:
    """Have torch's operators in this thread use no other threads: OpenMP teams that wait for each other on busy cores
    made decoding eight times slower. OpenMP keeps the number for each thread, but torch also keeps it as the default of
    new threads; a short-lived thread sets that back to `others`."""
    torch.get_num_threads()  # initialises this thread; a later initialisation would undo the next line
    torch.set_num_threads(1)
    restorer = Thread(target=torch.set_num_threads, args=(others,))
    restorer.start()
    restorer.join()


def cores_per_process() -> int:
    """This process's share of the cores, at least one: its processor affinity divided by the number of processes that
    torchrun (LOCAL_WORLD_SIZE) or DeepSpeed (LOCAL_SIZE) started on this machine, else by all processes."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    processes = next((int(os.environ[name]) for name in names if os.environ.get(name)), 1)
    return max(1, len(os.sched_getaffinity(0)) // processes)
