"""Where clips come from: `open_dataset` looks the kind up in `DATASETS` and returns a train and a validation split
behind one batch contract. Decoders are imported when batches are asked for, since DALI alone takes a second to load.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flperf.config import Config
from flperf.config import Dataset as DatasetConfig
from flperf.data import latent_files as cache
from flperf.data import latent_shards
from flperf.data.annotations import CLIPS_FILE, LABELS_FILE, Annotations, existing_file, read_annotations, read_labels
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import Batches, BatchShare, ClipBatch, FrameSampling, TrainingSampler, ValidationSampler
from flperf.errors import UserError

__all__ = [
    "DATASETS",
    "ClipBatch",
    "Dataset",
    "BatchShare",
    "Preprocessing",
    "WITHOUT_VIDEO",
    "open_dataset",
    "prepare_dataset",
]

# Reads one split: (batches of draws, their order, split name, device) → batches.
Reader = Callable[[Iterator, TrainingSampler | ValidationSampler, str, torch.device], Batches]


@dataclass(frozen=True)
class Dataset:
    """Its splits, the names of their classes, and the orders in which they are read."""

    splits: dict[str, Annotations]  # "train", "validation"; drawn shapes have "visualisation", too
    classes: list[str]
    read: Reader
    seed: int
    latent_shape: tuple[int, int, int, int] | None = None  # (t, h, w, d) of cached latents
    # Mean and standard deviation [d] of cached latents, where they were taken while encoding.
    channel_statistics: tuple[Tensor, Tensor] | None = None
    frame_rate: Callable[[str], float] | None = None  # frames a second of a file, where clips are files of video

    @property
    def train_size(self) -> int:
        """Training clips."""
        return len(self.splits["train"])

    @property
    def validation_size(self) -> int:
        """Validation clips; 0 where there is no such split."""
        return len(self.splits["validation"])

    def train_batches(self, first_step: int, share: BatchShare, device: torch.device) -> Batches:
        """The endless stream of this process's micro batches from `first_step` on; `close()` ends its threads."""
        sampler = TrainingSampler(self.train_size, self.seed)
        return self.read(sampler.batches(first_step, share), sampler, "train", device)

    def validation_batches(
        self, share: BatchShare, batch_size: int, max_clips: int | None, device: torch.device
    ) -> Batches:
        """This process's share of the first `max_clips` clips: the same number of batches of the same size on every
        process."""
        sampler = ValidationSampler(min(self.validation_size, max_clips or self.validation_size))
        return self.read(sampler.batches(share, batch_size), sampler, "validation", device)

    def chosen_batches(
        self, groups: Iterable[Iterable[int]], batch_size: int, split: str, device: torch.device
    ) -> Batches:
        """The clips of each group in batches of one size; the last of a group is filled up with invalid ones."""
        sampler = ValidationSampler(len(self.splits[split]))
        return self.read(sampler.chosen(groups, batch_size), sampler, split, device)


def open_dataset(config: Config, preprocessing: Preprocessing | None, seed: int) -> Dataset:
    """Read the annotations that `config.dataset` names. `preprocessing` is the backbone's; cached latents need none.

    Raises `UserError` with one line that names the key or the row.
    """
    return _lookup(config.dataset)(config, preprocessing, seed)


def prepare_dataset(config: Config) -> None:
    """Write what a dataset needs and doesn't have: the demo's folder. Call it on one process of a machine, the others
    waiting.

    Raises `UserError` where a file of annotations is missing: here, before a hub is asked for a backbone.
    """
    dataset = config.dataset
    if dataset.kind == "demo" and not Path(_demo_csv(dataset)).is_file():
        from flperf.data.demo import write_demo

        write_demo(Path(_demo_csv(dataset)).parent)
    if dataset.kind in ("kinetics_400", "demo"):
        existing_file(dataset.train, "dataset.train", CLIPS_FILE)
        for key, what in (("validation", CLIPS_FILE), ("labels", LABELS_FILE)):
            if getattr(dataset, key):
                existing_file(getattr(dataset, key), f"dataset.{key}", what)


def _open_kinetics(config: Config, preprocessing: Preprocessing, seed: int) -> Dataset:
    dataset = config.dataset
    splits = _read_splits(dataset, lambda file, key: _read_videos(file, key, dataset.limit))
    starts = {"train": dataset.start, "validation": dataset.validation_start}

    def read(batches, sampler, split: str, device: torch.device) -> Batches:
        window = FrameSampling(dataset.n_frames, dataset.stride, starts[split])
        read_batches, threads = _decoder(dataset, device, sampler.replaces)
        return read_batches(batches, sampler, splits[split], window, preprocessing, threads, dataset.prefetch, device)

    return Dataset(splits, read_labels(dataset.labels, list(splits.values())), read, seed, frame_rate=_frame_rate)


def _frame_rate(path: str) -> float:
    from flperf.data.pyav import frame_rate

    return frame_rate(path)


def _open_cached(config: Config, preprocessing: None, seed: int) -> Dataset:
    """Shards that `flperf encode` wrote, or FutureLatents' files: the manifest's header tells which."""
    return (_open_shards if latent_shards.is_shards(config.dataset.train) else _open_files)(config, seed)


