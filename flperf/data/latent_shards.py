"""Cached latents in shards: safetensors files whose rows are clips, each read by one `pread` straight into its place in the batch.

safetensors, because it is one flat block behind a JSON header: rows need no decoding and no unpickling, and every tool of the field
opens it. A split's folder holds

    shard_00000.safetensors …   latents [n, t, h, w, d], checksum [n], sum [n, d] and squares [n, d] over a clip's tokens (fp32);
                                its metadata says what was encoded and how
    manifest.csv                path, label, shard, row: written last, so it stands for a complete cache

A checksum is the sum of the row's 64-bit words modulo 2^64: any single wrong word shows, at the speed of memory. A
shard covers fixed rows of the dataset's CSV and is renamed into place when it is on disk: after a kill the missing ones are
encoded, by any number of processes, and no clip is lost or doubled.
"""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flperf.config import Config, UserError, differences
from flperf.data.clips import Annotations, Batches, ClipBatch, Draw
from flperf.data.prefetch import Buffers, filled_buffers

MANIFEST = "manifest.csv"
COLUMNS = ["path", "label", "shard", "row"]
SHARD_BYTES = 2**28  # some hundred megabytes: read at the speed of the disk, and little to lose in a kill
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def identity(config: Config, context_frames: int, target_frames: int) -> dict:
    """What makes latents comparable: encoder, preprocessing, frames. Normalisation is none: latents are kept as the encoder gives them."""
    backbone, dataset = config.backbone, config.dataset
    encoder = {key: getattr(backbone, key) for key in ("kind", "weights", "architecture", "processor", "frame_stride", "encode")}
    clip = {"n_frames": dataset.n_frames, "stride": dataset.stride}
    # Encoded apart, the latents depend on where context and target meet and end.
    model = {"num_context_latents": context_frames, "num_target_latents": target_frames} if backbone.encode == "split" else {}
    return {"backbone": encoder, "dataset": clip, "model": model, "normalisation": "none"}


@dataclass(frozen=True)
class Shards:
    """One split of a cache."""

    folder: Path
    rows: list[tuple[Path, int]]  # shard and row of each clip
    shape: tuple[int, int, int, int]  # t h w d
    dtype: torch.dtype
    identity: dict
    offsets: dict[Path, int]  # where the rows of a shard begin
    checksums: dict[Path, Tensor]
    checked: bytearray  # by clip: 1 once its checksum was right

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def is_shards(file: str | None) -> bool:
    if file is None or not Path(file).is_file():
        return False
    with open(file, newline="", encoding="utf-8") as lines:
        return next(csv.reader(lines), None) == COLUMNS


