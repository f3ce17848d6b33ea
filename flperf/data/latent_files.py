"""Cached latents in the format of FutureLatents: a manifest CSV with a header and a column of paths, each to one
`torch.save`d tensor `d t h w`. They replace video and encoder: what comes out is the latents' own layout `b t h w d`.
"""

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor

from flperf.data.annotations import Annotations, existing_file
from flperf.data.prefetch import Buffers, filled_buffers
from flperf.data.samplers import Batches, ClipBatch, ClipRequest
from flperf.errors import UserError, first_line

LABEL_COLUMN = "label"  # of the manifest, where it has one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what heads and kernels read


@dataclass(frozen=True)
class LatentFormat:
    """What all files of a cache have in common: their shape as `t h w d` and their type."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype


def read_manifest(file: str | None, key: str, column: str, limit: int | None) -> Annotations:
    """Paths (relative to the manifest) and labels (0 where it has none) of its rows."""
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


def _format_of(latents: Tensor) -> LatentFormat:
    t, h, w, d = latents.shape
    return LatentFormat((t, h, w, d), latents.dtype)


def read_format(path: str) -> LatentFormat:
    """The format of one file, which all others must share."""
    return _format_of(_load(path))


def read_batches(
    batches: Iterable[list[ClipRequest]],
    sampler,
    annotations: Annotations,
    latent_format: LatentFormat,
    threads: int,
    prefetch: int,
    device: torch.device,
) -> Batches:
    """Yield the batches with their latents `b t h w d` in host memory, pinned where `device` is CUDA."""

    buffers = Buffers(latent_format.shape, latent_format.dtype, device)

    def fill(draw: ClipRequest, slot: Tensor) -> None:
        path = annotations.paths[draw.clip]
        latents = _load(path)
        if _format_of(latents) != latent_format:
            first = f"{annotations.paths[0]} is {list(latent_format.shape)} {latent_format.dtype}"
            raise UserError(f"{path}: latents t h w d are {list(latents.shape)} {latents.dtype}, but {first}")
        slot.copy_(latents)

    for draws, latents, _ in filled_buffers(batches, sampler, buffers, fill, threads, prefetch):
        yield ClipBatch.of(draws, annotations.labels, latents=latents)


def _load(path: str) -> Tensor:
    """One file's latents as `t h w d`."""
    try:
        latents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file of cached latents, though the manifest names it") from None
    except Exception as error:  # torch.load lets through whatever the unpickler and the archive reader raise
        raise UserError(f"{path}: is no tensor that torch.load can read: {first_line(error)}") from None
    if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.numel():
        found = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"{path}: cached latents must be one tensor d t h w, not {found}")
    if latents.dtype not in DTYPES:
        raise UserError(f"{path}: cached latents must be fp32, bf16 or fp16, not {latents.dtype}")
    # which any NaN makes NaN; much quicker than a look at each
    if not all(bound.isfinite() for bound in latents.aminmax()):
        raise UserError(f"{path}: its latents hold NaN or infinity; encode it again")
    return rearrange(latents, "d t h w -> t h w d")
