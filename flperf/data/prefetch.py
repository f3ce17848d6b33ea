"""Batches read ahead by a pool of threads, and what happens to clips that can't be read.

Each clip is one task that writes its own slot of a preallocated batch, and a stated number of batches is in flight.
There is no queue on which a thread could wait for another, so nothing can hang: tasks end by themselves, and closing
or dropping the iterator cancels those that have not begun.

Clips that can't be read do not end a run unless more than half of them can't. In training, whose order is random,
that is half of the clips opened so far, once 32 were; an unreadable clip is replaced by the next one. Where clips are
read in the order of the file, as in validation and encoding, it is half of the split, since rows sorted by class put
the clips of a missing folder side by side; an unreadable clip is left out, its place marked invalid.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from flperf.data.samplers import Batches, ClipBatch, ClipRequest, TrainingSampler, ValidationSampler
from flperf.errors import UserError

logger = logging.getLogger(__name__)

Skipped = list[tuple[str, str]]  # (path, reason)

MAX_BAD_SHARE = 0.5  # more unreadable clips than this share end the run
MIN_OPENED = 32  # in training, once so many were opened
LISTED = 20  # bad clips named in an error


class BadClip(Exception):
    """A clip that can't be read: `BadClip(path, reason)`."""


class Faults:
    """Counts the unreadable clips of one pass over an order, logs each path once, and ends the run when they are too
    many."""

    def __init__(self, sampler: TrainingSampler | ValidationSampler):
        self.sampler = sampler
        self.opened = 0
        self.bad = 0
        self.reasons: dict[str, str] = {}

    def count(self, draws: list[ClipRequest], skipped: Skipped) -> None:
        """The draws of a batch as they were read, and the clips that could not be."""
        self.opened += sum(draw.valid for draw in draws) + len(skipped)
        self.bad += len(skipped)
        for path, reason in skipped:
            if path not in self.reasons:
                self.reasons[path] = reason
                logger.warning(
                    "unreadable clip %s: %s: %s",
                    "replaced by the next one" if self.sampler.replaces else "left out",
                    path,
                    reason,
                )
        if self.sampler.replaces and self.opened >= MIN_OPENED and self.bad > MAX_BAD_SHARE * self.opened:
            raise UserError(f"{self.bad} of the first {self.opened} clips can't be read: {_listing(self.reasons)}")
        if not self.sampler.replaces and self.bad > MAX_BAD_SHARE * self.sampler.size:
            raise UserError(f"more than half of the {self.sampler.size} clips can't be read: {_listing(self.reasons)}")

    def __enter__(self) -> "Faults":
        return self

    def __exit__(self, kind, *_) -> None:
        """At the end of a pass in the order of the file, say what was left out; training says it in its metrics, an
        error in itself."""
        if self.bad and not self.sampler.replaces and kind in (None, GeneratorExit):
            logger.warning(
                "%d of %d clips can't be read and are left out: %s", self.bad, self.opened, _listing(self.reasons)
            )


