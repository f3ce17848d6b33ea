"""What happens to clips that can't be read: replaced or left out, logged, counted.

A run ends only if more than half of the clips can't be read. In training, which reads in random order, that is half of
the clips opened so far, checked from the 32nd on; an unreadable clip is replaced by the next one. Validation and
encoding read in the order of the file, and rows sorted by class put the clips of a missing folder side by side. There
it is half of the split; an unreadable clip is left out and marked invalid.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from flperf.data.samplers import ClipRequest, Sampler, TrainingSampler
from flperf.errors import UserError

logger = logging.getLogger(__name__)

Skipped = list[tuple[str, str]]  # (path, reason)

MAX_UNREADABLE = 0.5  # a larger share of unreadable clips ends the run
MIN_OPENED = 32  # clips that training opens before it checks the share
LISTED = 20  # clips named in an error


class BadClip(Exception):
    """A clip that can't be read: `BadClip(path, reason)`."""


class UnreadableClips:
    """Counts the unreadable clips of one pass, logs each path once, and raises `UserError` when there are too many."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.opened = 0
        self.unreadable = 0
        self.reasons: dict[str, str] = {}

    def count(self, requests: list[ClipRequest], skipped: Skipped) -> None:
        """Add one batch: the requests as they were read, and the clips that could not be."""
        self.opened += sum(request.valid for request in requests) + len(skipped)
        self.unreadable += len(skipped)
        done = "replaced by the next one" if self.sampler.replaces else "left out"
        for path, reason in skipped:
            if path not in self.reasons:
                self.reasons[path] = reason
                logger.warning("unreadable clip %s: %s: %s", done, path, reason)
        self._check()

    def _check(self) -> None:
        if self.sampler.replaces:
            if self.opened >= MIN_OPENED and self.unreadable > MAX_UNREADABLE * self.opened:
                raise UserError(
                    f"{self.unreadable} of the first {self.opened} clips can't be read: {_listing(self.reasons)}"
                )
        elif self.unreadable > MAX_UNREADABLE * self.sampler.size:
            raise UserError(f"more than half of the {self.sampler.size} clips can't be read: {_listing(self.reasons)}")

    def __enter__(self) -> "UnreadableClips":
        return self

    def __exit__(self, kind, *_) -> None:
        """Log what a pass in the order of the file left out. Training has it in its metrics, an error in its text."""
        if self.unreadable and not self.sampler.replaces and kind in (None, GeneratorExit):
            logger.warning(
                "%d of %d clips can't be read and are left out: %s",
                self.unreadable,
                self.opened,
                _listing(self.reasons),
            )


def read_or_replace(
    sampler: Sampler, request: ClipRequest, read: Callable[[ClipRequest], None]
) -> tuple[ClipRequest, Skipped]:
    """Call `read(request)`; returns the request that was read, and the clips that could not be.

    In training the next attempts follow until a clip is readable; after MIN_OPENED failures, or once every clip of a
    smaller source has failed, it raises `UserError`. In validation an unreadable request comes back invalid.
    """
    skipped: Skipped = []
    candidates = sampler.candidates(request.sample) if isinstance(sampler, TrainingSampler) else 1
    for _ in range(min(candidates, MIN_OPENED)):
        try:
            read(request)
            return request, skipped
        except BadClip as error:
            skipped += [error.args] if request.valid else []
        if not isinstance(sampler, TrainingSampler):
            return replace(request, valid=False), skipped
        request = sampler.request(request.sample, request.attempt + 1)
    raise UserError(f"{len(skipped)} clips in a row can't be read: {_listing(dict(skipped))}")


def _listing(reasons: dict[str, str]) -> str:
    listed = [f"{path}: {reason}" for path, reason in reasons.items()]
    more = len(listed) - LISTED
    return "; ".join(listed[:LISTED]) + (f"; and {more} more" if more > 0 else "")
