"""Runs the frozen encoder over a dataset once and writes the latents down, as shards or in FutureLatents' format."""

import csv
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from flperf.config import Config, UserError
from flperf.data import WITHOUT_VIDEO, Dataset, latent_shards, open_dataset, prepare_dataset
from flperf.data.preprocessing import Preprocessing
from flperf.encoder import Encoder, build_encoder, encode_clip
from flperf.engine import Process, compute_dtype
from flperf.latents import Layout, latent_layout
from flperf.run import evaluation_place


def encode_dataset(config: Config, process: Process, out: Path, *, as_files: bool) -> None:
    """Write `out/train` and `out/validation`, the clips shared out over all processes; what is there already is kept.

    Raises `UserError` where the folder holds latents of another encoder, clip length, stride or split.
    """
    if config.dataset.kind in WITHOUT_VIDEO:
        raise UserError(f"dataset.kind: {config.dataset.kind!r} holds latents already; encode takes a dataset of videos")
    if process.local_rank == 0:
        prepare_dataset(config)
    dist.barrier()
    preprocessing = Preprocessing.of(config.backbone)
    dataset = open_dataset(config, preprocessing, config.seed)
    dtype = compute_dtype(config.engine.precision, process.device)
    encoder = build_encoder(config.backbone, preprocessing, dtype=dtype, device=process.device, compile=config.engine.compile)
    layout = latent_layout(config, *encoder.latent_shape(config.dataset.n_frames))
    for split, annotations in dataset.splits.items():
        if len(annotations):
            encoding = SplitEncoding(config, process, dataset, encoder, layout, out / split, split)
            encoding.write_files() if as_files else encoding.write_shards()


class SplitEncoding:
    """Encodes this process's share of the clips of one split."""

    def __init__(self, config: Config, process: Process, dataset: Dataset, encoder: Encoder, layout: Layout, folder: Path, split: str):
        self.config, self.process, self.dataset, self.encoder, self.layout = config, process, dataset, encoder, layout
        self.folder, self.split, self.annotations = folder, split, dataset.splits[split]
        folder.mkdir(parents=True, exist_ok=True)

    def write_shards(self) -> None:
        size, layout = len(self.annotations), self.layout
        about = latent_shards.identity(self.config, layout.context_frames, layout.target_frames)
        shape = (layout.context_frames + layout.target_frames, layout.height, layout.width, layout.dim)
        length = latent_shards.clips_per_shard(shape, torch.bfloat16)
        count = -(-size // length)
        missing = []
        for number in range(self.process.rank, count, self.process.world_size):
            path = latent_shards.shard_path(self.folder, number)
            if not path.exists():
                missing.append(number)
            elif latent_shards.shard_identity(path) != about:
                raise UserError(f"{path}: was encoded with another configuration; choose another --out")
        groups = [range(number * length, min((number + 1) * length, size)) for number in missing]
        for number, (clips, latents) in zip(missing, self._encode(groups), strict=True):
            latent_shards.write_shard(latent_shards.shard_path(self.folder, number), clips, latents, about)
        dist.barrier()
        if self.process.is_main:
            written = latent_shards.write_manifest(self.folder, self.annotations, count)
            print(f"{self.folder}: {written} of {size} clips in {count} shards", flush=True)
        dist.barrier()

    def write_files(self) -> None:
        """FutureLatents' format: `clips/XXXXXXXX.pt`, a tensor `d t h w` each, and `manifest.csv` with out_path and label."""
        (self.folder / "clips").mkdir(exist_ok=True)
        mine = range(self.process.rank, len(self.annotations), self.process.world_size)
        batches = [mine[first : first + self._batch_size] for first in range(0, len(mine), self._batch_size)]
        missing = [batch for batch in batches if not all(self._file(clip).exists() for clip in batch)]
        for clips, latents in self._encode(missing):
            for clip, clip_latents in zip(clips.tolist(), latents, strict=True):
                temporary = self._file(clip).with_suffix(".unfinished")
                torch.save(rearrange(clip_latents, "t h w d -> d t h w").contiguous(), temporary)
                temporary.replace(self._file(clip))
        dist.barrier()
        if self.process.is_main:
            rows = [(f"clips/{clip:08d}.pt", label) for clip, label in enumerate(self.annotations.labels) if self._file(clip).exists()]
            with open(self.folder / "manifest.csv", "w", newline="", encoding="utf-8") as lines:
                csv.writer(lines).writerows([("out_path", "label"), *rows])
            print(f"{self.folder}: {len(rows)} of {len(self.annotations)} clips", flush=True)
        dist.barrier()

    def _file(self, clip: int) -> Path:
        return self.folder / "clips" / f"{clip:08d}.pt"

    @property
    def _batch_size(self) -> int:
        return evaluation_place(self.config, self.process).micro_batch_size

    @torch.no_grad()
    def _encode(self, groups: list[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each group of clips (clips int64 [n], latents bf16 [n t h w d]); clips that can't be read are left out."""
        device = self.process.device
        batches = self.dataset.chosen_batches(groups, self._batch_size, self.split, device)
        total, quiet = sum(map(len, groups)), None if self.process.is_main else True
        with tqdm(total=total, desc=f"encoding {self.split}", unit="clip", disable=quiet) as bar:
            for group in groups:
                parts = []
                for _ in range(-(-len(group) // self._batch_size)):
                    batch = next(batches)
                    video = batch.video.to(device, non_blocking=True)
                    latents = torch.cat(encode_clip(self.encoder, video, self.layout, self.config.backbone.encode), dim=1)
                    parts.append((batch.clip[batch.valid], latents.to(torch.bfloat16).cpu()[batch.valid]))
                    bar.update(len(parts[-1][0]))
                clips, latents = (torch.cat(part) for part in zip(*parts, strict=True))
                yield clips, latents
        batches.close()
