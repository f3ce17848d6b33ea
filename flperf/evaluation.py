"""How good a forecast is, in normalised latents, beside the trivial forecasts that it must beat.

Every validation clip counts once, whatever the number of processes: sums are taken over valid clips and divided at the end.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

ERRORS = {"l1": lambda difference: difference.abs(), "mse": lambda difference: difference.square()}


class ErrorMeter:
    """Sums each forecast's errors over clips; `result` reduces them over processes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.clips = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, forecasts: dict[str, Tensor], target: Tensor, valid: Tensor) -> None:
        """forecasts: name -> fp32 tensor that broadcasts to `target` `b t h w d`; valid: bool [b]."""
        for name, forecast in forecasts.items():
            difference = forecast - target
            for error, distance in ERRORS.items():
                self.add(f"{name}_{error}", distance(difference).flatten(1).mean(1), valid)
        self.clips += valid.sum()

    def add(self, key: str, per_clip: Tensor, valid: Tensor) -> None:
        total = self.sums.setdefault(key, torch.zeros((), dtype=torch.float64, device=self.device))
        total += torch.where(valid, per_clip.double(), 0.0).sum()

    def result(self) -> dict[str, float]:
        totals = torch.stack([self.clips, *self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(totals)
        clips, *sums = totals.tolist()
        return dict(zip(self.sums, (total / clips for total in sums), strict=True))


def trivial_forecasts(context: Tensor, position_mean: Tensor) -> dict[str, Tensor]:
    """copy_last repeats the last context latent; mean is the mean training latent of each target place. Both fp32, broadcastable."""
    return {"copy_last": context[:, -1:].float(), "mean": position_mean[None]}


@torch.no_grad()
def evaluate(
    head: torch.nn.Module,
    objective,
    batches: Iterable,
    latents_of: Callable,
    position_mean: Tensor,
) -> dict[str, float]:
    """Validation loss, errors of the forecast (the mean of its samples) and of the trivial forecasts, and skill.

    batches yield `ClipBatch`es; latents_of turns one into normalised (context, target). skill = 1 - forecast's error / the better
    trivial forecast's, for each error; above 0 the head knows something.
    """
    meter = ErrorMeter(position_mean.device)
    for batch in batches:
        context, target = latents_of(batch)
        meter.add("loss", objective.loss(head, context, target, batch.sample, reduction="sample"), batch.valid)
        forecast = objective.forecast(head, context, batch.sample).mean(1)
        meter.update({"forecast": forecast, **trivial_forecasts(context, position_mean)}, target.float(), batch.valid)
    result = meter.result()
    for error in ERRORS:
        result[f"skill_{error}"] = 1 - result[f"forecast_{error}"] / min(result[f"copy_last_{error}"], result[f"mean_{error}"])
    return result


def summary(result: dict[str, float]) -> str:
    """The comparison as a few lines of text."""
    rows = [f"{'':>12}{'L1':>9}{'MSE':>9}"]
    names = {"forecast": "forecast", "copy_last": "copy last", "mean": "mean latent"}
    rows += [f"{label:>12}{result[f'{name}_l1']:9.4f}{result[f'{name}_mse']:9.4f}" for name, label in names.items()]
    return "\n".join([*rows, f"{'skill':>12}{result['skill_l1']:9.1%}{result['skill_mse']:9.1%}"])
