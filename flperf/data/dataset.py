"""A dataset: its splits, and the batches of their clips in the order of a sampler."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flperf.config import Dataset as DatasetConfig
from flperf.data.annotations import Annotations, SourceClips
from flperf.data.cores import reading_cores
from flperf.data.loader import Reader, load_batches
from flperf.data.samplers import Batches, BatchShare, ClipRequest, Sampler, TrainingSampler, ValidationSampler
from flperf.data.short_clips import ShortClips

# (requested batches, the sampler that made them, split, device on which they will be used) → batches
Load = Callable[[Iterator[list[ClipRequest]], Sampler, str, torch.device], Batches]


@dataclass(frozen=True)
class Dataset:
    """The clips of all splits, and how they are loaded."""

    splits: dict[str, Annotations]  # "train" and "validation"; drawn shapes also have "visualisation"
    load: Load
    seed: int
    latent_shape: tuple[int, int, int, int] | None = None  # (t, h, w, d) of cached latents
    channel_statistics: tuple[Tensor, Tensor] | None = None  # mean and standard deviation [d] taken while encoding
    frame_rate: Callable[[str], float] | None = None  # frames a second of a file, if clips are video files
    short: dict[str, ShortClips] = field(default_factory=dict)  # by split or source, of video files

    @property
    def train_size(self) -> int:
        """Number of training clips of all sources, which is the number of samples in an epoch."""
        return len(self.splits["train"])

    @property
    def validation_size(self) -> int:
        """Number of validation clips; 0 without such a split."""
        return len(self.splits["validation"])

    @property
    def training_sampler(self) -> TrainingSampler:
        """The order of the training clips."""
        return TrainingSampler(self.train_size, self.seed, self.splits["train"].sources)

    def train_batches(self, first_step: int, share: BatchShare, device: torch.device) -> Batches:
        """The endless stream of this process's micro-batches from `first_step` on; `close()` ends its threads."""
        sampler = self.training_sampler
        return self.load(sampler.batches(first_step, share), sampler, "train", device)

    def validation_batches(
        self, share: BatchShare, batch_size: int, max_clips: int | None, device: torch.device
    ) -> Batches:
        """This process's share of the first `max_clips` clips. All processes get the same number of batches, all of
        the same size."""
        sampler = ValidationSampler(min(self.validation_size, max_clips or self.validation_size))
        return self.load(sampler.batches(share, batch_size), sampler, "validation", device)

    def chosen_batches(
        self, groups: Iterable[Iterable[int]], batch_size: int, split: str, device: torch.device
    ) -> Batches:
        """The clips of each group in batches of one size; the last batch of a group is padded with invalid clips."""
        sampler = ValidationSampler(len(self.splits[split]))
        return self.load(sampler.chosen(groups, batch_size), sampler, split, device)


def load_with(
    open_reader: Callable[[str, torch.device, bool, int], Reader],
    splits: dict[str, Annotations],
    dataset: DatasetConfig,
) -> Load:
    """Load batches in `dataset.threads` threads with the reader that `open_reader` returns for a split, the device on
    which batches will be used, whether they are for training, and the number of threads."""

    def load(requests: Iterator[list[ClipRequest]], sampler: Sampler, split: str, device: torch.device) -> Batches:
        threads = dataset.threads or reading_cores(device)[0]
        reader = open_reader(split, device, sampler.replaces, threads)
        return load_batches(reader, requests, sampler, splits[split].labels, threads, dataset.prefetch, device)

    return load


def read_splits(dataset: DatasetConfig, read: Callable[[str | None, str], Annotations]) -> dict[str, Annotations]:
    """Both splits by `read(file, key)`; an empty one without a validation file."""
    train = join_sources(dataset, [read(file, key) for file, key in training_files(dataset)])
    validation = read(dataset.validation, "dataset.validation") if dataset.validation else Annotations([], [])
    return {"train": train, "validation": validation}


def training_files(dataset: DatasetConfig) -> list[tuple[str | None, str]]:
    """(file, key) of the training split: `dataset.train`, or each of `dataset.sources`."""
    if dataset.sources:
        return [(source.train, f"dataset.sources[{k}].train") for k, source in enumerate(dataset.sources)]
    return [(dataset.train, "dataset.train")]


def join_sources(dataset: DatasetConfig, parts: Sequence[Annotations]) -> Annotations:
    """The training split of the clips of each file of `training_files`."""
    if not dataset.sources:
        return parts[0]
    sources = [
        SourceClips(source.train, len(part), source.weight) for source, part in zip(dataset.sources, parts, strict=True)
    ]
    paths = [path for part in parts for path in part.paths]
    return Annotations(paths, [label for part in parts for label in part.labels], tuple(sources))