def clips_per_shard(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return max(1, SHARD_BYTES // (torch.Size(shape).numel() * dtype.itemsize))


def checksum(latents: Tensor) -> Tensor:
    """int64 [n] of contiguous latents [n, …]; a row shorter than a multiple of 8 bytes is summed by 2 bytes."""
    words = latents.reshape(len(latents), -1).view(torch.int16)
    return words.view(torch.int64).sum(1) if words.shape[1] % 4 == 0 else words.sum(1, dtype=torch.int64)


def write_shard(path: Path, clips: Tensor, latents: Tensor, about: dict) -> None:
    """Write latents [n, t, h, w, d] of the dataset's rows `clips` (int64 [n]), complete or not at all."""
    tokens = latents.flatten(1, 3).float()
    tensors = {"latents": latents, "clip": clips, "checksum": checksum(latents), "sum": tokens.sum(1), "squares": tokens.square().sum(1)}
    temporary = path.with_suffix(".unfinished")
    save_file(tensors, temporary, metadata={"identity": json.dumps(about, sort_keys=True)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:05d}.safetensors"


def shard_identity(path: Path) -> dict:
    try:
        with safe_open(path, framework="pt") as shard:
            return json.loads((shard.metadata() or {})["identity"])
    except Exception as error:  # safetensors has its own exception, and files of others lack the key
        raise UserError(f"{path}: is no shard of cached latents ({' '.join(str(error).split())}); remove it and encode again") from None


def write_manifest(folder: Path, annotations: Annotations, shards: int) -> int:
    """List the clips of all shards; returns how many there are."""
    rows = []
    for number in range(shards):
        with safe_open(shard_path(folder, number), framework="pt") as shard:
            clips = shard.get_tensor("clip").tolist()
        rows += [(annotations.paths[clip], annotations.labels[clip], number, row) for row, clip in enumerate(clips)]
    temporary = folder / f"{MANIFEST}.unfinished"
    with open(temporary, "w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
        lines.flush()
        os.fsync(lines.fileno())
    os.replace(temporary, folder / MANIFEST)
    return len(rows)


def open_shards(manifest: str, config: Config, limit: int | None) -> tuple[Shards, Annotations]:
    """Open a split by its manifest. Raises `UserError` if it was encoded otherwise than the configuration says."""
    folder = Path(manifest).parent
    with open(manifest, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))[:limit]
    if not rows:
        raise UserError(f"{manifest}: holds no clips")
    places = [(shard_path(folder, int(row["shard"])), int(row["row"])) for row in rows]
    first = places[0][0]
    about = shard_identity(first)
    _compare(manifest, about, config)
    layouts = {path: _layout(path) for path in dict.fromkeys(path for path, _ in places)}
    dtype, shape, _ = layouts[first]
    checksums = {path: _checksums(path) for path in layouts}
    offsets = {path: offset for path, (_, _, offset) in layouts.items()}
    annotations = Annotations([row["path"] for row in rows], [int(row["label"]) for row in rows])
    return Shards(folder, places, shape, dtype, about, offsets, checksums, bytearray(len(places))), annotations


def channel_statistics(shards: Shards) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all tokens of the split, fp64 [d]; sums were taken while encoding."""
    t, h, w, d = shards.shape
    total, squares, clips = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64), 0
    for path in shards.offsets:
        with safe_open(path, framework="pt") as shard:
            total += shard.get_tensor("sum").double().sum(0)
            squares += shard.get_tensor("squares").double().sum(0)
            clips += len(shard.get_tensor("clip"))
    tokens = clips * t * h * w
    mean = total / tokens
    return mean, (squares / tokens - mean.square()).clamp(min=0).sqrt()


def read_batches(
    batches: Iterable[list[Draw]], order, annotations: Annotations, shards: Shards, threads: int, prefetch: int, device: torch.device
) -> Batches:
    """Yield the batches with their latents `b t h w d` in host memory, pinned where `device` is CUDA."""

    buffers = Buffers(shards.shape, shards.dtype, device)

    def fill(draw: Draw, slot: Tensor) -> None:
        read_row(shards, draw.clip, slot)

    for draws, latents, _ in filled_buffers(batches, order, buffers, fill, threads, prefetch):
        yield ClipBatch.of(draws, annotations.labels, latents=latents)


def read_row(shards: Shards, clip: int, out: Tensor) -> None:
    """Read one clip's latents into `out` `t h w d`; the first time this process does, check them. Raises `UserError` if they are not those
    that were written."""
    path, row = shards.rows[clip]
    buffer = memoryview(out.view(torch.int8).numpy()).cast("B")
    start, done = shards.offsets[path] + row * shards.row_bytes, 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such shard, though the manifest names it") from None
    try:
        os.posix_fadvise(descriptor, start, len(buffer), os.POSIX_FADV_WILLNEED)
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if not count:
                raise UserError(f"{path}: row {row}: the file is cut short; remove it and encode again")
            done += count
    finally:
        os.close(descriptor)
    if not shards.checked[clip]:
        if checksum(out[None])[0] != shards.checksums[path][row]:
            raise UserError(f"{path}: row {row}: does not have the checksum it was written with; remove the file and encode again")
        shards.checked[clip] = 1


def _compare(manifest: str, about: dict, config: Config) -> None:
    """Refuse latents that the configuration's encoder would not give."""
    model = config.model
    frames = about["model"].get("num_context_latents"), about["model"].get("num_target_latents")
    wanted = identity(config, model.num_context_latents, model.num_target_latents or frames[1])
    changed = differences(about, wanted)
    if changed:
        raise UserError(
            f"{manifest}: its latents were encoded otherwise than configured ({'; '.join(changed)}): encode again or change the key"
        )


def _layout(path: Path) -> tuple[torch.dtype, tuple[int, int, int, int], int]:
    """Type, shape of a row and offset of `latents` in a file: safetensors is a length, a JSON header, then the tensors."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["latents"]
    _, t, h, w, d = entry["shape"]
    return DTYPES[entry["dtype"]], (t, h, w, d), 8 + size + entry["data_offsets"][0]


def _checksums(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor("checksum")
