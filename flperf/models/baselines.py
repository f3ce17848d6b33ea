"""The forecasts that need no training, fitted once a run on its first training clips: what a head must beat.

copy_last repeats the last context latent; mean and median are those of each place over the training clips; ridge is a
local linear regression, which sees motion. Everything is in normalised latents, so channel statistics come first: the
clips' latents are kept on the host until both are known, which takes no second decoding.
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
RIDGE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a training token; the best on held-out clips is taken


@dataclass
class Baselines:
    """position_mean, position_median: fp32 [t' h w d]; ridge: fp32 [t' 3d+1 d], one regression a frame ahead, shared
    by all places."""

    position_mean: Tensor
    position_median: Tensor
    ridge: Tensor

    def to(self, device: torch.device) -> "Baselines":
        """The same on another device."""
        return Baselines(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def forecasts(self, context: Tensor) -> dict[str, Tensor]:
        """By name, fp32 tensors that broadcast to `b t' h w d`, of normalised context latents `b t h w d`."""
        context = context.float()
        return {
            "copy_last": context[:, -1:],
            "mean": self.position_mean[None],
            "median": self.position_median[None],
            "ridge": torch.einsum("bhwx,txd->bthwd", local_features(context), self.ridge),
        }


def local_features(context: Tensor) -> Tensor:
    """What the ridge regression sees of `b t h w d`, `b h w 3d+1`: the last latent, its change, the mean of its 3 x 3
    neighbours, 1."""
    last, previous = context[:, -1], context[:, max(-2, -context.shape[1])]
    neighbours = F.avg_pool2d(rearrange(last, "b h w d -> b d h w"), 3, stride=1, padding=1, count_include_pad=False)
    ones = torch.ones_like(last[..., :1])
    return torch.cat([last, last - previous, rearrange(neighbours, "b d h w -> b h w d"), ones], dim=-1)


class LatentSample:
    """Raw latents of the clips to fit on; each process adds its share, the result is that of all."""

    def __init__(self, normalisation: str, geometry: LatentGeometry, device: torch.device):
        self.normalisation, self.geometry, self.device = normalisation, geometry, device
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # held out [b], the last two context frames, target
        # sums of values and of squares
        self.channels = torch.zeros(2, geometry.dim, dtype=torch.float64, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, context: Tensor, target: Tensor, sample: Tensor) -> None:
        """Raw latents `b t h w d` and `b t' h w d`; the clips of odd samples choose the ridge regression's penalty."""
        for latents in (context, target):
            tokens = latents.flatten(0, -2).double()
            self.channels += torch.stack([tokens.sum(0), tokens.square().sum(0)])
            self.tokens += len(tokens)
        folds, last, following = (
            part.to("cpu", copy=True) for part in (sample % 2, context[:, -2:], target)
        )  # the batch's memory is used again
        self.pairs.append((folds, last, following))

    @torch.no_grad()
    def result(self, channels: tuple[Tensor, Tensor] | None = None) -> tuple[Statistics, Baselines]:
        """`channels`: mean and standard deviation [d] known from more clips, which replace those measured here."""
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
        # A channel that never changes carries no information; it must not be blown up to infinity.
        std = torch.where(std < EPSILON, torch.ones_like(std), std)
        return Statistics(mean.float(), std.float())

    def _positions(self, normaliser: Normaliser, frame: int) -> tuple[Tensor, Tensor]:
        """Mean and median over all clips of one target frame, fp32 [h w d] each: frame by frame, so that little is
        held at a time."""
        latents = torch.cat([normaliser(target[:, frame].to(self.device)) for _, _, target in self.pairs])
        if dist.is_initialized():
            shares = [torch.empty_like(latents) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, latents)
            latents = torch.cat(shares)
        ordered = latents.sort(dim=0).values
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else ordered[middle - 1 : middle + 1].mean(0)
        # of sorted values: the same bits however the clips were shared out
        return ordered.double().mean(0).float(), median

    def _ridge(self, normaliser: Normaliser) -> Tensor:
        """[t' 3d+1 d]: least squares with the penalty on everything but the constant that does best on the other half
        of the clips."""
        geometry, width = self.geometry, 3 * self.geometry.dim + 1
        gram = torch.zeros(2, width, width, dtype=torch.float64, device=self.device)
        cross = torch.zeros(2, geometry.target_frames, width, geometry.dim, dtype=torch.float64, device=self.device)
        for held_out, context, target in self.pairs:
            x, y = (
                local_features(normaliser(context.to(self.device))).double(),
                normaliser(target.to(self.device)).double(),
            )
            for half in (0, 1):
                mine = held_out == half
                inputs = rearrange(x[mine], "b h w x -> (b h w) x")
                gram[half] += inputs.T @ inputs
                cross[half] += torch.einsum("nx,tnd->txd", inputs, rearrange(y[mine], "b t h w d -> t (b h w) d"))
        gram, cross = self._reduced(gram), self._reduced(cross)
        tokens = gram[:, -1, -1]  # the constant feature counts them
        if tokens.min() == 0:  # a single clip: nothing to choose by
            return ridge_solution(gram.sum(0), cross.sum(0), RIDGE_PENALTIES[-1]).float()
        solutions = [ridge_solution(gram[0], cross[0], penalty) for penalty in RIDGE_PENALTIES]
        # The squared error on the other half but for a constant: w' G w - 2 w' c.
        errors = [((gram[1] @ w - 2 * cross[1]) * w).sum() for w in solutions]
        best = RIDGE_PENALTIES[int(torch.stack(errors).argmin())]
        return ridge_solution(gram.sum(0), cross.sum(0), best).float()

    def _reduced(self, total: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(total)
        return total


def ridge_solution(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """w [t x d] that minimises |x w - y|^2 + penalty n |w|^2 given x'x [x x], with the constant last, and x'y [t x
    d]."""
    weight = penalty * gram[-1, -1] * torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    weight[-1] = 0
    factor = torch.linalg.cholesky(gram + weight.diag())
    return torch.cholesky_solve(cross, factor)


def save_statistics(path: Path, statistics: Statistics, baselines: Baselines) -> None:
    """The file appears complete or not at all: a run that is killed here measures anew."""
    write_atomically(
        path,
        save({name: tensor.cpu().contiguous() for name, tensor in {**vars(statistics), **vars(baselines)}.items()}),
    )


def load_statistics(path: Path, device: torch.device) -> tuple[Statistics, Baselines]:
    """What `save_statistics` wrote, on `device`. Raises `UserError` if the file is damaged."""
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(
            f"{path}: is damaged ({error}); remove it, and the next start of the run measures it anew"
        ) from None
    return split_statistics(tensors)


def split_statistics(tensors: dict[str, Tensor]) -> tuple[Statistics, Baselines]:
    """The two from their tensors by name."""
    channels = {name: tensors[name] for name in Statistics.__dataclass_fields__}
    return Statistics(**channels), Baselines(**{name: tensors[name] for name in Baselines.__dataclass_fields__})
