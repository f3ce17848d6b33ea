"""Metrics of forecasts against true latents, and their means over clips and processes."""

from collections.abc import Callable, Mapping
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
    # the cosine distance: 0 is best
    "cosine": lambda forecast, target: (1 - F.cosine_similarity(forecast, target, dim=-1)).mean((2, 3)),
    # the energy score of a single forecast
    "energy": lambda forecast, target: (forecast - target).square().mean((2, 3, 4)).sqrt(),
}
SAMPLE_ERRORS = ("l1", "mse")  # also computed for each of several samples

Key = str | tuple[str, str]  # of a score: its name, or a forecast and an error


class MeanAccumulator:
    """Means of scores over the valid clips of all batches and processes."""

    def __init__(self, device: torch.device):
        self.totals: dict[Key, Tensor] = {}
        self.clips = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, scores: Mapping[Key, Tensor], valid: Tensor) -> None:
        """Add a batch: scores [b …] by key, valid bool [b]. Clips that are not valid may hold NaN or infinity."""
        self.clips += valid.sum()
        for key, values in scores.items():
            mask = valid.view(-1, *[1] * (values.ndim - 1))
            total = torch.where(mask, values.double(), 0.0).sum(0)
            self.totals[key] = self.totals[key] + total if key in self.totals else total

    def means(self) -> dict[Key, Tensor]:
        """Mean over the clips of all processes, by key: fp64 […] on the CPU. NaN if there are none."""
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
        """Square root of the covariance; cached, since it is the slowest part of a Fréchet distance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Moments:
    """Mean and covariance of the tokens of each latent frame, for the Fréchet distance.

    Sums are fp64: in fp32 rounding errors would dominate the roots of small eigenvalues.
    """

    def __init__(self, frames: int, dim: int, device: torch.device):
        # of each frame: the sum of outer products, then the sum of tokens
        self.total = torch.zeros(frames, dim + 1, dim, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)  # per frame

    def add(self, latents: Tensor) -> None:
        """Add latents `b t h w d`."""
        tokens = rearrange(latents, "b t h w d -> t (b h w) d").double()
        self.total += torch.cat([tokens.mT @ tokens, tokens.sum(1, keepdim=True)], dim=1)
        self.tokens += tokens.shape[1]

    def result(self) -> list[Gaussian]:
        """t + 1 Gaussians on the CPU: of each frame, then of all frames together. Sums over all processes."""
        if dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.tokens)
        frames = (self.total / self.tokens).cpu()
        return [
            Gaussian(total[-1], total[:-1] - torch.outer(total[-1], total[-1])) for total in [*frames, frames.mean(0)]
        ]


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (Heusel et al., arXiv:1706.08500, equation 6)."""
    overlap = torch.linalg.eigvalsh(first.root @ second.covariance @ first.root).clamp(min=0).sqrt().sum()
    return (
        (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace() - 2 * overlap
    ).item()


def sample_scores(samples: Tensor, target: Tensor) -> dict[Key, Tensor]:
    """Scores of k > 1 samples `b k t h w d` against the target `b t h w d`, [b t] each.

    "sample": mean error of the samples. "best": error of the best sample of each frame; "best_of_clip" [b]: of the
    sample that is best over the whole clip. "variance": over the samples, unbiased. The forecast's "energy": the
    unbiased energy score (Gneiting and Raftery 2007, equation 21), with distances between frames divided by the square
    root of their number of values.
    """
    count = samples.shape[1]
    scores: dict[Key, Tensor] = {}
    for name in SAMPLE_ERRORS:
        errors = torch.stack([ERRORS[name](sample, target) for sample in samples.unbind(1)], dim=1)  # b k t
        scores["sample", name] = errors.mean(1)
        scores["best", name] = errors.amin(1)
        scores["best_of_clip", name] = errors.mean(2).amin(1)
    scores["variance"] = samples.var(1).mean((2, 3, 4))
    flat = rearrange(samples, "b k t h w d -> b t k (h w d)")
    scale = flat.shape[-1] ** 0.5
    to_target = (flat - rearrange(target, "b t h w d -> b t 1 (h w d)")).norm(dim=-1).mean(-1)
    between = sum((flat[:, :, i] - flat[:, :, j]).norm(dim=-1) for i in range(count) for j in range(i))
    scores["forecast", "energy"] = (to_target - between / (count * (count - 1))) / scale
    return scores
