"""Regression: the head outputs the target latents in one pass."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flperf.config import Config
from flperf.models.latents import LatentGeometry, Normaliser


class Regression:
    """The head outputs the target latents; the loss compares them per element, or by cosine per token."""

    samples = 1

    def __init__(self, config: Config, geometry: LatentGeometry):
        distance = REGRESSION_LOSSES[config.objective.loss]

        def errors(prediction: Tensor, target: Tensor) -> Tensor:
            return distance(prediction.float(), target.float()).flatten(1).mean(1)

        # In eager mode, each of these operations would write the latents in fp32. Not fullgraph: a process with more
        # losses and shapes than torch keeps graphs for then continues in eager mode instead of raising an error.
        self.errors = torch.compile(errors, dynamic=False) if config.engine.compile else errors

    def loss(
        self,
        head: Callable,
        context: Tensor,
        target: Tensor,
        sample: Tensor,
        reduction: str = "mean",
        normaliser: Normaliser | None = None,
    ) -> Tensor:
        """fp32 scalar, or [b] with reduction "sample". context, target: normalised `b t h w d`; with a normaliser, the
        target is raw."""
        target = normaliser(target) if normaliser else target
        per_sample = self.errors(head(context), target)
        return per_sample.mean() if reduction == "mean" else per_sample

    def draw(self, head: nn.Module, context: Tensor, keys: Tensor, window: int = 0) -> Tensor:
        """One forecast of each clip, fp32 `b 1 t h w d`. Nothing is random."""
        return head(context).float()[:, None]


REGRESSION_LOSSES = {
    "mse": lambda prediction, target: (prediction - target).square(),
    "l1": lambda prediction, target: (prediction - target).abs(),
    "smooth_l1": lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction="none"),
    "cosine": lambda prediction, target: 1 - F.cosine_similarity(prediction, target, dim=-1),
}
