"""Which clip stands where: annotation files, and the order in which training and validation read them.

Training is one endless stream of samples. Sample s of the stream is clip permutation(seed, s // N)[s % N], so every clip comes
exactly once an epoch, batches straddle epochs, and resuming needs nothing but the step. A clip that can't be read is replaced by
attempt 1, 2, … at the same place, which takes the next clips of the permutation: the same replacement on every machine. In validation
it is not: its place is marked invalid.
"""

import logging
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flperf.errors import UserError

logger = logging.getLogger(__name__)

CLIPS_FILE = "a Kinetics CSV (rows of 'path class_index')"
LABELS_FILE = "a labels file (rows of 'index name')"
MAX_CLASSES = 1_000_000  # a class index beyond is a slip, and names for all below it would fill the memory


@dataclass(frozen=True)
class Annotations:
    """Paths and class indices of the clips of one split, in the order of the file."""

    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Place:
    """A process among the others. `batch_size` counts the samples of one update over all processes and accumulation steps."""

    rank: int
    world_size: int
    micro_batch_size: int
    batch_size: int

    @property
    def accumulation_steps(self) -> int:
        """Micro batches of one process in one update."""
        return self.batch_size // (self.micro_batch_size * self.world_size)


@dataclass(frozen=True)
class Draw:
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
    def of(cls, draws: list[Draw], labels: list[int], **content) -> "ClipBatch":
        """The batch of some draws; labels: of all clips of the split; content: `video` or `latents`, and `skipped`."""
        return cls(
            label=torch.tensor([labels[draw.clip] for draw in draws]),
            clip=torch.tensor([draw.clip for draw in draws]),
            sample=torch.tensor([draw.sample for draw in draws]),
            valid=torch.tensor([draw.valid for draw in draws]),
            **content,
        )


Batches = Generator[ClipBatch, None, None]  # `close()` ends the threads that read ahead