def _listing(reasons: dict[str, str]) -> str:
    listed = [f"{path}: {reason}" for path, reason in reasons.items()]
    more = len(listed) - LISTED
    return "; ".join(listed[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def readable(sampler, draw: ClipRequest, read: Callable[[ClipRequest], Any]) -> tuple[ClipRequest, Any, Skipped]:
    """Read the clip of `draw`: (its draw, what `read` returned, skipped).

    Where the order replaces clips that can't be read, the next attempts at the place follow until one is readable;
    gives up with a `UserError` when MIN_OPENED attempts, or every clip of a smaller dataset, failed. Elsewhere the
    draw comes back invalid, with None.
    """
    skipped: Skipped = []
    for _ in range(min(sampler.size, MIN_OPENED)):
        try:
            return draw, read(draw), skipped
        except BadClip as fault:
            skipped += [fault.args] if draw.valid else []
        if not sampler.replaces:
            return replace(draw, valid=False), None, skipped
        draw = sampler.draw(draw.sample, draw.attempt + 1)
    raise UserError(f"{len(skipped)} clips in a row can't be read: {_listing(dict(skipped))}")


def read_ahead(tasks: Iterable, submit: Callable[[ThreadPoolExecutor, Any], Any], threads: int, ahead: int) -> Iterator:
    """Yield `submit(pool, task)` for each task in order, with `ahead` more submitted behind the one handed out."""
    pool = ThreadPoolExecutor(threads, "flperf-data", _compute_alone, (torch.get_num_threads(),))
    pending = deque()
    try:
        for task in tasks:
            pending.append(submit(pool, task))
            if len(pending) > ahead:
                yield pending.popleft()
        while pending:
            yield pending.popleft()
    finally:
        # also where the iterator is closed or dropped; no waiting, since a dropped one may be collected in a pool's
        # thread
        pool.shutdown(wait=False, cancel_futures=True)


def _compute_alone(others: int) -> None:
    """Make torch's operators in this thread use this thread only: teams of OpenMP that wait for each other on busy
    cores made decoding eight times slower. The number is OpenMP's own for each thread, but torch also keeps it for
    threads to come, where a passing thread puts `others` back."""
    torch.get_num_threads()  # initialises the thread, which would otherwise happen later and undo the next line
    torch.set_num_threads(1)
    restorer = Thread(target=torch.set_num_threads, args=(others,))
    restorer.start()
    restorer.join()


class Buffers:
    """Batches in host memory, of one size. A batch that nobody holds any more is written anew: fresh memory comes
    page by page, which takes longer than reading latents does. Pinned memory is left to torch, whose allocator knows
    when a copy to the device has ended."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.pinned = shape, dtype, device.type == "cuda"
        self.kept: list[Tensor] = []

    def take(self, b: int) -> Tensor:
        """A tensor [b, *shape] with whatever is in it."""
        if self.pinned:
            return torch.empty(b, *self.shape, dtype=self.dtype, pin_memory=True)
        for buffer in self.kept:
            # Held by `buffer` and, for the length of this line, by the storage that is asked.
            if len(buffer) == b and torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) == 2:
                return buffer.view_as(buffer)
        self.kept.append(torch.empty(b, *self.shape, dtype=self.dtype))
        return self.kept[-1].view_as(self.kept[-1])

    def writing(self) -> AbstractContextManager:
        """What a thread is in while it writes a slot."""
        return nullcontext()

    def hand_over(self, buffer: Tensor) -> Tensor:
        """A batch whose slots are all written, for the stream that computes."""
        return buffer


def filled_buffers(
    batches: Iterable[list[ClipRequest]],
    sampler,
    buffers: Buffers,
    fill: Callable[[ClipRequest, Tensor], None],
    threads: int,
    ahead: int,
) -> Iterator[tuple[list[ClipRequest], Tensor, Skipped]]:
    """Have `fill(draw, slot)` write every clip of a batch into its slot of a buffer `b …`, in a pool of threads,
    `ahead` batches in advance, or as many as hold two clips for every thread; the slot of a clip that can't be read
    is zeros."""

    def filling(slot: Tensor) -> Callable[[ClipRequest], None]:
        def fill_or_blank(draw: ClipRequest) -> None:
            with buffers.writing():
                try:
                    fill(draw, slot)
                except BadClip:
                    slot.zero_()
                    raise

        return fill_or_blank

    def submit(pool: ThreadPoolExecutor, draws: list[ClipRequest]) -> tuple[Tensor, list[Future]]:
        buffer = buffers.take(len(draws))
        return buffer, [
            pool.submit(readable, sampler, draw, filling(slot)) for draw, slot in zip(draws, buffer, strict=True)
        ]

    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    # else threads would wait for the slowest clip
    ahead = max([ahead, *(-(-2 * threads // len(draws)) for draws in first)])
    with Faults(sampler) as faults:
        for buffer, futures in read_ahead(itertools.chain(first, batches), submit, threads, ahead):
            results = [future.result() for future in futures]
            draws = [draw for draw, _, _ in results]
            skipped = [fault for _, _, faults_of_one in results for fault in faults_of_one]
            faults.count(draws, skipped)
            yield draws, buffers.hand_over(buffer), skipped


def prefetch_to_device(batches: Batches, device: torch.device) -> Batches:
    """The same batches with `video` or `latents` on the device; on a CPU they pass as they are. Closing it closes
    `batches`."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    with closing(batches):
        copies = (_copy(batch, device, stream) for batch in batches)
        current = next(copies, None)
        while current is not None:
            following = next(copies, None)
            yield _arrived(*current)
            current = following


def _copy(batch: ClipBatch, device: torch.device, stream: torch.cuda.Stream) -> tuple[ClipBatch, torch.cuda.Event]:
    """Begin to copy: the batch as it will be, and the event after which it is."""
    found = {name: getattr(batch, name) for name in ("video", "latents") if getattr(batch, name) is not None}
    with torch.cuda.stream(stream):
        copied = {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}
        return replace(batch, **copied), stream.record_event()


def _arrived(batch: ClipBatch, event: torch.cuda.Event) -> ClipBatch:
    """Have the stream that computes wait for the copy, and the copy's memory stay until that stream is done with it."""
    computing = torch.cuda.current_stream()
    computing.wait_event(event)
    for tensor in (batch.video, batch.latents):
        if tensor is not None:
            tensor.record_stream(computing)
    return batch
