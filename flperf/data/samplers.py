"""The order in which clips are read, and what a batch of them holds.

Training is one endless stream of samples. Sample s is clip permutation(seed, s // N)[s % N] of N clips: every clip
comes once an epoch, batches straddle epochs, and resuming needs only the step. With several sources, sample s is the
j-th of source k (see `mixture`), and each source has permutations of its own. If a clip can't be read, attempt 1, 2, …
at the same sample takes the next clip of the permutation, which is the same on every machine. Validation has no
replacements: an unreadable clip is marked invalid.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from flperf.data.annotations import SourceClips
from flperf.data.mixture import Mixture

TIME_TOLERANCE = 2e-3  # seconds; see `time_tolerance`


@dataclass(frozen=True)
class BatchShare:
    """This process's share of each global batch. `batch_size` is the number of samples of one update, over all
    processes and accumulation steps."""

    rank: int
    world_size: int
    micro_batch_size: int
    batch_size: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one process in one update."""
        return self.batch_size // (self.micro_batch_size * self.world_size)


@dataclass(frozen=True)
class ClipRequest:
    """One clip to be read for sample `sample`: its index in the split, and where in the file to start."""

    sample: int
    attempt: int
    clip: int
    uniform: float  # in [0, 1): where a random start falls
    valid: bool


@dataclass
class ClipBatch:
    """One micro-batch with either `video` or `latents`. It stays as it is for as long as it is held, unless it is
    released. A copy to a GPU that does not wait (`non_blocking`) needs it until the copy is done; `prefetch_to_device`
    sees to that."""

    label: Tensor  # int64 b
    clip: Tensor  # int64 b: index in the split
    sample: Tensor  # int64 b: index in the training stream; in validation, the clip that was asked for
    valid: Tensor  # bool b; False for padding and for unreadable clips of validation, whose frames are zero
    video: Tensor | None = None  # uint8 b f h w c
    latents: Tensor | None = None  # b t h w d
    centres: Tensor | None = None  # fp32 b f 2 2: centres of drawn shapes, (x, y) in pixels of the canvas
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of unreadable clips
    # (path, length) of clips shorter than the window, whether they are padded or left out
    short: list[tuple[str, str]] = field(default_factory=list)
    on_release: Callable[[], None] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, requests: list[ClipRequest], labels: list[int], **content) -> "ClipBatch":
        """The batch of some requests. `labels` are those of all clips of the split, `content` the other fields."""
        return cls(
            label=torch.tensor([labels[request.clip] for request in requests]),
            clip=torch.tensor([request.clip for request in requests]),
            sample=torch.tensor([request.sample for request in requests]),
            valid=torch.tensor([request.valid for request in requests]),
            **content,
        )

    def release(self) -> None:
        """Give the memory of `video` or `latents` to a later batch; neither they nor views of them may be used any
        more. Batches of `prefetch_to_device` are released by it."""
        if self.on_release:
            self.on_release()
            self.on_release = None


Batches = Generator[ClipBatch, None, None]  # `close()` ends the threads that read ahead