def _open_shards(config: Config, seed: int) -> Dataset:
    dataset = config.dataset
    caches = {"train": latent_shards.open_shards(dataset.train, config, dataset.limit)}
    if dataset.validation:
        manifest = existing_file(dataset.validation, "dataset.validation", "the manifest.csv that flperf encode wrote")
        caches["validation"] = latent_shards.open_shards(manifest, config, dataset.limit)
    splits = {"validation": Annotations([], [])} | {split: annotations for split, (_, annotations) in caches.items()}

    def read(batches, sampler, split: str, device: torch.device) -> Batches:
        return latent_shards.read_batches(
            batches, sampler, splits[split], caches[split][0], _threads(dataset), dataset.prefetch, device
        )

    shards = caches["train"][0]
    classes = read_labels(dataset.labels, list(splits.values()))
    return Dataset(splits, classes, read, seed, shards.shape, latent_shards.channel_statistics(shards))


def _open_files(config: Config, seed: int) -> Dataset:
    dataset = config.dataset
    splits = _read_splits(
        dataset, lambda file, key: cache.read_manifest(file, key, dataset.out_path_column, dataset.limit)
    )
    latent_format = cache.read_format(splits["train"].paths[0])

    def read(batches, sampler, split: str, device: torch.device) -> Batches:
        return cache.read_batches(
            batches, sampler, splits[split], latent_format, _threads(dataset), dataset.prefetch, device
        )

    return Dataset(splits, read_labels(dataset.labels, list(splits.values())), read, seed, latent_format.shape)


def _open_shapes(config: Config, preprocessing: Preprocessing, seed: int) -> Dataset:
    from flperf.data import bouncing_shapes as shapes

    dataset = config.dataset
    shapes.check(dataset.shapes)
    drawn = dataset.shapes
    sizes = {
        "train": drawn.train_clips,
        "validation": drawn.validation_clips,
        "visualisation": drawn.visualisation_clips,
    }
    # whatever the limit
    first_indices = {"train": 0, "validation": sizes["train"], "visualisation": sizes["train"] + sizes["validation"]}
    if dataset.limit:
        sizes = {split: min(size, dataset.limit) for split, size in sizes.items()}

    def read(batches, sampler, split: str, device: torch.device) -> Batches:
        labels, frames = splits[split].labels, (dataset.n_frames, dataset.stride)
        return shapes.read_batches(
            batches, labels, first_indices[split], dataset.shapes, seed, *frames, preprocessing.size, device
        )

    splits = {
        split: Annotations([f"bouncing_shapes/{split}/{i}" for i in range(size)], [0] * size)
        for split, size in sizes.items()
    }
    return Dataset(splits, ["bouncing shapes"], read, seed)


def _open_demo(config: Config, preprocessing: Preprocessing, seed: int) -> Dataset:
    _demo_csv(config.dataset)
    return _open_kinetics(config, preprocessing, seed)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "kinetics_400": _open_kinetics,
    "kinetics_400_cached": _open_cached,
    "bouncing_shapes": _open_shapes,
    "demo": _open_demo,
}

NVDEC_LANES = 4  # clips that NVDEC decodes at a time, beside PyAV; an H100 has seven decoders, an A100 five

WITHOUT_VIDEO = {"kinetics_400_cached"}  # kinds that hold latents, and need neither preprocessing nor an encoder


def _lookup(dataset: DatasetConfig) -> Callable[[Config, Preprocessing | None, int], Dataset]:
    if dataset.kind not in DATASETS:
        raise UserError(f"dataset.kind: {dataset.kind!r} is none of {', '.join(DATASETS)}")
    return DATASETS[dataset.kind]


def _read_videos(file: str | None, key: str, limit: int | None) -> Annotations:
    """A Kinetics CSV, or an index of one, which names no unusable file."""
    if file is not None and Path(file).is_file():
        from flperf.data import index

        if index.is_index(file):
            return index.read_index(file, limit)
    return read_annotations(file, key, limit)


def _read_splits(dataset: DatasetConfig, read: Callable[[str | None, str], Annotations]) -> dict[str, Annotations]:
    """Both splits; without a validation file an empty one."""
    train = read(dataset.train, "dataset.train")
    validation = read(dataset.validation, "dataset.validation") if dataset.validation else Annotations([], [])
    return {"train": train, "validation": validation}


def _demo_csv(dataset: DatasetConfig) -> str:
    if not dataset.train or Path(dataset.train).name != "train.csv":
        raise UserError(
            "dataset.train: for the demo it names train.csv in the folder to be written, such as data/demo/train.csv"
        )
    return dataset.train


def _decoder(dataset: DatasetConfig, device: torch.device, training: bool) -> tuple[Callable[..., Batches], int]:
    """`read_batches` of the decoder asked for, and how many threads it has. `auto` is PyAV, which NVDEC helps to
    train on a GPU: which of them reads a clip is left to chance there, and no other number should depend on it."""
    threads = _threads(dataset)
    if dataset.decoder == "dali":
        from flperf.data import dali

        return dali.read_batches, threads
    if dataset.decoder == "auto" and device.type == "cuda" and training:
        from flperf.data import dali

        return partial(dali.read_batches, lanes=NVDEC_LANES), threads + NVDEC_LANES
    from flperf.data import pyav

    return pyav.read_batches, threads


def _threads(dataset: DatasetConfig) -> int:
    """Decoding threads of this process: as asked, or its share of the cores among the processes of this machine."""
    # torchrun's, DeepSpeed's
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return dataset.threads or max(1, len(os.sched_getaffinity(0)) // local_processes)
