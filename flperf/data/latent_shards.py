"""Cached latents in shards: safetensors files whose rows are clips, each read by one `pread` straight into its place
in the batch.

safetensors, because it is one flat block behind a JSON header: rows need no decoding and no unpickling, and every
tool of the field opens it. A split's folder holds

    shard_00000.safetensors …   latents [n, t, h, w, d], checksum [n], sum [n, d] and squares [n, d] over a clip's
    tokens (fp32);
                                its metadata says what was encoded and how, and of which clips (a digest)
    encoding.json               the same, and the format: what `flperf encode` goes on with after a kill
    manifest.csv                path, label, shard, row: written last, so it stands for a complete cache

A checksum is the sum of the row's 64-bit words modulo 2^64: any single wrong word shows, at the speed of memory. A
shard covers fixed rows of the dataset's CSV and is renamed into place when it is on disk: after a kill the missing
ones are encoded, by any number of processes, and no clip is lost or doubled.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flperf.config import Config, differences
from flperf.data.annotations import Annotations, has_header
from flperf.data.prefetch import Buffers, filled_buffers
from flperf.data.samplers import Batches, ClipBatch, ClipRequest
from flperf.errors import UserError
from flperf.files import atomic_file

MANIFEST = "manifest.csv"
COLUMNS = ["path", "label", "shard", "row"]
SHARD_BYTES = 2**28  # some hundred megabytes: read at the speed of the disk, and little to lose in a kill
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def identity(config: Config, context_frames: int, target_frames: int) -> dict:
    """What makes latents comparable: encoder, preprocessing, frames. Normalisation is none: latents are kept as the
    encoder gives them."""
    backbone, dataset = config.backbone, config.dataset
    encoder = {
        key: getattr(backbone, key)
        for key in ("kind", "weights", "architecture", "processor", "frame_stride", "encode")
    }
    clip = {"n_frames": dataset.n_frames, "stride": dataset.stride}
    # Encoded apart, the latents depend on where context and target meet and end.
    model = (
        {"num_context_latents": context_frames, "num_target_latents": target_frames}
        if backbone.encode == "split"
        else {}
    )
    return {"backbone": encoder, "dataset": clip, "model": model, "normalisation": "none"}


@dataclass(frozen=True)
class Shard:
    """What a file says of itself, and its small tensors."""

    identity: dict  # `identity`, and what else was encoded: the digest of the clips
    shape: tuple[int, int, int, int]  # t h w d
    dtype: torch.dtype
    offset: int  # where the rows begin, in bytes
    clips: Tensor  # int64 [n]: rows of the dataset's CSV
    checksums: Tensor  # int64 [n]
    sums: Tensor  # fp64 [2, d]: of values and of squares, over all tokens


@dataclass(frozen=True)
class Shards:
    """One split of a cache."""

    files: dict[Path, Shard]
    rows: list[tuple[Path, int]]  # shard and row of each clip
    shape: tuple[int, int, int, int]  # t h w d, of every shard
    dtype: torch.dtype
    checked: bytearray  # by clip: 1 once its checksum was right

    @property
    def row_bytes(self) -> int:
        """Bytes of one clip's latents."""
        return _row_bytes(self.shape, self.dtype)


def is_shards(file: str | None) -> bool:
    """Whether a CSV is the manifest of shards: its first line says so."""
    return has_header(file, COLUMNS)


