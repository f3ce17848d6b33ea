"""What preparing a set costs: how far the pixels and the latents of a sample of clips are from the originals'."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from flperf.config import Config
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import PyAVReader
from flperf.data.samplers import ClipRequest
from flperf.data.unreadable import BadClip
from flperf.data.videos import frame_sampling
from flperf.engine.process import Process, compute_dtype
from flperf.errors import UserError
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.latents import latent_geometry

SAMPLE = 8  # clips


@dataclass(frozen=True)
class Cost:
    """Differences of a sample of clips from their originals, as a backbone sees them."""

    clips: int
    pixels: float  # mean absolute difference in levels of 255
    psnr: float  # decibels
    latents: float  # relative L2 distance
    cosine: float  # mean over tokens
    backbone: str

    def describe(self) -> str:
        """In one sentence."""
        return (
            f"on {self.clips} clips, pixels differ from the originals' by {self.pixels:.2f} levels of 255 on average "
            f"(PSNR {self.psnr:.1f} dB), and the latents of {self.backbone} by {self.latents:.1%} (relative L2; "
            f"cosine {self.cosine:.4f})"
        )


def measure_cost(config: Config, process: Process, pairs: list[tuple[str, str]]) -> Cost | None:
    """The cost by clips that are spread over `pairs` of (original, prepared) files. A collective, to which each process
    contributes its share of the clips. None without any pair; raises `UserError` if a clip can't be read again."""
    count = min(SAMPLE, len(pairs))
    if not count:
        return None
    chosen = [pairs[number * len(pairs) // count] for number in range(count)]
    preprocessing = Preprocessing.of(config.backbone)
    dtype = compute_dtype(config.engine.precision, process.device)
    encoder = build_encoder(config.backbone, preprocessing, dtype=dtype, device=process.device, compile=False)
    window = replace(frame_sampling(config.dataset, "validation"), start="center", short_clips="pad")
    readers = [PyAVReader(list(paths), window, preprocessing) for paths in zip(*chosen, strict=True)]
    sums = torch.zeros(7, dtype=torch.float64)
    for clip in range(process.rank, count, process.world_size):
        videos = []
        for reader in readers:
            videos.append(torch.empty(reader.shape, dtype=torch.uint8))
            try:
                reader.read(ClipRequest(clip, 0, clip, 0.0, valid=True), videos[-1])
            except BadClip as error:
                raise UserError(f"{error.args[0]}: can't be read again: {error.args[1]}") from None
        sums += differences_of(*videos) + latent_differences(config, encoder, videos, process)
    sums = sums.to(process.device)
    dist.all_reduce(sums)
    absolute, squared, values, distance, norm, cosine, tokens = sums.tolist()
    return Cost(
        clips=count,
        pixels=absolute / values,
        psnr=10 * math.log10(255**2 * values / max(squared, 1e-9)),
        latents=math.sqrt(distance / norm),
        cosine=cosine / tokens,
        backbone=f"{config.backbone.kind} {config.backbone.weights or '(random weights)'}",
    )


def differences_of(original: Tensor, prepared: Tensor) -> Tensor:
    """fp64 [7]: sums of absolute and squared differences of two clips `f h w c`, and the number of values."""
    difference = (original.short() - prepared.short()).double()
    sums = [difference.abs().sum().item(), difference.square().sum().item(), float(difference.numel())]
    return torch.tensor([*sums, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


@torch.no_grad()
def latent_differences(config: Config, encoder: Encoder, videos: list[Tensor], process: Process) -> Tensor:
    """fp64 [7]: squared distance of the latents of two clips `f h w c`, squared norm of the first, sum of the cosines
    of their tokens, and the number of tokens."""
    geometry = latent_geometry(config, *encoder.latent_shape(config.dataset.n_frames))
    original, prepared = (
        torch.cat(encode_clip(encoder, video[None].to(process.device), geometry, config.backbone.encode), dim=1).float()
        for video in videos
    )
    cosines = torch.cosine_similarity(original, prepared, dim=-1)
    sums = [(original - prepared).square().sum(), original.square().sum(), cosines.sum()]
    return torch.tensor([0.0, 0.0, 0.0, *(value.item() for value in sums), cosines.numel()], dtype=torch.float64)
