"""Scores of forecasts against true latents, and how they are summed over clips and processes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# (forecast, target), both `b t h w d` or broadcastable, to the error of each frame, [b t].
ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda forecast, target: (forecast - target).abs().mean((2, 3, 4)),
    "mse": lambda forecast, target: (forecast - target).square().mean((2, 3, 4)),
    # distance: 0 is best
    "cosine": lambda forecast, target: (1 - F.cosine_similarity(forecast, target, dim=-1)).mean((2, 3)),
    # the energy score of a single forecast
    "energy": lambda forecast, target: (forecast - target).square().mean((2, 3, 4)).sqrt(),
}

SMALLEST = 1e-12  # what a baseline's error is taken to be where it is perfect


class MeanAccumulator:
    """Adds up named values of each clip over the valid clips, and over processes in the end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.totals: dict[str, Tensor] = {}
        self.clips = torch.zeros((), dtype=torch.float64, device=device)

    def count(self, valid: Tensor) -> None:
        """Count the valid clips of a batch; valid: bool [b]."""
        self.clips += valid.sum()

    def add(self, key: str, values: Tensor, valid: Tensor) -> None:
        """values: [b …], of which rows that are not valid count nothing, even where they are not finite."""
        values = values.double()
        shown = valid.view(-1, *[1] * (values.ndim - 1))
        total = torch.where(shown, values, 0.0).sum(0)
        self.totals[key] = self.totals[key] + total if key in self.totals else total

    def means(self) -> dict[str, Tensor]:
        """By key, fp64 on the CPU, of one clip's shape."""
        flat = torch.cat([self.clips.view(1), *(total.flatten() for total in self.totals.values())])
        if dist.is_initialized():
            dist.all_reduce(flat)
        self.clips, *parts = flat.cpu().split([1, *(total.numel() for total in self.totals.values())])
        return {
            key: (part / self.clips).view(total.shape)
            for (key, total), part in zip(self.totals.items(), parts, strict=True)
        }


@dataclass
class Gaussian:
    """mean [d] and covariance [d d], fp64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def root(self) -> Tensor:
        """The covariance's square root; what takes longest of a Fréchet distance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Moments:
    """Mean and covariance of the tokens of each latent frame, for the Fréchet distance."""

    def __init__(self, frames: int, dim: int, device: torch.device):
        # outer products, then the sum
        self.total = torch.zeros(frames, dim + 1, dim, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)  # of a frame

    def add(self, latents: Tensor) -> None:
        """latents: `b t h w d`."""
        # roots of small eigenvalues show what fp32 products lose
        tokens = rearrange(latents, "b t h w d -> t (b h w) d").double()
        self.total += torch.cat([tokens.mT @ tokens, tokens.sum(1, keepdim=True)], dim=1)
        self.tokens += tokens.shape[1]

    def result(self) -> list[Gaussian]:
        """Of each frame, and at last of all frames together; over all processes, on the CPU."""
        if dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.tokens)
        frames = (self.total / self.tokens).cpu()
        return [
            Gaussian(total[-1], total[:-1] - torch.outer(total[-1], total[-1])) for total in [*frames, frames.mean(0)]
        ]


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians of means [d] (Heusel et al., arXiv:1706.08500,
    equation 6)."""
    overlap = torch.linalg.eigvalsh(first.root @ second.covariance @ first.root).clamp(min=0).sqrt().sum()
    return (
        (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace() - 2 * overlap
    ).item()


def sample_scores(samples: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Scores of k > 1 samples `b k t h w d` against `b t h w d`, [b t] each.

    sample_*: the error of one sample, on average; best_*: of the one that is best at that frame (best_clip_*, [b]: in
    that clip); variance: over the samples, unbiased; forecast_energy: the energy score (Gneiting and Raftery 2007,
    equation 21, unbiased), a frame's distances divided by the root of its size.
    """
    count = samples.shape[1]
    scores = {}
    for name in ("l1", "mse"):
        errors = torch.stack([ERRORS[name](sample, target) for sample in samples.unbind(1)], dim=1)  # b k t
        scores |= {
            f"sample_{name}": errors.mean(1),
            f"best_{name}": errors.amin(1),
            f"best_clip_{name}": errors.mean(2).amin(1),
        }
    scores["variance"] = samples.var(1).mean((2, 3, 4))
    flat = rearrange(samples, "b k t h w d -> b t k (h w d)")
    scale = flat.shape[-1] ** 0.5
    to_target = (flat - rearrange(target, "b t h w d -> b t 1 (h w d)")).norm(dim=-1).mean(-1)
    among = sum((flat[:, :, i] - flat[:, :, j]).norm(dim=-1) for i in range(count) for j in range(i))
    scores["forecast_energy"] = (to_target - among / (count * (count - 1))) / scale
    return scores


def _spread(variance: Tensor, error: Tensor, samples: int) -> Tensor:
    """Spread of k samples against the squared error of their mean, which is 1 + 1/k of their variance where they are
    honest (Fortin et al. 2014, equation 15): 1 is calibrated, less too sure."""
    return ((1 + 1 / samples) * variance / error).sqrt()
