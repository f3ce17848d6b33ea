"""The latent contract: `b t h w d`, split into context and target, normalised before a head sees it.

Flow matching draws noise of unit variance per channel, so by default latents are standardised per channel; a head that outputs
zero then forecasts the mean latent.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flperf.config import Config, UserError

EPSILON = 1e-6


@dataclass(frozen=True)
class Layout:
    """A forecast's geometry: `target_frames` latent frames after `context_frames`, each a `height` x `width` grid of `dim` channels."""

    context_frames: int
    target_frames: int
    height: int
    width: int
    dim: int

    @property
    def context_tokens(self) -> int:
        return self.context_frames * self.height * self.width

    @property
    def target_tokens(self) -> int:
        return self.target_frames * self.height * self.width


def latent_layout(config: Config, frames: int, height: int, width: int, dim: int) -> Layout:
    """Split `frames` latent frames into context and target as the configuration asks."""
    context = config.model.num_context_latents
    target = config.model.num_target_latents or frames - context
    if target < 1 or context + target > frames:
        raise UserError(
            f"model.num_context_latents {context} + num_target_latents {config.model.num_target_latents} do not fit the clip: "
            f"dataset.n_frames {config.dataset.n_frames} gives {frames} latent frames"
        )
    return Layout(context, target, height, width, dim)


@dataclass
class Statistics:
    """Measured once a run from training clips. channel_mean, channel_std: fp32 [d]; position_mean: fp32 [t' h w d], the mean of each
    target place in normalised latents, one of the forecasts that a head must beat."""

    channel_mean: Tensor
    channel_std: Tensor
    position_mean: Tensor

    def save(self, path: Path) -> None:
        save_file({name: tensor.cpu().contiguous() for name, tensor in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Statistics":
        return cls(**load_file(path, device=str(device)))


class Normaliser(nn.Module):
    """`b t h w d` latents of any float dtype to normalised ones, computed in fp32 and returned in `dtype`."""

    def __init__(self, kind: str, dtype: torch.dtype, statistics: Statistics | None = None):
        super().__init__()
        self.kind, self.dtype = kind, dtype
        if kind == "standardize" and statistics is not None:
            self.register_buffer("mean", statistics.channel_mean)
            self.register_buffer("std", statistics.channel_std)

    def fused(self) -> dict | None:
        """The same as arguments of the flow-matching ops, which then normalise as they read; None where they can't ("l1")."""
        match self.kind:
            case "standardize":
                return {"mean": self.mean, "std": self.std}
            case "none" | "l2" | "layer":
                return {"norm": self.kind, "eps": EPSILON}
        return None

    def forward(self, latents: Tensor) -> Tensor:
        x = latents.float()
        match self.kind:
            case "standardize":
                x = (x - self.mean) / self.std
            case "l1":
                x = F.normalize(x, p=1, dim=-1, eps=EPSILON)
            case "l2":
                x = F.normalize(x, p=2, dim=-1, eps=EPSILON)
            case "layer":
                x = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return x.to(self.dtype)


class StatisticsMeter:
    """Accumulates `Statistics` batch by batch, in fp64, so that neither the order of clips nor their share between processes matters."""

    def __init__(self, kind: str, layout: Layout, device: torch.device):
        # Standardising is affine, so the mean per place is taken of raw latents and standardised at the end.
        self.per_token = Normaliser(kind if kind != "standardize" else "none", torch.float32)
        self.kind = kind
        place = (layout.target_frames, layout.height, layout.width, layout.dim)
        shapes = {"sum": (layout.dim,), "squares": (layout.dim,), "tokens": (), "place": place, "clips": ()}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    @torch.no_grad()
    def update(self, context: Tensor, target: Tensor) -> None:
        """Raw latents, `b t h w d` and `b t' h w d`."""
        for latents in (context, target):
            tokens = latents.flatten(0, -2).double()
            self.sums["sum"] += tokens.sum(0)
            self.sums["squares"] += tokens.square().sum(0)
            self.sums["tokens"] += len(tokens)
        self.sums["place"] += self.per_token(target).double().sum(0)
        self.sums["clips"] += len(target)

    def result(self, channels: tuple[Tensor, Tensor] | None = None) -> Statistics:
        """Over all processes; `channels`, mean and deviation [d] known from more clips, replace those measured here."""
        for total in self.sums.values():
            if dist.is_initialized():
                dist.all_reduce(total)
        mean = self.sums["sum"] / self.sums["tokens"]
        std = (self.sums["squares"] / self.sums["tokens"] - mean.square()).clamp(min=0).sqrt()
        if channels is not None:
            mean, std = (statistic.to(mean) for statistic in channels)
        # A channel that never changes carries no information; it must not be blown up to infinity.
        std = torch.where(std < EPSILON, torch.ones_like(std), std)
        place = self.sums["place"] / self.sums["clips"]
        if self.kind == "standardize":
            place = (place - mean) / std
        return Statistics(mean.float(), std.float(), place.float())
