"""Baselines: simple forecasts that a head must beat, fitted once per run on its first training clips.

"copy_last" repeats the last context frame. "mean" and "median" are those of the training clips at each position.
"ridge" is a local linear regression, which can use motion. All are in normalised latents, so they are fitted after the
channel statistics; the raw latents are kept in host memory meanwhile, so that clips are decoded and encoded once.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flperf.errors import UserError
from flperf.files import write_atomically
from flperf.models.latents import EPSILON, LatentGeometry, Normaliser, Statistics

BASELINES = ("copy_last", "mean", "median", "ridge")
RIDGE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # per training token; chosen on held-out clips


@dataclass
class Baselines:
    """position_mean and position_median: fp32 `t' h w d`. ridge: fp32 [t' 3d+1 d], one regression per frame ahead,
    shared by all positions."""

    position_mean: Tensor
    position_median: Tensor
    ridge: Tensor

    def to(self, device: torch.device) -> "Baselines":
        """The same on another device."""
        return Baselines(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def forecasts(self, context: Tensor) -> dict[str, Tensor]:
        """Forecasts by name, fp32 tensors that broadcast to `b t' h w d`, from normalised context latents
        `b t h w d`."""
        context = context.float()
        return {
            "copy_last": context[:, -1:],
            "mean": self.position_mean[None],
            "median": self.position_median[None],
            "ridge": torch.einsum("bhwx,txd->bthwd", local_features(context), self.ridge),
        }


def local_features(context: Tensor) -> Tensor:
    """Inputs of the ridge regression, `b h w 3d+1`, from `b t h w d`: the last latent, its change, the mean over its
    3 x 3 neighbourhood, and 1."""
    last, previous = context[:, -1], context[:, max(-2, -context.shape[1])]
    neighbours = F.avg_pool2d(rearrange(last, "b h w d -> b d h w"), 3, stride=1, padding=1, count_include_pad=False)
    ones = torch.ones_like(last[..., :1])
    return torch.cat([last, last - previous, rearrange(neighbours, "b d h w -> b h w d"), ones], dim=-1)


class LatentSample:
    """Collects raw latents and fits statistics and baselines on them. Each process adds its share of the clips; the
    result is that of all clips."""

    def __init__(self, normalisation: str, geometry: LatentGeometry, device: torch.device):
        self.normalisation, self.geometry, self.device = normalisation, geometry, device
        # per batch on the CPU: fold [b], the last two context frames, the target
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []
        # sums of values and of squares
        self.channels = torch.zeros(2, geometry.dim, dtype=torch.float64, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, context: Tensor, target: Tensor, sample: Tensor) -> None:
        """Add raw latents `b t h w d` and `b t' h w d`. Clips with an odd sample index (int64 [b]) are held out to
        choose the penalty of the ridge regression."""
        for latents in (context, target):
            tokens = latents.flatten(0, -2).double()
            self.channels += torch.stack([tokens.sum(0), tokens.square().sum(0)])
            self.tokens += len(tokens)
        # copied, since the memory of the batch is reused
        folds, last, following = (part.to("cpu", copy=True) for part in (sample % 2, context[:, -2:], target))
        self.batches.append((folds, last, following))

    @torch.no_grad()
    def result(self, channels: tuple[Tensor, Tensor] | None = None) -> tuple[Statistics, Baselines]:
        """Statistics and baselines of all clips. `channels`: mean and standard deviation [d] of the whole dataset, if
        known; they replace those measured here. Raises `UserError` for latents with NaN or infinity."""
        statistics = self._statistics(channels)
        normaliser = Normaliser(self.normalisation, torch.float32, statistics).to(self.device)
        frames = [self._positions(normaliser, frame) for frame in range(self.geometry.target_frames)]
        mean, median = (torch.stack(part) for part in zip(*frames, strict=True))
        return statistics, Baselines(mean, median, self._ridge(normaliser))

    def _statistics(self, channels: tuple[Tensor, Tensor] | None) -> Statistics:
        total = self._reduced(
            torch.cat([self.channels.flatten(), torch.tensor([float(self.tokens)], device=self.device).double()])
        )
        if not total.isfinite().all():
            raise UserError(
                "the latents of the first training clips hold NaN or infinity; check backbone.weights and "
                "engine.precision"
            )
        mean, squares = total[:-1].view(2, -1) / total[-1]
        std = (squares - mean.square()).clamp(min=0).sqrt()
        if channels is not None:
            mean, std = (statistic.to(mean) for statistic in channels)
        # A constant channel would be divided by zero.
        std = torch.where(std < EPSILON, torch.ones_like(std), std)
        return Statistics(mean.float(), std.float())

    def _positions(self, normaliser: Normaliser, frame: int) -> tuple[Tensor, Tensor]:
        """Mean and median over all clips of one target frame, fp32 `h w d` each. One frame at a time saves memory."""
        latents = torch.cat([normaliser(target[:, frame].to(self.device)) for _, _, target in self.batches])
        if dist.is_initialized():
            shares = [torch.empty_like(latents) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, latents)
            latents = torch.cat(shares)
        ordered = latents.sort(dim=0).values
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else ordered[middle - 1 : middle + 1].mean(0)
        # Summed in sorted order, so that the result does not depend on how the clips are distributed, to the last bit.
        return ordered.double().mean(0).float(), median

    def _ridge(self, normaliser: Normaliser) -> Tensor:
        """Weights fp32 [t' 3d+1 d] of the ridge regression, fitted on all clips with the penalty that is best on the
        held-out half when fitted on the other half."""
        geometry, width = self.geometry, 3 * self.geometry.dim + 1
        gram = torch.zeros(2, width, width, dtype=torch.float64, device=self.device)
        cross = torch.zeros(2, geometry.target_frames, width, geometry.dim, dtype=torch.float64, device=self.device)
        for folds, context, target in self.batches:
            x = local_features(normaliser(context.to(self.device))).double()
            y = normaliser(target.to(self.device)).double()
            for fold in (0, 1):
                chosen = folds == fold
                inputs = rearrange(x[chosen], "b h w x -> (b h w) x")
                outputs = rearrange(y[chosen], "b t h w d -> t (b h w) d")
                gram[fold] += inputs.T @ inputs
                cross[fold] += torch.einsum("nx,tnd->txd", inputs, outputs)
        gram, cross = self._reduced(gram), self._reduced(cross)
        tokens = gram[:, -1, -1]  # the number of tokens, since the last feature is 1
        if tokens.min() == 0:  # no clip is held out
            return ridge_solution(gram.sum(0), cross.sum(0), RIDGE_PENALTIES[-1]).float()
        solutions = [ridge_solution(gram[0], cross[0], penalty) for penalty in RIDGE_PENALTIES]
        # The squared error on the held-out half, up to a constant: w' G w - 2 w' c.
        errors = [((gram[1] @ w - 2 * cross[1]) * w).sum() for w in solutions]
        best = RIDGE_PENALTIES[int(torch.stack(errors).argmin())]
        return ridge_solution(gram.sum(0), cross.sum(0), best).float()

    def _reduced(self, total: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(total)
        return total


def ridge_solution(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """Weights w [t x d] that minimise |x w - y|^2 + penalty n |w|^2, where gram is x'x [x x] and cross is x'y [t x d].
    The last feature must be the constant 1; its weight has no penalty."""
    weight = penalty * gram[-1, -1] * torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    weight[-1] = 0
    factor = torch.linalg.cholesky(gram + weight.diag())
    return torch.cholesky_solve(cross, factor)


def save_statistics(path: Path, statistics: Statistics, baselines: Baselines) -> None:
    """Write both to one safetensors file, atomically."""
    write_atomically(
        path,
        save({name: tensor.cpu().contiguous() for name, tensor in {**vars(statistics), **vars(baselines)}.items()}),
    )


def load_statistics(path: Path, device: torch.device) -> tuple[Statistics, Baselines]:
    """Read what `save_statistics` wrote. Raises `UserError` if the file is damaged."""
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); remove it, and the next start measures it again") from None
    return split_statistics(tensors)


def split_statistics(tensors: dict[str, Tensor]) -> tuple[Statistics, Baselines]:
    """Statistics and baselines from their tensors by field name."""
    channels = {name: tensors[name] for name in Statistics.__dataclass_fields__}
    return Statistics(**channels), Baselines(**{name: tensors[name] for name in Baselines.__dataclass_fields__})
