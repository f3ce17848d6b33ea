"""The result of an evaluation: a score for each forecast and error, and the flat dictionary in metrics.jsonl."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flperf.evaluation.metrics import ERRORS
from flperf.models.baselines import BASELINES

MIN_BASELINE_ERROR = 1e-12  # keeps the skill finite where a baseline is perfect


@dataclass(frozen=True)
class Scores:
    """Means over the validation clips. Every score is an fp64 tensor [t+1] on the CPU: at each latent frame ahead (the
    horizon), then over all frames.

    `errors` are by forecast, then by error. The forecasts are "forecast" (the mean of the samples), the baselines and,
    where there are several samples, "sample" (one of them, on average) and "best" (of each frame; in the last entry, of
    each clip).
    """

    norm: str  # latents.embedding_norm: errors are comparable only between runs that share it
    clips: int
    loss: float
    samples: int  # per clip
    errors: dict[str, dict[str, Tensor]]
    variance: Tensor | None  # over the samples; None where there is one

    def skill(self, error: str) -> Tensor:
        """1 - the forecast's error / the best baseline's. 1 is perfect; above 0 is better than every baseline."""
        best = torch.stack([self.errors[name][error] for name in BASELINES]).amin(0)
        return 1 - self.errors["forecast"][error] / best.clamp(min=MIN_BASELINE_ERROR)

    def spread(self) -> Tensor:
        """Spread of the k samples / error of their mean: 1 is calibrated, below 1 overconfident.

        The squared error of the mean of k calibrated samples is 1 + 1/k times their variance (Fortin et al. 2014,
        equation 15).
        """
        return ((1 + 1 / self.samples) * self.variance / self.errors["forecast"]["mse"]).sqrt()

    def as_dict(self) -> dict[str, Any]:
        """Each score over all frames by a key such as "forecast_l1"; under "horizon" the same keys with lists [t]."""
        scores = {f"{name}_{error}": score for name, errors in self.errors.items() for error, score in errors.items()}
        if self.variance is not None:
            scores |= {"variance": self.variance, "spread": self.spread()}
        scores |= {f"skill_{error}": self.skill(error) for error in ERRORS}
        overall = {key: score[-1].item() for key, score in scores.items()}
        horizon = {key: score[:-1].tolist() for key, score in scores.items()}
        return {"norm": self.norm, "clips": self.clips, "loss": self.loss, **overall, "horizon": horizon}
