"""Positions of a head's tokens: rotary tables for attention, or sine features added to the tokens.

Shapes in einops names: b batch, n tokens, d width, a attention heads, k width of one attention head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flperf.models.latents import LatentGeometry

ROTARY_BASE = 10_000.0
Rotary = tuple[Tensor, Tensor]  # cosine and sine, each fp32 [n, 1, k/2]


def token_coordinates(geometry: LatentGeometry) -> Tensor:
    """Integer (t, h, w) of every context token, then of every target token, on one time axis: [m + n, 3]."""
    axes = (range(geometry.context_frames + geometry.target_frames), range(geometry.height), range(geometry.width))
    return torch.cartesian_prod(*(torch.tensor(list(axis)) for axis in axes)).reshape(-1, 3)


def rotary_table(coordinates: Tensor, head_dim: int) -> Rotary:
    """Cosine and sine of the 3-D rotary embedding (RoFormer, arXiv:2104.09864, section 3.2.2, axis by axis), each [n,
    1, k/2].

    The k/2 rotated pairs are divided among t, h and w; t gets the remainder.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    angles = []
    for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
        frequencies = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(coordinates[:, axis : axis + 1].float() * frequencies)
    table = torch.cat(angles, dim=1)[:, None, :]
    return table.cos(), table.sin()


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate the pairs (i, i + k/2) of `b n a k` by each token's angles, in fp32."""
    if rotary is None:
        return x
    cosine, sine = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def sine_table(coordinates: Tensor, dim: int) -> Tensor:
    """Fixed sine and cosine features of (t, h, w), [n, d]: a third of the channels for each axis, zero in the rest."""
    count = dim // 6
    frequencies = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / count)
    angles = coordinates.float()[:, :, None] * frequencies  # n 3 count
    features = rearrange(torch.cat([angles.sin(), angles.cos()], dim=-1), "n xyz f -> n (xyz f)")
    return F.pad(features, (0, dim - features.shape[1]))


class Positions(nn.Module):
    """Positions of context and target tokens: rotary tables for attention, or sine features added to the tokens."""

    def __init__(self, kind: str, geometry: LatentGeometry, dim: int, num_heads: int):
        super().__init__()
        coordinates = token_coordinates(geometry)
        sequences = {
            "context": coordinates[: geometry.context_tokens],
            "target": coordinates[geometry.context_tokens :],
            "all": coordinates,
        }
        for sequence, tokens in sequences.items():
            cosine, sine = rotary_table(tokens, dim // num_heads) if kind == "rope3d" else (None, None)
            added = sine_table(tokens, dim) if kind == "sincos" else None
            self.register_buffer(f"{sequence}_cosine", cosine, persistent=False)
            self.register_buffer(f"{sequence}_sine", sine, persistent=False)
            self.register_buffer(f"{sequence}_added", added, persistent=False)

    def rotary(self, sequence: str) -> Rotary | None:
        """fp32 tables `[n, 1, k/2]` of the "context", "target" or "all" tokens; None where positions are not rotary."""
        cosine = getattr(self, f"{sequence}_cosine")
        return None if cosine is None else (cosine, getattr(self, f"{sequence}_sine"))

    def add(self, tokens: Tensor, sequence: str) -> Tensor:
        """The tokens `b n d` of a sequence plus the features of their positions, if positions are added at all."""
        added = getattr(self, f"{sequence}_added")
        return tokens if added is None else tokens + added.to(tokens.dtype)
