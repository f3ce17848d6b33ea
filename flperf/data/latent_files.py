"""A dataset of cached latents in the format of FutureLatents: a manifest CSV with a header and a column of paths, each
to one tensor `d t h w`, written by `torch.save`. They replace video and encoder; batches are `b t h w d`.
"""

import csv
import os
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor

from flperf.config import Config
from flperf.data.annotations import Annotations, existing_file, read_labels
from flperf.data.dataset import Dataset, load_with, read_splits
from flperf.data.loader import Reader
from flperf.data.samplers import ClipRequest
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
    file = existing_file(file, key, f"a manifest CSV of cached latents with a column {column}")
    with open(file, newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        columns, rows = list(reader.fieldnames or []), list(islice(reader, limit))
    if columns and column not in columns:
        raise UserError(f"{file}: has no column {column} (dataset.out_path_column); its columns: {', '.join(columns)}")
    if not rows:
        raise UserError(f"{file}: holds no clips")
    folder = os.path.dirname(file)
    labels = [row.get(LABEL_COLUMN) or "0" for row in rows]
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=2):  # row 1 is the header
        if not row[column] or not label.isdecimal():
            raise UserError(
                f"{file}: row {number}: needs a path under {column}, and an index under {LABEL_COLUMN} if it has "
                "that column"
            )
    return Annotations([os.path.join(folder, row[column]) for row in rows], [int(label) for label in labels])


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
