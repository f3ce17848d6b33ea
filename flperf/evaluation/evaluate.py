"""How good a forecast is, in normalised latents, beside the baselines that it must beat.

Every number is taken for each latent frame ahead (the horizon). Every validation clip counts once, whatever the
number of processes: sums are taken over valid clips and divided at the end. Flow matching draws k samples a clip; the
forecast is their mean, and their own scores say whether they are good and honestly spread.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from flperf.data.samplers import ClipBatch
from flperf.errors import UserError
from flperf.evaluation.metrics import (
    ERRORS,
    SMALLEST,
    MeanAccumulator,
    Moments,
    _spread,
    frechet_distance,
    sample_scores,
)
from flperf.models.baselines import BASELINES, Baselines
from flperf.objectives.build import forecast
from flperf.objectives.flow_matching import FlowMatching
from flperf.objectives.regression import Regression
from flperf.run import Run


class Observer(Protocol):
    """Judges forecasts by something else than errors of latents."""

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """Normalised latents, fp32 `b t h w d`, of "forecast", "copy_last" (t = 1) and "target"; where the forecast
        is the mean of several samples, which may be a blur, of one "sample", too."""


@torch.no_grad()
def evaluate(
    head: torch.nn.Module,
    objective: Regression | FlowMatching,
    batches: Iterable[ClipBatch],
    latents_of: Callable,
    baselines: Baselines,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """Validation loss, errors of the forecast (the mean of its samples) and of the baselines, and skill.

    batches yield `ClipBatch`es; latents_of turns one into normalised (context, target). skill = 1 - forecast's error
    / the best trivial forecast's, for each error; above 0 the head knows something. The result holds means over all
    frames by name, and under "horizon" the same names with a list, one number a latent frame ahead. `frechet`
    compares the tokens of one sample with the true ones; over all frames it is that of all tokens together. Observers
    see the latents of every batch.
    """
    device = baselines.position_mean.device
    sums, moments = MeanAccumulator(device), {}
    for batch in batches:
        context, target = latents_of(batch)
        valid, truth = batch.valid, target.float()
        sums.count(valid)
        sums.add("loss", objective.loss(head, context, target, batch.sample, reduction="sample"), valid)
        samples = forecast(objective, head, context, batch.sample)
        forecasts = {"forecast": samples.mean(1), **baselines.forecasts(context)}
        scores = {
            f"{name}_{error}": ERRORS[error](latents, truth) for name, latents in forecasts.items() for error in ERRORS
        }
        if samples.shape[1] > 1:
            scores |= sample_scores(samples, truth)
        for name, score in scores.items():
            sums.add(name, score, valid)
        for name, latents in {**forecasts, "forecast": samples[:, 0], "target": truth}.items():
            moments.setdefault(name, Moments(truth.shape[1], truth.shape[-1], device)).add(
                latents.expand_as(truth)[valid]
            )
        seen = {"target": truth, "forecast": forecasts["forecast"], "copy_last": forecasts["copy_last"]}
        if samples.shape[1] > 1:
            seen["sample"] = samples[:, 0]
        for observer in observers:
            observer.add(seen, batch)
    return _result(sums, moments, objective.samples)


def _result(sums: MeanAccumulator, moments: dict[str, Moments], samples: int) -> dict[str, Any]:
    means = sums.means()
    if not sums.clips:
        raise UserError("dataset.validation: not one of its clips can be read")
    for error in ERRORS:
        best = torch.stack([means[f"{name}_{error}"].expand_as(means[f"forecast_{error}"]) for name in BASELINES])
        means[f"skill_{error}"] = 1 - means[f"forecast_{error}"] / best.amin(0).clamp(min=SMALLEST)
    if samples > 1:
        means["spread"] = _spread(means["variance"], means["forecast_mse"], samples)
    result: dict[str, Any] = {"clips": int(sums.clips)}
    result |= {key: value.mean().item() for key, value in means.items()}
    if samples > 1:  # ratios of the means: not means of ratios
        result["spread"] = _spread(means["variance"].mean(), means["forecast_mse"].mean(), samples).item()
    for error in ERRORS:
        result[f"skill_{error}"] = 1 - result[f"forecast_{error}"] / max(
            min(result[f"{name}_{error}"] for name in BASELINES), SMALLEST
        )
    result["horizon"] = {key: value.tolist() for key, value in means.items() if value.ndim == 1}
    truth = moments.pop("target").result()
    for name, moment in moments.items():
        distances = [frechet_distance(true, forecast) for true, forecast in zip(truth, moment.result(), strict=True)]
        *result["horizon"][f"{name}_frechet"], result[f"{name}_frechet"] = distances
    for error in ("l1", "mse"):  # a clip's best sample, not the best of each frame
        if f"best_{error}" in result:
            result[f"best_{error}"] = result.pop(f"best_clip_{error}")
    return result


def evaluate_run(run: Run, observers: Sequence[Observer] = ()) -> dict[str, Any]:
    """`evaluate` on the first `evaluation.max_clips` validation clips, shared out over the processes, with a progress
    bar.

    The result names the latents' `norm`, too: errors compare only between runs that have it in common.
    """
    config, device = run.config.evaluation, run.process.device
    batch_size = config.batch_size or run.share.micro_batch_size
    batches = run.dataset.validation_batches(run.share, batch_size, config.max_clips, device)
    clips = min(run.dataset.validation_size, config.max_clips or run.dataset.validation_size)
    rounds = -(-clips // (batch_size * run.process.world_size))
    shown = tqdm(
        _on_device(batches, device), "evaluating", rounds, leave=False, disable=None if run.process.is_main else True
    )
    result = evaluate(run.forecaster, run.objective, shown, run.latents, run.baselines, observers)
    return {"norm": run.config.latents.embedding_norm, **result}


def _on_device(batches: Iterable[ClipBatch], device: torch.device) -> Iterator[ClipBatch]:
    for batch in batches:
        batch.sample, batch.valid = batch.sample.to(device), batch.valid.to(device)
        yield batch
