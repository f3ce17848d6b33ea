"""A dataset of cached latents in the shards that `flperf encode` writes (see `latent_shards`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from flperf.config import Config, differences
from flperf.data.annotations import Annotations, class_index, read_labels
from flperf.data.dataset import Dataset, join_sources, load_with, training_files
from flperf.data.latent_shards import COLUMNS, Shard, check_row, identity, is_shards, open_shard, read_row, shard_path
from flperf.data.loader import Reader
from flperf.data.mixture import shares
from flperf.data.samplers import ClipRequest
from flperf.data.text_files import csv_rows, existing_file
from flperf.errors import UserError

MANIFEST_FILE = "the manifest.csv that flperf encode wrote"


@dataclass(frozen=True)
class Shards:
    """One split of a cache."""

    files: dict[Path, Shard]
    rows: list[tuple[Path, int]]  # shard and row of each clip
    shape: tuple[int, int, int, int]  # t h w d, of every shard
    dtype: torch.dtype


def open_shard_dataset(config: Config, seed: int) -> Dataset:
    """The splits whose manifests `config.dataset` names, with statistics of the training split's channels."""
    dataset = config.dataset

    def opened(file: str | None, key: str) -> tuple[Shards, Annotations]:
        return open_shards(existing_file(file, key, MANIFEST_FILE), config, dataset.limit, key)

    sources, annotations = zip(*(opened(file, key) for file, key in training_files(dataset)), strict=True)
    caches, splits = {"train": join_shards(sources)}, {"train": join_sources(dataset, annotations)}
    splits["validation"] = Annotations([], [])
    if dataset.validation:
        caches["validation"], splits["validation"] = opened(dataset.validation, "dataset.validation")
    read_labels(dataset.labels, list(splits.values()))  # raises if it is incomplete
    readers = {split: ShardReader(shards) for split, shards in caches.items()}
    load = load_with(lambda split, *_: readers[split], splits, dataset)
    statistics = channel_statistics(sources, [source.weight for source in dataset.sources or []] or [1.0])
    return Dataset(splits, load, seed, latent_shape=caches["train"].shape, channel_statistics=statistics)


def join_shards(sources: Sequence[Shards]) -> Shards:
    """All sources as one, their clips one after another. Raises `UserError` if they were encoded differently."""
    path, first = next(iter(sources[0].files.items()))
    for source in sources[1:]:
        other_path, other = next(iter(source.files.items()))
        changed = differences(_encoding(first), _encoding(other))
        if changed:
            raise UserError(
                f"{other_path}: was encoded differently from {path} ({'; '.join(changed)}); sources need one encoding"
            )
    files = {path: shard for source in sources for path, shard in source.files.items()}
    return Shards(files, [row for source in sources for row in source.rows], sources[0].shape, sources[0].dtype)


class ShardReader(Reader):
    """Reads latents `t h w d`, and checks each row the first time that this process reads it."""

    field = "latents"

    def __init__(self, shards: Shards):
        self.shards, self.shape, self.dtype = shards, shards.shape, shards.dtype
        self.checked = bytearray(len(shards.rows))  # 1 once a clip's checksum was right

    def read(self, request: ClipRequest, slot: Tensor) -> None:
        path, row = self.shards.rows[request.clip]
        shard = self.shards.files[path]
        read_row(path, shard, row, slot)
        if not self.checked[request.clip]:
            check_row(path, shard, row, slot)
            self.checked[request.clip] = 1


def open_shards(
    manifest: str, config: Config, limit: int | None, key: str = "dataset.train"
) -> tuple[Shards, Annotations]:
    """Open the first `limit` clips of a split by its manifest, which `key` names.

    Raises `UserError` if a row or a shard can't be used, if shards differ, or if their encoding is not the configured
    one.
    """
    rows = list(islice(_manifest_rows(manifest, key), limit))
    if not rows:
        raise UserError(f"{manifest}: holds no clips")
    positions = [(shard_path(Path(manifest).parent, shard), row) for _, _, shard, row in rows]
    files = {path: open_shard(path) for path in dict.fromkeys(path for path, _ in positions)}
    for number, (path, row) in enumerate(positions, start=2):  # row 1 is the header
        if row >= len(files[path].clips):
            raise UserError(
                f"{manifest}: row {number}: names row {row} of {path.name}, which has {len(files[path].clips)}; "
                "encode again"
            )
    first_path, first = next(iter(files.items()))
    _check_identity(manifest, first.identity, config)
    for path, shard in files.items():
        changed = differences(_kind(first), _kind(shard))
        if changed:
            raise UserError(
                f"{path}: was encoded differently from {first_path.name} ({'; '.join(changed)}); encode into a folder "
                "of its own"
            )
    annotations = Annotations([path for path, *_ in rows], [label for _, label, *_ in rows])
    return Shards(files, positions, first.shape, first.dtype), annotations


def channel_statistics(sources: Sequence[Shards], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all tokens, fp64 [d], from the sums that were taken while
    encoding. Each source counts by its share of the samples in training."""
    t, h, w, _ = sources[0].shape
    mixed = torch.zeros_like(next(iter(sources[0].files.values())).sums)
    for source, share in zip(sources, shares(weights), strict=True):
        tokens = sum(len(shard.clips) for shard in source.files.values()) * t * h * w
        mixed += float(share) * torch.stack([shard.sums for shard in source.files.values()]).sum(0) / tokens
    mean, squares = mixed
    return mean, (squares - mean.square()).clamp(min=0).sqrt()


def _manifest_rows(manifest: str, key: str) -> Iterator[tuple[str, int, int, int]]:
    """(path, label, shard, row) of each clip."""
    if not is_shards(manifest):
        raise UserError(
            f"{manifest}: is not a manifest of shards ({','.join(COLUMNS)}); encode all splits and sources in one "
            "format"
        )
    for number, cells in islice(csv_rows(manifest, key, MANIFEST_FILE), 1, None):
        try:
            path, label, shard, row = cells
            yield path, class_index(label), class_index(shard), class_index(row)
        except ValueError:
            raise UserError(
                f"{manifest}: row {number}: expected {','.join(COLUMNS)}, got {','.join(cells)[:200]!r}; encode again"
            ) from None


def _check_identity(manifest: str, about: dict, config: Config) -> None:
    """Raise `UserError` for latents that the configuration's encoder would not give."""
    model = config.model
    wanted = identity(
        config, model.num_context_latents, model.num_target_latents or about["model"].get("num_target_latents")
    )
    changed = differences({key: about.get(key) for key in wanted}, wanted)
    if changed:
        raise UserError(
            f"{manifest}: its latents were encoded with another configuration ({'; '.join(changed)}): encode again or "
            "change the key"
        )


def _kind(shard: Shard) -> dict:
    """What all shards of a split have in common."""
    return shard.identity | {"latents": list(shard.shape), "dtype": shard.dtype}


def _encoding(shard: Shard) -> dict:
    """What all sources have in common: all but the digest of their clips."""
    return {key: value for key, value in _kind(shard).items() if key != "clips"}
