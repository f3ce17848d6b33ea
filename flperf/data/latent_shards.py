"""Cached latents in shards: safetensors files whose rows are clips.

safetensors, because it is one flat block behind a JSON header: rows need no decoding and no unpickling, and every
tool of the field opens it. A split's folder holds

    shard_00000.safetensors …   latents [n, t, h, w, d], clip [n], checksum [n], and over the tokens of each clip
                                sum [n, d] and squares [n, d] (fp32);
                                the metadata describe encoder, preprocessing and clips
    encoding.json               the same and the format, from which `flperf encode` continues after a kill
    manifest.csv                path, label, shard, row; written last: the cache is complete if it exists

A checksum is the sum of the row's 64-bit words modulo 2^64, computed at the speed of memory; any single wrong word
changes it. A shard covers fixed rows of the dataset's CSV and is renamed into place once it is on disk. After a kill
any number of processes encode the missing shards, and no clip is left out or written twice.
"""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flperf.config import Config
from flperf.data.annotations import Annotations
from flperf.data.text_files import has_header
from flperf.errors import UserError
from flperf.files import atomic_file, word_sum

MANIFEST = "manifest.csv"
COLUMNS = ["path", "label", "shard", "row"]
SHARD_BYTES = 2**28  # large enough to be read at the speed of the disk, small enough to be encoded again after a kill
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def identity(config: Config, context_frames: int, target_frames: int) -> dict:
    """What two caches must share to be comparable: encoder, preprocessing and frames. Latents are stored as the encoder
    gives them, without normalisation."""
    backbone, dataset = config.backbone, config.dataset
    encoder = {
        key: getattr(backbone, key)
        for key in ("kind", "weights", "architecture", "processor", "frame_stride", "encode")
    }
    # Older caches have no fps, which counts as null. Beside fps the stride has no effect.
    clip = {"n_frames": dataset.n_frames, "stride": None if dataset.fps else dataset.stride, "fps": dataset.fps}
    # If context and target are encoded apart, the latents depend on where each begins and ends.
    model = (
        {"num_context_latents": context_frames, "num_target_latents": target_frames}
        if backbone.encode == "split"
        else {}
    )
    return {"backbone": encoder, "dataset": clip, "model": model, "normalisation": "none"}


@dataclass(frozen=True)
class Shard:
    """A shard's metadata and small tensors."""

    identity: dict  # `identity`, and a digest of the clips
    shape: tuple[int, int, int, int]  # t h w d
    dtype: torch.dtype
    offset: int  # of the first row, in bytes
    clips: Tensor  # int64 [n]: rows of the dataset's CSV
    checksums: Tensor  # int64 [n]
    sums: Tensor  # fp64 [2, d]: of values and of squares, over all tokens


def is_shards(file: str | None) -> bool:
    """Whether a CSV is a manifest of shards, by its first line."""
    return has_header(file, COLUMNS)


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one clip's latents of `shape` t h w d."""
    return torch.Size(shape).numel() * dtype.itemsize


