"""Locators: where are the square and the disk, judging by the latents of one frame? Positions as flperf.data.bouncing_shapes states them.

`Coordinates` regresses them, `Heatmaps` says for every patch how likely a centre is there. Both see standardised latents `n h w d` in fp32.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flperf.data.bouncing_shapes import SHAPES, heatmap_centres, patch_heatmaps, to_pixels, to_unit

REDUCED, HIDDEN = 16, 256  # channels


class Coordinates(nn.Module):
    """A two-layer MLP on all patches, each reduced to a few channels first, to (x, y) in [-1, 1]."""

    def __init__(self, height: int, width: int, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.reduce = nn.Linear(dim, REDUCED)
        self.mlp = nn.Sequential(nn.Linear(height * width * REDUCED, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * len(SHAPES)))

    def forward(self, latents: Tensor) -> Tensor:
        tokens = rearrange(self.reduce(latents), "n h w c -> n (h w c)")
        return rearrange(self.mlp(tokens), "n (shape xy) -> n shape xy", xy=2)

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Mean squared error in [-1, 1] of centres `n 2 2` in pixels."""
        return F.mse_loss(self(latents), to_unit(centres, self.image_size))

    def locate(self, latents: Tensor) -> Tensor:
        """`n h w d` to centres `n 2 2` in pixels of the canvas."""
        return to_pixels(self(latents), self.image_size)


class Heatmaps(nn.Module):
    """A two-layer MLP on each patch and its neighbours to a logit a shape; the centre is the mean of the distribution over patches."""

    def __init__(self, height: int, width: int, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.mlp = nn.Sequential(nn.Conv2d(dim, HIDDEN, 3, padding=1), nn.GELU(), nn.Conv2d(HIDDEN, len(SHAPES), 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Logits `n 2 h w`."""
        return self.mlp(rearrange(latents, "n h w d -> n d h w"))

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Cross-entropy with the distribution over patches whose mean is the centre."""
        logits = self(latents)
        wanted = patch_heatmaps(centres, self.image_size, *logits.shape[-2:])
        return F.cross_entropy(rearrange(logits, "n shape h w -> (n shape) (h w)"), rearrange(wanted, "n shape h w -> (n shape) (h w)"))

    def locate(self, latents: Tensor) -> Tensor:
        logits = self(latents)
        return heatmap_centres(logits.flatten(-2).softmax(-1).view_as(logits), self.image_size)


LOCATORS = {"coordinates": Coordinates, "heatmap": Heatmaps}


class Locator(nn.Module):
    """One of them for a grid of (height, width, channels), with the mean and deviation of the latents that it was trained on."""

    def __init__(self, kind: str, grid: tuple[int, int, int], image_size: int):
        super().__init__()
        self.kind, self.grid = kind, grid
        self.register_buffer("mean", torch.zeros(grid[2]))
        self.register_buffer("std", torch.ones(grid[2]))
        self.head = LOCATORS[kind](*grid, image_size)

    def standardise(self, latents: Tensor) -> Tensor:
        return (latents.float() - self.mean) / self.std

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        return self.head.loss(self.standardise(latents), centres)

    def locate(self, latents: Tensor) -> Tensor:
        """Latents `… h w d` to centres `… 2 2` of square and disk, (x, y) in pixels of the canvas."""
        located = self.head.locate(self.standardise(latents.flatten(0, -4)))
        return located.view(*latents.shape[:-3], *located.shape[1:])