class TrainingSampler:
    """The endless training stream of a split of `size` clips; a pure function of (seed, sample, attempt). Its sources
    are consecutive ranges of clips; without any, all clips are one source."""

    replaces = True  # an unreadable clip is replaced by the next attempt

    def __init__(self, size: int, seed: int, sources: Sequence[SourceClips] = ()):
        self.size, self.seed = size, seed
        self.sizes = [source.size for source in sources] or [size]
        self.firsts = [0, *itertools.accumulate(self.sizes[:-1])]  # the first clip of each source
        self.mixture = Mixture([source.weight for source in sources] or [1.0], seed)
        # The passes over a source are cached apart from the others': a small one changes its order often.
        self.permutations = [lru_cache(maxsize=2)(partial(self._permutation, k)) for k in range(len(self.sizes))]

    def request(self, sample: int, attempt: int = 0) -> ClipRequest:
        """The clip of a sample; attempts above 0 are replacements, from the same source."""
        source, number = self.mixture.place(sample)
        size = self.sizes[source]
        clip = self.firsts[source] + int(self.permutations[source](number // size)[(number + attempt) % size])
        # The trailing 1 keeps these numbers apart from those of the permutations.
        return ClipRequest(sample, attempt, clip, _uniform(self.seed, sample, attempt, 1), valid=True)

    def candidates(self, sample: int) -> int:
        """How many clips can take the place of a sample: those of its source."""
        return self.sizes[self.mixture.place(sample)[0]]

    def first_clips(self, count: int) -> list[int]:
        """The first `count` clips, or all if there are fewer; of several sources the first clips of each, in the
        proportions of the mixture."""
        counts = self.mixture.counts(min(count, self.size))
        taken = [range(first, first + min(*pair)) for first, *pair in zip(self.firsts, self.sizes, counts, strict=True)]
        return list(itertools.chain(*taken))

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        """The order of a source's clips in its pass number `epoch`."""
        # The first source has the order that it would have alone.
        entropy = (self.seed, epoch, source) if source else (self.seed, epoch)
        return np.random.default_rng(entropy).permutation(self.sizes[source])

    def batches(self, first_step: int, share: BatchShare) -> Iterator[list[ClipRequest]]:
        """The micro-batches of one rank from `first_step` on. Within a global batch, sample i of micro-batch a of rank
        r has index a * (m * w) + r * m + i, with micro-batches of m samples and w ranks."""
        stride = share.micro_batch_size * share.world_size
        step = first_step
        while True:
            for accumulation in range(share.accumulation_steps):
                first = step * share.batch_size + accumulation * stride + share.rank * share.micro_batch_size
                yield [self.request(sample) for sample in range(first, first + share.micro_batch_size)]
            step += 1


class ValidationSampler:
    """Clips 0 to size - 1 in order. The last batch is padded with the last clip, marked invalid: batches have one
    shape, and every rank has the same number of them."""

    replaces = False

    def __init__(self, size: int):
        self.size = size

    def request(self, sample: int) -> ClipRequest:
        """The clip with index `sample`; an invalid one past the end."""
        clip = min(sample, self.size - 1)
        return ClipRequest(sample, 0, clip, _uniform(clip, 0), valid=sample < self.size)

    def batches(self, share: BatchShare, batch_size: int) -> Iterator[list[ClipRequest]]:
        """The batches of one rank, of `batch_size` requests each."""
        for first in range(0, self.size, batch_size * share.world_size):
            start = first + share.rank * batch_size
            yield [self.request(sample) for sample in range(start, start + batch_size)]

    def chosen(self, groups: Iterable[Iterable[int]], batch_size: int) -> Iterator[list[ClipRequest]]:
        """The clips of each group in batches of `batch_size`; the last batch of a group is padded."""
        for group in groups:
            clips = list(group)
            for first in range(0, len(clips), batch_size):
                part = clips[first : first + batch_size]
                yield [self.request(clip) for clip in part + [self.size] * (batch_size - len(part))]


Sampler = TrainingSampler | ValidationSampler


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a file are read: the window of a clip.

    The window has `n_frames` frames, `stride` frames of the file apart. With `fps` it is by time instead: frame i is
    the last one shown at t + i / fps, where t is the time of the start frame; `stride` then has no meaning. `start` is
    "first", "random" or "center". A file shorter than the window repeats its last frame, or is left out if
    `short_clips` is "skip".
    """

    n_frames: int
    stride: int
    start: str
    fps: float | None = None
    short_clips: str = "pad"

    def is_short(self, frames: int, seconds: float) -> bool:
        """Whether a file is shorter than the window: one of `frames` frames, the last of which is shown `seconds` after
        the first. Without `fps` only the frames count, with it only the time."""
        if self.fps is None:
            return frames < self._frames_spanned
        return seconds + time_tolerance(self.fps) < self._seconds_spanned

    def frames(self, times: np.ndarray, uniform: float) -> list[int]:
        """Indices of all frames, ascending. `times` are those of every frame of the file in seconds since the first,
        fp64 [f], strictly ascending; `uniform` in [0, 1) is where a random start falls."""
        if self.fps is None:
            last = len(times) - 1
            first = self._start(last + 2 - self._frames_spanned, uniform)
            return [min(first + i * self.stride, last) for i in range(self.n_frames)]
        spare = times[-1] - self._seconds_spanned  # from the first frame to the last possible start
        if self.start == "center":
            first = frames_shown(times, np.array([max(spare, 0) / 2]), self.fps)[0]
        else:
            fitting = np.searchsorted(times, spare + time_tolerance(self.fps), side="right")
            first = self._start(int(fitting), uniform)
        return frames_shown(times, times[first] + np.arange(self.n_frames) / self.fps, self.fps).tolist()

    def describe(self) -> str:
        """The window in words."""
        if self.fps is None:
            return f"{self._frames_spanned} frames ({self.n_frames} at stride {self.stride})"
        return f"{self._seconds_spanned:.2f} s ({self.n_frames} frames, {self.fps:g} a second)"

    def _start(self, fitting: int, uniform: float) -> int:
        """The first frame, where the whole window fits at the first `fitting` frames of the file."""
        last = max(fitting - 1, 0)
        return {"first": 0, "center": last // 2, "random": int(uniform * (last + 1))}[self.start]

    @property
    def _frames_spanned(self) -> int:
        """Frames of a file from the first frame of the window to its last, both included."""
        return (self.n_frames - 1) * self.stride + 1

    @property
    def _seconds_spanned(self) -> float:
        """Seconds from the first frame of the window to its last."""
        assert self.fps is not None
        return (self.n_frames - 1) / self.fps


def frames_shown(times: np.ndarray, wanted: np.ndarray, fps: float) -> np.ndarray:
    """Indices int64 [n] of the last frames shown at the times `wanted` [n], which are `1 / fps` apart. `times` [f] are
    those of all frames, ascending; before the first frame the index is -1."""
    return np.searchsorted(times, wanted + time_tolerance(fps), side="right") - 1


def time_tolerance(fps: float) -> float:
    """Seconds that a frame may begin after a time and still count as shown at it.

    A file rounds its times to multiples of a unit: 1 ms in Matroska and FLV, 1/600 s in QuickTime. The distance of two
    frames is therefore wrong by up to one unit, either way. A clip at the file's own rate has every frame once if the
    tolerance is at least one unit, and less than a frame's duration minus one unit: 2 ms, or half a frame above 250
    frames a second.
    """
    return min(TIME_TOLERANCE, 0.5 / fps)


def _uniform(*entropy: int) -> float:
    """A number in [0, 1), a pure function of its arguments."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 11) / 2**53
