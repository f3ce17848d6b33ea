"""The latent contract: `b t h w d`, split into context and target, normalised before a head sees it.

Flow matching draws noise of unit variance per channel, so by default latents are standardised per channel; a head
that outputs zero then forecasts the mean latent.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flperf.config import Config
from flperf.errors import UserError

EPSILON = 1e-6


@dataclass(frozen=True)
class LatentGeometry:
    """A forecast's geometry: `target_frames` latent frames after `context_frames`, each a `height` x `width` grid of
    `dim` channels."""

    context_frames: int
    target_frames: int
    height: int
    width: int
    dim: int

    @property
    def context_tokens(self) -> int:
        """Places of the context, over all its frames."""
        return self.context_frames * self.height * self.width

    @property
    def target_tokens(self) -> int:
        """Places of the target, over all its frames."""
        return self.target_frames * self.height * self.width


def latent_geometry(config: Config, frames: int, height: int, width: int, dim: int) -> LatentGeometry:
    """Split `frames` latent frames into context and target as the configuration asks."""
    context = config.model.num_context_latents
    target = config.model.num_target_latents or frames - context
    if target < 1 or context + target > frames:
        raise UserError(
            f"model.num_context_latents {context} + num_target_latents {config.model.num_target_latents} do not "
            "fit the clip: "
            f"dataset.n_frames {config.dataset.n_frames} gives {frames} latent frames"
        )
    return LatentGeometry(context, target, height, width, dim)


@dataclass
class Statistics:
    """Mean and standard deviation of every channel of the raw latents, fp32 [d]."""

    channel_mean: Tensor
    channel_std: Tensor

    def to(self, device: torch.device) -> "Statistics":
        """The same on another device."""
        return Statistics(self.channel_mean.to(device), self.channel_std.to(device))


class Normaliser(nn.Module):
    """`b t h w d` latents of any float dtype to normalised ones, computed in fp32 and returned in `dtype`."""

    def __init__(self, kind: str, dtype: torch.dtype, statistics: Statistics | None = None):
        super().__init__()
        self.kind, self.dtype = kind, dtype
        if kind == "standardize" and statistics is not None:
            self.register_buffer("mean", statistics.channel_mean)
            self.register_buffer("std", statistics.channel_std)

    def fused(self) -> dict | None:
        """The same as arguments of the flow-matching ops, which then normalise as they read; None where they can't
        ("l1")."""
        match self.kind:
            case "standardize":
                return {"mean": self.mean, "std": self.std}
            case "none" | "l2" | "layer":
                return {"norm": self.kind, "eps": EPSILON}
        return None

    def forward(self, latents: Tensor) -> Tensor:
        """`… d` of any float dtype to the same shape in `dtype`."""
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
