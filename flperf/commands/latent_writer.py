"""Runs the frozen encoder over a dataset and writes the latents, as shards or in FutureLatents' format.

This is the work of `flperf encode`. It is apart from the command's parser so that mistakes in the configuration are
reported before torch is loaded.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from flperf.config import Config, differences
from flperf.data import WITHOUT_VIDEO, Dataset, latent_shards, open_dataset, prepare_dataset
from flperf.data.annotations import Annotations
from flperf.data.preprocessing import Preprocessing
from flperf.data.text_files import read_json
from flperf.data.unreadable import NONE_USABLE
from flperf.engine.process import Process, compute_dtype
from flperf.errors import UserError
from flperf.files import make_folder, write_atomically
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.latents import LatentGeometry, latent_geometry
from flperf.run import evaluation_share

IDENTITY = "encoding.json"  # in the folder of a split: what is encoded there, so that only the same encoding resumes


def encode_dataset(config: Config, process: Process, out: Path, *, as_files: bool) -> None:
    """Write `out/train` (`out/train_0` and so on for several sources) and `out/validation`. The clips are shared
    between the processes; existing files are kept.

    Raises `UserError` if a folder holds anything else than latents of the same clips, encoder and format.
    """
    if config.dataset.kind in WITHOUT_VIDEO:
        raise UserError(f"dataset.kind: {config.dataset.kind!r} holds latents already; encode needs videos")
    if process.local_rank == 0:
        prepare_dataset(config)
    dist.barrier()
    preprocessing = Preprocessing.of(config.backbone)
    folders = datasets_by_folder(config, preprocessing)
    dtype = compute_dtype(config.engine.precision, process.device)
    encoder = build_encoder(
        config.backbone, preprocessing, dtype=dtype, device=process.device, compile=config.engine.compile
    )
    geometry = latent_geometry(config, *encoder.latent_shape(config.dataset.n_frames))
    for folder, (dataset, split) in folders.items():
        encoding = SplitEncoding(config, process, dataset, encoder, geometry, out / folder, split)
        encoding.write_files() if as_files else encoding.write_shards()


def datasets_by_folder(config: Config, preprocessing: Preprocessing) -> dict[str, tuple[Dataset, str]]:
    """What is encoded: the dataset and its split by the name of the folder, which is that of the split. Each of several
    sources gets a folder of its own, from `train_0` on, so that the latents can be mixed by weight as well."""
    dataset = open_dataset(config, preprocessing, config.seed)
    folders = {split: (dataset, split) for split, annotations in dataset.splits.items() if len(annotations)}
    if config.dataset.sources:
        del folders["train"]
    for number, source in enumerate(config.dataset.sources or []):
        keys = replace(config.dataset, train=source.train, sources=None, validation=None)
        alone = open_dataset(replace(config, dataset=keys), preprocessing, config.seed)
        folders[f"train_{number}"] = alone, "train"
    return folders


def clips_digest(config: Config, annotations: Annotations, split: str) -> str:
    """A hash of the clips in their order, their labels, and the settings that choose their frames or draw them."""
    dataset = config.dataset
    start = dataset.start if split == "train" else dataset.validation_start
    drawn = [config.seed, asdict(dataset.shapes)] if dataset.kind == "bouncing_shapes" else None
    clips = [[os.path.abspath(path) for path in annotations.paths], annotations.labels, start, drawn]
    clips += [dataset.short_clips] if dataset.short_clips != "pad" else []  # older caches, all padded, lack this entry
    return hashlib.sha256(json.dumps(clips).encode()).hexdigest()[:16]


class SplitEncoding:
    """The encoding of one split: this process encodes its share of the clips."""

    def __init__(
        self,
        config: Config,
        process: Process,
        dataset: Dataset,
        encoder: Encoder,
        geometry: LatentGeometry,
        folder: Path,
        split: str,
    ):
        self.config, self.process, self.dataset = config, process, dataset
        self.encoder, self.geometry = encoder, geometry
        self.folder, self.split, self.annotations = folder, split, dataset.splits[split]
        self.identity = latent_shards.identity(config, geometry.context_frames, geometry.target_frames)
        self.identity |= {"clips": clips_digest(config, self.annotations, split)}

    def write_shards(self) -> None:
        """Write `shard_XXXXX.safetensors`, and `manifest.csv` once all exist; see `latent_shards`."""
        size, geometry = len(self.annotations), self.geometry
        shape = (geometry.context_frames + geometry.target_frames, geometry.height, geometry.width, geometry.dim)
        length = latent_shards.clips_per_shard(shape, torch.bfloat16)
        self._claim_folder({"format": "shards", "clips_per_shard": length})
        groups = {}
        for number in range(self.process.rank, -(-size // length), self.process.world_size):
            path = latent_shards.shard_path(self.folder, number)
            if path.exists():
                self._check(path, latent_shards.open_shard(path).identity, self.identity)
            else:
                groups[path] = range(number * length, min((number + 1) * length, size))
        for path, (clips, latents) in zip(groups, self._encode(list(groups.values())), strict=True):
            latent_shards.write_shard(path, clips, latents, self.identity)
        dist.barrier()
        if self.process.is_main:
            self._report(latent_shards.write_manifest(self.folder, self.annotations, length))
        dist.barrier()

    def write_files(self) -> None:
        """Write FutureLatents' format: `clips/XXXXXXXX.pt`, one tensor `d t h w` each, and `manifest.csv` with the
        columns out_path and label."""
        self._claim_folder({"format": "files"})
        (self.folder / "clips").mkdir(exist_ok=True)
        mine = range(self.process.rank, len(self.annotations), self.process.world_size)
        batches = [mine[first : first + self._batch_size] for first in range(0, len(mine), self._batch_size)]
        missing = [batch for batch in batches if not all(self._file(clip).exists() for clip in batch)]
        for clips, latents in self._encode(missing):
            for clip, clip_latents in zip(clips.tolist(), latents, strict=True):
                content = io.BytesIO()
                torch.save(rearrange(clip_latents, "t h w d -> d t h w").contiguous(), content)
                write_atomically(self._file(clip), content.getvalue())
        dist.barrier()
        if self.process.is_main:
            rows = [
                (f"clips/{clip:08d}.pt", label)
                for clip, label in enumerate(self.annotations.labels)
                if self._file(clip).exists()
            ]
            latent_shards.write_csv(self.folder / latent_shards.MANIFEST, [("out_path", "label"), *rows])
            self._report(len(rows))
        dist.barrier()

    def _claim_folder(self, layout: dict) -> None:
        """Start in an empty folder, or resume in one of the same encoding. Raises `UserError` for any other."""
        identity, file = self.identity | layout, self.folder / IDENTITY
        make_folder(self.folder)
        if file.exists():
            self._check(file, read_json(str(file), "--out", "another folder"), identity)
        elif any(self.folder.iterdir()):
            raise UserError(
                f"{self.folder}: holds files, but no {IDENTITY} that describes them; choose another --out or remove "
                "the folder"
            )
        dist.barrier()  # after all processes have checked, before one writes
        if self.process.is_main:
            write_atomically(file, json.dumps(identity, indent=1))
        dist.barrier()

    def _check(self, path: Path, found: dict, expected: dict) -> None:
        """Raise `UserError` if the identity found at `path` is not the expected one."""
        changed = differences(found, expected)
        if changed:
            raise UserError(
                f"{path}: was encoded with another configuration or from other clips ({'; '.join(changed)}); "
                f"choose another --out or remove {self.folder}"
            )

    def _report(self, written: int) -> None:
        size = len(self.annotations)
        if not written:
            raise UserError(f"{self.folder}: {NONE_USABLE}")
        left_out = f", {size - written} can't be used" if written < size else ""
        print(f"{self.folder}: {written} of {size} clips{left_out}", flush=True)

    def _file(self, clip: int) -> Path:
        return self.folder / "clips" / f"{clip:08d}.pt"

    @property
    def _batch_size(self) -> int:
        return evaluation_share(self.config, self.process).micro_batch_size

    @torch.no_grad()
    def _encode(self, groups: list[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (clips int64 [n], latents bf16 `n t h w d`) for each group of clips, without the unusable ones."""
        device = self.process.device
        batches = self.dataset.chosen_batches(groups, self._batch_size, self.split, device)
        total, quiet = sum(map(len, groups)), None if self.process.is_main else True
        with tqdm(total=total, desc=f"encoding {self.split}", unit="clip", disable=quiet) as bar:
            for group in groups:
                parts = []
                for _ in range(-(-len(group) // self._batch_size)):
                    batch = next(batches)
                    video = batch.video.to(device)
                    encoded = encode_clip(self.encoder, video, self.geometry, self.config.backbone.encode)
                    latents = torch.cat(encoded, dim=1)
                    parts.append((batch.clip[batch.valid], latents.to(torch.bfloat16).cpu()[batch.valid]))
                    bar.update(len(parts[-1][0]))
                clips, latents = (torch.cat(part) for part in zip(*parts, strict=True))
                yield clips, latents
        batches.close()