class TrainingOrder:
    """The endless stream of one split; a pure function of (seed, sample, attempt)."""

    replaces = True  # a clip that can't be read, by the next attempts

    def __init__(self, size: int, seed: int):
        self.size = size
        self.permutation = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(size))
        self.seed = seed

    def draw(self, sample: int, attempt: int = 0) -> Draw:
        """What stands at a place of the stream; later attempts are replacements."""
        clip = int(self.permutation(sample // self.size)[(sample + attempt) % self.size])
        return Draw(sample, attempt, clip, _uniform(self.seed, sample, attempt, 1), valid=True)  # 1: no permutation's entropy

    def batches(self, first_step: int, place: Place) -> Iterator[list[Draw]]:
        """The micro batches of one rank from `first_step` on: position = a * (m * w) + r * m + i in each global batch."""
        stride = place.micro_batch_size * place.world_size
        step = first_step
        while True:
            for accumulation in range(place.accumulation_steps):
                first = step * place.batch_size + accumulation * stride + place.rank * place.micro_batch_size
                yield [self.draw(sample) for sample in range(first, first + place.micro_batch_size)]
            step += 1


class ValidationOrder:
    """Clips 0 … size-1 in file order. The last batch is filled with the last clip, marked invalid, so that shapes never change
    and every rank has the same number of batches."""

    replaces = False

    def __init__(self, size: int):
        self.size = size

    def draw(self, sample: int) -> Draw:
        """The clip of a row; rows beyond the end are invalid."""
        row = min(sample, self.size - 1)
        return Draw(sample, 0, row, _uniform(row, 0), valid=sample < self.size)

    def batches(self, place: Place, batch_size: int) -> Iterator[list[Draw]]:
        """The batches of one rank, each of `batch_size` draws."""
        for first in range(0, self.size, batch_size * place.world_size):
            start = first + place.rank * batch_size
            yield [self.draw(sample) for sample in range(start, start + batch_size)]

    def chosen(self, groups: Iterable[Iterable[int]], batch_size: int) -> Iterator[list[Draw]]:
        """The clips of each group; the last batch of a group is filled up as above."""
        for group in groups:
            clips = list(group)
            for first in range(0, len(clips), batch_size):
                part = clips[first : first + batch_size]
                yield [self.draw(clip) for clip in part + [self.size] * (batch_size - len(part))]


@dataclass(frozen=True)
class Window:
    """The frames taken from a file: `n_frames` at distance `stride`, placed by `start` ("first", "random" or "center")."""

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


def read_annotations(csv: str | None, key: str, limit: int | None) -> Annotations:
    """A Kinetics CSV: `path class_index` a row, separated by the last space; paths are relative to the CSV. A clip named twice is kept
    once. Raises `UserError` that names the row."""
    folder = os.path.dirname(csv or "")
    clips: dict[str, tuple[int, int]] = {}  # path → (row, class)
    rows = 0
    for row, line in _rows(csv, key, CLIPS_FILE):
        path, _, label = line.rpartition(" ")
        path = path.rstrip()
        if not path or not label.isdecimal():
            raise UserError(f"{csv}: row {row}: expected 'path class_index', got {line[:200]!r}")
        if len(label) > 18 or int(label) >= MAX_CLASSES:
            raise UserError(f"{csv}: row {row}: class index {label[:40]} is above {MAX_CLASSES - 1}; number the classes from 0")
        first_row, first_label = clips.setdefault(path, (row, int(label)))
        if first_label != int(label):
            raise UserError(f"{csv}: row {row}: {path} has class {label} here but {first_label} in row {first_row}")
        rows += 1
    if not clips:
        raise UserError(f"{csv}: holds no clips")
    if rows > len(clips):
        logger.warning("%s: %d rows name a clip again and are left out", csv, rows - len(clips))
    paths, labels = [os.path.join(folder, path) for path in clips], [label for _, label in clips.values()]
    return Annotations(paths[:limit], labels[:limit])


def read_labels(csv: str | None, annotations: list[Annotations], key: str = "dataset.labels") -> list[str]:
    """Class names by index from a file of `index name` rows; the indices themselves where there is no file."""
    highest = max(max(split.labels, default=0) for split in annotations)
    if csv is None:
        return [str(index) for index in range(highest + 1)]
    names = {}
    for row, line in _rows(csv, key, LABELS_FILE):
        index, _, name = line.partition(" ")
        if not index.isdecimal() or not name:
            raise UserError(f"{csv}: row {row}: expected 'index name', got {line!r}")
        names[int(index)] = name.strip()
    if highest not in names or names.keys() != set(range(len(names))):
        raise UserError(f"{csv}: must name every class from 0 to {highest} or more, names {len(names)}")
    return [names[index] for index in range(len(names))]


def existing_file(file: str | None, key: str, what: str) -> str:
    """The file that a key names. Raises `UserError` where there is none, and says to point the key to `what`."""
    if file is None or not Path(file).is_file():
        state = "is not set" if file is None else f"there is no file {file}"
        raise UserError(f"{key}: {state}; point it to {what}")
    return file


def has_header(file: str | None, columns: list[str]) -> bool:
    """Whether there is such a CSV and its first line names these columns, which tells its format. Files that are no text have none."""
    if file is None or not Path(file).is_file():
        return False
    with open(file, "rb") as lines:
        return lines.readline(1000).decode("utf-8-sig", errors="replace").strip() == ",".join(columns)


def _uniform(*entropy: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 11) / 2**53


def _rows(file: str | None, key: str, what: str) -> Iterator[tuple[int, str]]:
    """(row, text) of the lines that aren't empty; rows count from 1. A byte order mark, as Excel writes it, is no part of the text."""
    with open(existing_file(file, key, what), encoding="utf-8-sig") as lines:
        try:
            for row, line in enumerate(lines, start=1):
                if line.strip():
                    yield row, line.strip()
        except UnicodeDecodeError:
            raise UserError(f"{file}: is no text in UTF-8; save it as UTF-8, or point {key} to {what}") from None