def clips_per_shard(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many clips of latents `shape` (t h w d) make a shard of SHARD_BYTES; at least one."""
    return max(1, SHARD_BYTES // _row_bytes(shape, dtype))


def checksum(latents: Tensor) -> Tensor:
    """int64 [n] of contiguous latents [n, …]; a row shorter than a multiple of 8 bytes is summed by 2 bytes."""
    words = latents.reshape(len(latents), -1).view(torch.int16)
    return words.view(torch.int64).sum(1) if words.shape[1] % 4 == 0 else words.sum(1, dtype=torch.int64)


def write_csv(path: Path, rows: list) -> None:
    """Complete or not at all."""
    with atomic_file(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)


def write_shard(path: Path, clips: Tensor, latents: Tensor, about: dict) -> None:
    """Write latents [n, t, h, w, d] of the dataset's rows `clips` (int64 [n]), complete or not at all; about:
    `identity`, and more."""
    tokens = latents.flatten(1, 3).float()
    tensors = {
        "latents": latents,
        "clip": clips,
        "checksum": checksum(latents),
        "sum": tokens.sum(1),
        "squares": tokens.square().sum(1),
    }
    with atomic_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"identity": json.dumps(about, sort_keys=True)})


def shard_path(folder: Path, number: int) -> Path:
    """The file of a split's shard `number`, counted from 0."""
    return folder / f"shard_{number:05d}.safetensors"


def write_manifest(folder: Path, annotations: Annotations, length: int) -> int:
    """List the clips of all shards, which cover `length` rows of the dataset each; returns how many there are.

    Raises `UserError` for a shard that can't be read or holds clips of other rows; clips that are in none could not
    be read.
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
    """Read all but the latents. Raises `UserError` that names the file if it is no whole shard or its latents aren't
    finite."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("identity", "null"))
            clips, checksums, totals, squares = (
                file.get_tensor(name) for name in ("clip", "checksum", "sum", "squares")
            )
        shape, dtype, offset = _layout(path)
        if not isinstance(about, dict) or not isinstance(about.get("model"), dict):
            raise ValueError("its metadata does not say what was encoded")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such shard, though the manifest names it; encode again") from None
    except Exception as error:  # safetensors has its own exception, and the header of a foreign file may hold anything
        raise UserError(
            f"{path}: is no shard of cached latents ({' '.join(str(error).split())}); remove it and encode again"
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


def open_shards(manifest: str, config: Config, limit: int | None) -> tuple[Shards, Annotations]:
    """Open the first `limit` clips of a split by its manifest.

    Raises `UserError` if a row or a shard can't be used, if shards differ, or if they were encoded otherwise than the
    configuration says.
    """
    rows = list(islice(_manifest_rows(manifest), limit))
    if not rows:
        raise UserError(f"{manifest}: holds no clips")
    places = [(shard_path(Path(manifest).parent, shard), row) for _, _, shard, row in rows]
    files = {path: open_shard(path) for path in dict.fromkeys(path for path, _ in places)}
    for number, (path, row) in enumerate(places, start=2):  # row 1 is the header
        if row >= len(files[path].clips):
            raise UserError(
                f"{manifest}: row {number}: names row {row} of {path.name}, which has {len(files[path].clips)}; "
                "encode again"
            )
    first_path, first = next(iter(files.items()))
    _compare(manifest, first.identity, config)
    for path, shard in files.items():
        changed = differences(_kind(first), _kind(shard))
        if changed:
            raise UserError(
                f"{path}: was encoded otherwise than {first_path.name} ({'; '.join(changed)}); encode into a folder "
                "of its own"
            )
    annotations = Annotations([path for path, *_ in rows], [label for _, label, *_ in rows])
    return Shards(files, places, first.shape, first.dtype, bytearray(len(rows))), annotations


def channel_statistics(shards: Shards) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all tokens of the split, fp64 [d]; sums were taken while
    encoding."""
    t, h, w, _ = shards.shape
    tokens = sum(len(shard.clips) for shard in shards.files.values()) * t * h * w
    mean, squares = torch.stack([shard.sums for shard in shards.files.values()]).sum(0) / tokens
    return mean, (squares - mean.square()).clamp(min=0).sqrt()


def read_batches(
    batches: Iterable[list[ClipRequest]],
    sampler,
    annotations: Annotations,
    shards: Shards,
    threads: int,
    prefetch: int,
    device: torch.device,
) -> Batches:
    """Yield the batches with their latents `b t h w d` in host memory, pinned where `device` is CUDA."""

    buffers = Buffers(shards.shape, shards.dtype, device)

    def fill(draw: ClipRequest, slot: Tensor) -> None:
        read_row(shards, draw.clip, slot)

    for draws, latents, _ in filled_buffers(batches, sampler, buffers, fill, threads, prefetch):
        yield ClipBatch.of(draws, annotations.labels, latents=latents)


def read_row(shards: Shards, clip: int, out: Tensor) -> None:
    """Read one clip's latents into `out` `t h w d`; the first time this process does, check them. Raises `UserError`
    if they are not those that were written."""
    path, row = shards.rows[clip]
    buffer = memoryview(out.view(torch.int8).numpy()).cast("B")
    start, done = shards.files[path].offset + row * shards.row_bytes, 0
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
    if not shards.checked[clip]:
        if checksum(out[None])[0] != shards.files[path].checksums[row]:
            raise UserError(
                f"{path}: row {row}: does not have the checksum it was written with; remove the file and encode again"
            )
        shards.checked[clip] = 1


def _row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _manifest_rows(manifest: str) -> Iterator[tuple[str, int, int, int]]:
    """(path, label, shard, row) of each clip."""
    if not is_shards(manifest):
        raise UserError(f"{manifest}: is no manifest of shards ({','.join(COLUMNS)}); encode both splits in one format")
    with open(manifest, newline="", encoding="utf-8") as lines:
        for number, cells in enumerate(islice(csv.reader(lines), 1, None), start=2):
            if len(cells) != len(COLUMNS) or not all(cell.isdecimal() for cell in cells[1:]):
                raise UserError(
                    f"{manifest}: row {number}: expected {','.join(COLUMNS)}, got {','.join(cells)!r}; encode again"
                )
            yield cells[0], int(cells[1]), int(cells[2]), int(cells[3])


def _compare(manifest: str, about: dict, config: Config) -> None:
    """Refuse latents that the configuration's encoder would not give."""
    model = config.model
    wanted = identity(
        config, model.num_context_latents, model.num_target_latents or about["model"].get("num_target_latents")
    )
    changed = differences({key: about.get(key) for key in wanted}, wanted)
    if changed:
        raise UserError(
            f"{manifest}: its latents were encoded otherwise than configured ({'; '.join(changed)}): encode again "
            "or change the key"
        )


def _kind(shard: Shard) -> dict:
    """What all shards of a split have in common."""
    return shard.identity | {"latents": list(shard.shape), "dtype": shard.dtype}


def _layout(path: Path) -> tuple[tuple[int, int, int, int], torch.dtype, int]:
    """Shape of a row, type and offset of `latents` in a file: safetensors is a length, a JSON header, then the
    tensors."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["latents"]
    if entry["dtype"] not in DTYPES or len(entry["shape"]) != 5:
        raise ValueError(
            f"its latents are {entry['dtype']} {entry['shape']}, not {' or '.join(DTYPES)} [n, t, h, w, d]"
        )
    _, t, h, w, d = entry["shape"]
    return (t, h, w, d), DTYPES[entry["dtype"]], 8 + size + entry["data_offsets"][0]