def clips_per_shard(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Number of clips with latents of `shape` t h w d in a shard of SHARD_BYTES; at least one."""
    return max(1, SHARD_BYTES // row_bytes(shape, dtype))


def raw_bytes(latents: Tensor) -> np.ndarray:
    """A view of contiguous latents `…` as uint8 [bytes]."""
    return latents.reshape(-1).view(torch.uint8).numpy()


def checksum(row: np.ndarray) -> int:
    """Checksum of a row, uint8 [bytes], as the int64 that is stored."""
    return int(np.array(word_sum(row), np.uint64).view(np.int64))


def write_csv(path: Path, rows: list) -> None:
    """Write a CSV file, complete or not at all. File names keep their bytes."""
    with (
        atomic_file(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8", errors="surrogateescape") as lines,
    ):
        csv.writer(lines).writerows(rows)


def write_shard(path: Path, clips: Tensor, latents: Tensor, about: dict) -> None:
    """Write latents [n, t, h, w, d] of the dataset's rows `clips` (int64 [n]), complete or not at all. `about` is
    `identity` and more."""
    tokens = latents.flatten(1, 3).float()
    tensors = {
        "latents": latents,
        "clip": clips,
        "checksum": torch.tensor([checksum(raw_bytes(row)) for row in latents], dtype=torch.int64),
        "sum": tokens.sum(1),
        "squares": tokens.square().sum(1),
    }
    with atomic_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"identity": json.dumps(about, sort_keys=True)})


def shard_path(folder: Path, number: int) -> Path:
    """The file of a split's shard `number`, counted from 0."""
    return folder / f"shard_{number:05d}.safetensors"


def write_manifest(folder: Path, annotations: Annotations, length: int) -> int:
    """List the clips of all shards, each of which covers `length` rows of the dataset; returns their number.

    Clips that are in no shard could not be read. Raises `UserError` for a shard that can't be read or holds clips of
    other rows.
    """
    rows = []
    for number, first in enumerate(range(0, len(annotations), length)):
        path, covered = shard_path(folder, number), range(first, min(first + length, len(annotations)))
        clips = open_shard(path).clips.tolist()
        if sorted(set(clips) & set(covered)) != clips:
            raise UserError(
                f"{path}: holds other clips than rows {first} to {covered[-1]} of the dataset; remove it and encode "
                "again"
            )
        rows += [(annotations.paths[clip], annotations.labels[clip], number, row) for row, clip in enumerate(clips)]
    write_csv(folder / MANIFEST, [COLUMNS, *rows])
    return len(rows)


def open_shard(path: Path) -> Shard:
    """Read everything but the latents. Raises `UserError` if the file is not a complete shard or its latents are not
    finite."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("identity", "null"))
            clips, checksums, totals, squares = (
                file.get_tensor(name) for name in ("clip", "checksum", "sum", "squares")
            )
        shape, dtype, offset = _layout(path)
        if not isinstance(about, dict) or not isinstance(about.get("model"), dict):
            raise ValueError("its metadata does not describe the encoding")
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist, but the manifest names it; encode again") from None
    except Exception as error:  # safetensors raises its own exceptions, and a foreign header may hold anything
        raise UserError(
            f"{path}: is not a shard of cached latents ({' '.join(str(error).split())}); remove it and encode again"
        ) from None
    finite = squares.isfinite().all(1)
    if not finite.all():
        raise UserError(
            f"{path}: row {int(finite.int().argmin())}: its latents hold NaN or infinity; check the encoder and "
            "encode again"
        )
    return Shard(
        about, shape, dtype, offset, clips, checksums, torch.stack([totals.double().sum(0), squares.double().sum(0)])
    )


def read_row(path: Path, shard: Shard, row: int, out: Tensor) -> None:
    """Read one clip's latents into `out` t h w d, by one `pread` without a copy. Raises `UserError` if the file is
    missing or cut short."""
    buffer, done = memoryview(raw_bytes(out)), 0
    start = shard.offset + row * len(buffer)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: was removed while it was read; encode again") from None
    try:
        os.posix_fadvise(descriptor, start, len(buffer), os.POSIX_FADV_WILLNEED)
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if not count:
                raise UserError(f"{path}: row {row}: the file is cut short; remove it and encode again")
            done += count
    finally:
        os.close(descriptor)


def check_row(path: Path, shard: Shard, row: int, latents: Tensor) -> None:
    """Raise `UserError` if latents t h w d, read from a row, are not those that were written."""
    if checksum(raw_bytes(latents)) != shard.checksums[row]:
        raise UserError(
            f"{path}: row {row}: does not have the checksum it was written with; remove the file and encode again"
        )


def _layout(path: Path) -> tuple[tuple[int, int, int, int], torch.dtype, int]:
    """Shape of a row, dtype, and offset of `latents` in a file. A safetensors file is the length of its header, the
    header in JSON, then the tensors."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["latents"]
    if entry["dtype"] not in DTYPES or len(entry["shape"]) != 5:
        raise ValueError(
            f"its latents are {entry['dtype']} {entry['shape']}, not {' or '.join(DTYPES)} [n, t, h, w, d]"
        )
    _, t, h, w, d = entry["shape"]
    return (t, h, w, d), DTYPES[entry["dtype"]], 8 + size + entry["data_offsets"][0]
