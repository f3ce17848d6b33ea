"""Latents: the layout `b t h w d`, the split into context and target, and normalisation.

By default latents are standardised per channel, since the noise of flow matching has unit variance per channel. A head
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
    """The shape of a forecast: `target_frames` latent frames after `context_frames`, each `height` x `width` positions
    of `dim` channels."""

    context_frames: int
    target_frames: int
    height: int
    width: int
    dim: int

    @property
    def context_tokens(self) -> int:
        """The number of positions in all context frames."""
        return self.context_frames * self.height * self.width

    @property
    def target_tokens(self) -> int:
        """The number of positions in all target frames."""
        return self.target_frames * self.height * self.width


def latent_geometry(config: Config, frames: int, height: int, width: int, dim: int) -> LatentGeometry:
    """Split a clip of `frames` latent frames into context and target. Raises `UserError` if it is too short."""
    context = config.model.num_context_latents
    target = config.model.num_target_latents or frames - context
    if target < 1 or context + target > frames:
        raise UserError(
            f"model.num_context_latents {context} + num_target_latents {config.model.num_target_latents} do not "
            f"fit the clip: dataset.n_frames {config.dataset.n_frames} gives {frames} latent frames"
        )
    return LatentGeometry(context, target, height, width, dim)


@dataclass
class Statistics:
    """Mean and standard deviation of each channel of the raw latents, fp32 [d]."""

    channel_mean: Tensor
    channel_std: Tensor

    def to(self, device: torch.device) -> "Statistics":
        """The same on another device."""
        return Statistics(self.channel_mean.to(device), self.channel_std.to(device))


class Normaliser(nn.Module):
    """Normalises latents. `kind` is a value of latents.embedding_norm; `statistics` are needed for "standardize"."""

    def __init__(self, kind: str, dtype: torch.dtype, statistics: Statistics | None = None):
        super().__init__()
        self.kind, self.dtype = kind, dtype
        if kind == "standardize" and statistics is not None:
            self.register_buffer("mean", statistics.channel_mean)
            self.register_buffer("std", statistics.channel_std)

    def fused(self) -> dict | None:
        """The normalisation as arguments of the flow-matching operators, which normalise the latents that they read;
        None for "l1", which they don't support."""
        match self.kind:
            case "standardize":
                return {"mean": self.mean, "std": self.std}
            case "none" | "l2" | "layer":
                return {"norm": self.kind, "eps": EPSILON}
        return None

    def forward(self, latents: Tensor) -> Tensor:
        """`… d` of any float dtype to the same shape in `dtype`, computed in fp32."""
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
