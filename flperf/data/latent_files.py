"""A dataset of cached latents in the format of FutureLatents: a manifest CSV with a header and a column of paths, each
to one tensor `d t h w`, written by `torch.save`. They replace video and encoder; batches are `b t h w d`.
"""

import os
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor

from flperf.config import Config
from flperf.data.annotations import Annotations, class_index, read_labels
from flperf.data.dataset import Dataset, load_with, read_splits
from flperf.data.loader import Reader
from flperf.data.samplers import ClipRequest
from flperf.data.text_files import csv_rows, is_utf8, not_text
from flperf.errors import UserError, first_line

LABEL_COLUMN = "label"  # of the manifest; optional
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that heads and kernels read


def open_file_dataset(config: Config, seed: int) -> Dataset:
    """The splits whose manifests `config.dataset` names. All files must have shape and dtype of the first training
    clip's."""
    dataset = config.dataset
    splits = read_splits(dataset, lambda file, key: read_manifest(file, key, dataset.out_path_column, dataset.limit))
    read_labels(dataset.labels, list(splits.values()))  # raises if it is incomplete
    first = splits["train"].paths[0]
    example = read_latents(first)
    readers = {split: LatentFileReader(clips.paths, first, example) for split, clips in splits.items()}
    load = load_with(lambda split, *_: readers[split], splits, dataset)
    t, h, w, d = example.shape
    return Dataset(splits, load, seed, latent_shape=(t, h, w, d))


class LatentFileReader(Reader):
    """Reads latents of the shape t h w d and the dtype of `example`, which are those of the file `first`."""

    field = "latents"

    def __init__(self, paths: list[str], first: str, example: Tensor):
        self.paths, self.first, self.shape, self.dtype = paths, first, tuple(example.shape), example.dtype

    def read(self, request: ClipRequest, slot: Tensor) -> None:
        path = self.paths[request.clip]
        latents = read_latents(path)
        if (latents.shape, latents.dtype) != (self.shape, self.dtype):
            raise UserError(
                f"{path}: latents t h w d are {list(latents.shape)} {latents.dtype}, but {self.first} is "
                f"{list(self.shape)} {self.dtype}"
            )
        slot.copy_(latents)


def read_manifest(file: str | None, key: str, column: str, limit: int | None) -> Annotations:
    """Paths (relative to the manifest) and labels (0 without a column of labels) of its rows."""
    what = f"a manifest CSV of cached latents with a column {column}"
    rows = csv_rows(file, key, what)
    _, columns = next(rows, (1, [column]))
    if column not in columns:
        raise UserError(
            f"{file}: has no column {column} (dataset.out_path_column); its columns: {', '.join(columns)[:200]}"
        )
    folder, paths, labels = os.path.dirname(file or ""), [], []
    for number, cells in islice(rows, limit):
        row = dict(zip(columns, cells, strict=False))
        try:
            if len(cells) != len(columns):
                raise ValueError(f"has {len(cells)} columns, the header has {len(columns)}")
            if not row.get(column):
                raise ValueError(f"needs a path under {column}")
            paths.append(os.path.join(folder, row[column]))
            labels.append(class_index(row.get(LABEL_COLUMN) or "0"))
        except ValueError as error:
            raise UserError(f"{file}: row {number}: {error}") from None
        if not is_utf8(row[column]) and not os.path.exists(paths[-1]):
            raise not_text(f"{file}: row {number}", key, what)
    if not paths:
        raise UserError(f"{file}: holds no clips")
    return Annotations(paths, labels)


def read_latents(path: str) -> Tensor:
    """The latents of one file as `t h w d`. Raises `UserError` if they can't be used."""
    try:
        latents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist, but the manifest of cached latents names it") from None
    except Exception as error:  # torch.load passes on what the unpickler and the archive reader raise
        raise UserError(f"{path}: is not a tensor that torch.load can read: {first_line(error)}") from None
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.numel():
        found = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"{path}: cached latents must be one tensor d t h w, not {found}")
    if latents.dtype not in DTYPES:
        raise UserError(f"{path}: cached latents must be fp32, bf16 or fp16, not {latents.dtype}")
    # A NaN makes both bounds NaN. This is much quicker than testing each element.
    if not all(bound.isfinite() for bound in latents.aminmax()):
        raise UserError(f"{path}: its latents hold NaN or infinity; encode it again")
    return rearrange(latents, "d t h w -> t h w d")
