"""Which clip stands where: annotation files, and the order in which training and validation read them.

Training is one endless stream of samples. Sample s of the stream is clip permutation(seed, s // N)[s % N], so every
clip comes exactly once an epoch, batches straddle epochs, and resuming needs nothing but the step. A clip that can't
be read is replaced by attempt 1, 2, … at the same place, which takes the next clips of the permutation: the same
replacement on every machine. In validation it is not: its place is marked invalid.
"""

import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchShare:
    """A process among the others. `batch_size` counts the samples of one update over all processes and accumulation
    steps."""

    rank: int
    world_size: int
    micro_batch_size: int
    batch_size: int

    @property
    def accumulation_steps(self) -> int:
        """Micro batches of one process in one update."""
        return self.batch_size // (self.micro_batch_size * self.world_size)


@dataclass(frozen=True)
class ClipRequest:
    """What attempt `attempt` at `sample` reads: a row of the CSV, and where in the clip to start."""

    sample: int
    attempt: int
    clip: int
    uniform: float  # in [0, 1), for random starts
    valid: bool


@dataclass
class ClipBatch:
    """One micro batch. Either `video` or `latents` is there."""

    label: Tensor  # int64 b
    clip: Tensor  # int64 b, row in the CSV
    sample: Tensor  # int64 b, place in the stream; in validation the row asked for
    valid: Tensor  # bool b; False where validation is filled up or its clip could not be read, and its frames are black
    video: Tensor | None = None  # uint8 b f h w c
    latents: Tensor | None = None  # b t h w d
    centres: Tensor | None = None  # fp32 b f 2 2: where drawn shapes are, (x, y) in pixels of their canvas
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of the clips that could not be read

    @classmethod
    def of(cls, draws: list[ClipRequest], labels: list[int], **content) -> "ClipBatch":
        """The batch of some draws; labels: of all clips of the split; content: `video` or `latents`, and `skipped`."""
        return cls(
            label=torch.tensor([labels[draw.clip] for draw in draws]),
            clip=torch.tensor([draw.clip for draw in draws]),
            sample=torch.tensor([draw.sample for draw in draws]),
            valid=torch.tensor([draw.valid for draw in draws]),
            **content,
        )


Batches = Generator[ClipBatch, None, None]  # `close()` ends the threads that read ahead


class TrainingSampler:
    """The endless stream of one split; a pure function of (seed, sample, attempt)."""

    replaces = True  # a clip that can't be read, by the next attempts

    def __init__(self, size: int, seed: int):
        self.size = size
        self.permutation = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(size))
        self.seed = seed

    def draw(self, sample: int, attempt: int = 0) -> ClipRequest:
        """What stands at a place of the stream; later attempts are replacements."""
        clip = int(self.permutation(sample // self.size)[(sample + attempt) % self.size])
        # 1: no permutation's entropy
        return ClipRequest(sample, attempt, clip, _uniform(self.seed, sample, attempt, 1), valid=True)

    def batches(self, first_step: int, share: BatchShare) -> Iterator[list[ClipRequest]]:
        """The micro batches of one rank from `first_step` on: position = a * (m * w) + r * m + i in each global
        batch."""
        stride = share.micro_batch_size * share.world_size
        step = first_step
        while True:
            for accumulation in range(share.accumulation_steps):
                first = step * share.batch_size + accumulation * stride + share.rank * share.micro_batch_size
                yield [self.draw(sample) for sample in range(first, first + share.micro_batch_size)]
            step += 1


class ValidationSampler:
    """Clips 0 … size-1 in file order. The last batch is filled with the last clip, marked invalid, so that shapes
    never change and every rank has the same number of batches."""

    replaces = False

    def __init__(self, size: int):
        self.size = size

    def draw(self, sample: int) -> ClipRequest:
        """The clip of a row; rows beyond the end are invalid."""
        row = min(sample, self.size - 1)
        return ClipRequest(sample, 0, row, _uniform(row, 0), valid=sample < self.size)

    def batches(self, share: BatchShare, batch_size: int) -> Iterator[list[ClipRequest]]:
        """The batches of one rank, each of `batch_size` draws."""
        for first in range(0, self.size, batch_size * share.world_size):
            start = first + share.rank * batch_size
            yield [self.draw(sample) for sample in range(start, start + batch_size)]

    def chosen(self, groups: Iterable[Iterable[int]], batch_size: int) -> Iterator[list[ClipRequest]]:
        """The clips of each group; the last batch of a group is filled up as above."""
        for group in groups:
            clips = list(group)
            for first in range(0, len(clips), batch_size):
                part = clips[first : first + batch_size]
                yield [self.draw(clip) for clip in part + [self.size] * (batch_size - len(part))]


@dataclass(frozen=True)
class FrameSampling:
    """The frames taken from a file: `n_frames` at distance `stride`, placed by `start` ("first", "random" or
    "center")."""

    n_frames: int
    stride: int
    start: str

    def start_frame(self, length: int, uniform: float) -> int:
        """First frame in a file of `length` frames; 0 where the file is shorter than the window."""
        span = (self.n_frames - 1) * self.stride + 1
        slack = max(length - span, 0)
        return {"first": 0, "center": slack // 2, "random": int(uniform * (slack + 1))}[self.start]

    def frames(self, length: int, uniform: float) -> list[int]:
        """Indices of all frames; past the end of the file its last frame is repeated."""
        start = self.start_frame(length, uniform)
        return [min(start + i * self.stride, length - 1) for i in range(self.n_frames)]


def _uniform(*entropy: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 11) / 2**53
