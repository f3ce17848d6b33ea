"""What happens to clips that can't be used: replaced or left out, logged, counted.

There are two reasons. An unreadable clip is a damaged file, no video, or missing. A short clip is fine but shorter than
the window; it is left out only if `dataset.short_clips` is "skip", else its last frame is repeated.

In training, which reads in random order, a clip that can't be used is replaced by the next one. Validation and encoding
read in the order of the file, and leave it out, marked invalid.

A run ends only if more than half of the clips can't be read. In training that is half of the clips opened so far,
checked from the 32nd on. In the order of the file it is half of the split, since rows sorted by class put the clips of
a missing folder side by side. Short clips are no sign of damage and don't count here: they end a run only if it finds
no other clip.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from flperf.data.samplers import ClipRequest, FrameSampling, Sampler, TrainingSampler
from flperf.errors import UserError

logger = logging.getLogger(__name__)

Reasons = list[tuple[str, str]]  # (path, reason)

MAX_UNREADABLE = 0.5  # a larger share of unreadable clips ends the run
MIN_OPENED = 32  # clips that training opens before it checks the share
MAX_SHORT = 256  # clips in a row that are too short or unreadable; more end the run
LISTED = 20  # clips named in an error
SHORTEN_WINDOW = "set dataset.short_clips=pad, a smaller dataset.n_frames or dataset.stride, or a larger dataset.fps"
NONE_USABLE = (
    "none of its clips could be used; warnings say which can't be read and which are shorter than the window "
    "(dataset.short_clips)"
)


class BadClip(Exception):
    """A clip that can't be read: `BadClip(path, reason)`."""


class ShortClip(BadClip):
    """A clip that is shorter than the window, where such clips are left out."""


def shortage(path: str, frame_sampling: FrameSampling, times: np.ndarray) -> Reasons:
    """[(path, what it lacks)] of a file that is shorter than the window, else []; `times` as for
    `FrameSampling.frames`. Raises `ShortClip` where such files are left out."""
    if not frame_sampling.is_short(len(times), float(times[-1])):
        return []
    distinct = len(set(frame_sampling.frames(times, 0.0)))
    ends = f"its {len(times)} frames end at {times[-1]:.2f} s"
    lack = f"{ends}: {distinct} distinct frames in a window of {frame_sampling.describe()}"
    if frame_sampling.short_clips == "skip":
        raise ShortClip(path, lack)
    return [(path, lack)]


@dataclass
class Reading:
    """What came of one request."""

    request: ClipRequest  # as it was read; invalid if nothing was
    unreadable: Reasons = field(default_factory=list)
    too_short: Reasons = field(default_factory=list)  # and therefore left out
    padded: Reasons = field(default_factory=list)  # the clip that was read, if it is short


class UnusableClips:
    """Counts the clips of one pass that can't be used, logs each unreadable path and the first short one, and raises
    `UserError` when there are too many."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.opened = 0
        self.unreadable = 0
        self.too_short = 0
        self.reasons: dict[str, str] = {}
        self.short_seen = False

    def count(self, readings: list[Reading]) -> None:
        """Add one batch."""
        for reading in readings:
            self.opened += reading.request.valid + len(reading.unreadable)
            self.unreadable += len(reading.unreadable)
            self.too_short += len(reading.too_short)
            self._log(reading)
        self._check()

    def _log(self, reading: Reading) -> None:
        done = "replaced by the next one" if self.sampler.replaces else "left out"
        for path, reason in reading.unreadable:
            if path not in self.reasons:
                self.reasons[path] = reason
                logger.warning("unreadable clip %s: %s: %s", done, path, reason)
        short = reading.too_short + reading.padded
        if short and not self.short_seen:
            self.short_seen = True
            done = done if reading.too_short else "padded with its last frame"
            logger.warning("short clip %s, the first of those that short_clips counts: %s: %s", done, *short[0])

    def _check(self) -> None:
        size = self.sampler.size
        if self.sampler.replaces:
            if self.opened >= MIN_OPENED and self.unreadable > MAX_UNREADABLE * self.opened:
                raise UserError(
                    f"{self.unreadable} of the first {self.opened} clips can't be read: {_listing(self.reasons)}"
                )
        elif self.unreadable > MAX_UNREADABLE * size:
            raise UserError(f"more than half of the {size} clips can't be read: {_listing(self.reasons)}")
        elif self.too_short and self.too_short + self.unreadable == size:
            others = f"; {self.unreadable} can't be read: {_listing(self.reasons)}" if self.unreadable else ""
            raise UserError(f"{self.too_short} of {size} clips are shorter than the window; {SHORTEN_WINDOW}{others}")

    def __enter__(self) -> "UnusableClips":
        return self

    def __exit__(self, kind, *_) -> None:
        """Log what a pass in the order of the file left out. Training has it in its metrics, an error in its text."""
        if self.sampler.replaces or kind not in (None, GeneratorExit):
            return
        seen = self.opened + self.too_short
        if self.unreadable:
            listing = _listing(self.reasons)
            logger.warning("%d of %d clips can't be read and are left out: %s", self.unreadable, seen, listing)
        if self.too_short:
            logger.warning("%d of %d clips are shorter than the window and are left out", self.too_short, seen)


def read_or_replace(sampler: Sampler, request: ClipRequest, read: Callable[[ClipRequest], Reasons]) -> Reading:
    """Call `read(request)`, which returns the clip if it was padded.

    In training the next attempts follow until a clip is usable; after MIN_OPENED unreadable or MAX_SHORT unusable clips
    in a row, or once every clip of a smaller source has failed, it raises `UserError`. In validation an unusable
    request comes back invalid.
    """
    reading = Reading(request)
    candidates = sampler.candidates(request.sample) if isinstance(sampler, TrainingSampler) else 1
    for _ in range(min(candidates, MAX_SHORT)):
        try:
            padded = read(reading.request)
            reading.padded = padded if reading.request.valid else []
            return reading
        except BadClip as error:
            reasons = reading.too_short if isinstance(error, ShortClip) else reading.unreadable
            reasons += [error.args] if reading.request.valid else []
        if not isinstance(sampler, TrainingSampler):
            reading.request = replace(request, valid=False)
            return reading
        if len(reading.unreadable) == MIN_OPENED:
            break
        reading.request = sampler.request(request.sample, reading.request.attempt + 1)
    raise UserError(_in_a_row(reading))


def _in_a_row(reading: Reading) -> str:
    """Why a run ends that finds no usable clip."""
    count, listing = len(reading.unreadable + reading.too_short), _listing(dict(reading.unreadable + reading.too_short))
    if not reading.too_short:
        return f"{count} clips in a row can't be read: {listing}"
    kinds = "can't be read or are shorter than the window" if reading.unreadable else "are shorter than the window"
    return f"{count} clips in a row {kinds}; {SHORTEN_WINDOW}: {listing}"


def _listing(reasons: dict[str, str]) -> str:
    listed = [f"{path}: {reason}" for path, reason in reasons.items()]
    more = len(listed) - LISTED
    return "; ".join(listed[:LISTED]) + (f"; and {more} more" if more > 0 else "")
