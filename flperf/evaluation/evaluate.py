"""Evaluation: a head's forecasts and the baselines against the true latents of the validation clips.

Each valid clip counts once, whatever the number of processes: scores are summed over clips and processes, and divided
at the end. In flow matching the forecast is the mean of k samples; the samples also have scores of their own, which
tell whether their spread is calibrated.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from flperf.data.samplers import ClipBatch
from flperf.data.unreadable import NONE_USABLE
from flperf.errors import UserError
from flperf.evaluation.metrics import (
    ERRORS,
    SAMPLE_ERRORS,
    Key,
    MeanAccumulator,
    Moments,
    frechet_distance,
    sample_scores,
)
from flperf.evaluation.scores import Scores
from flperf.models.baselines import BASELINES, Baselines
from flperf.objectives.build import forecast
from flperf.objectives.flow_matching import FlowMatching
from flperf.objectives.regression import Regression
from flperf.run import Run


class Observer(Protocol):
    """Computes further metrics from the latents of an evaluation, such as the pixel errors of a locator."""

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """Called for every batch with normalised latents, fp32 `b t h w d`: "forecast", "copy_last" (t = 1), "target"
        and, where the forecast is the mean of several samples, the first "sample"."""


@torch.no_grad()
def evaluate(
    head: torch.nn.Module,
    objective: Regression | FlowMatching,
    batches: Iterable[ClipBatch],
    latents_of: Callable[[ClipBatch], tuple[Tensor, Tensor]],
    baselines: Baselines,
    norm: str,
    observers: Sequence[Observer] = (),
) -> Scores:
    """Validation loss, and scores of the forecast and the baselines.

    `latents_of` gives the normalised context and target of a batch, `b t h w d` each; `norm` names the normalisation.
    Fréchet distances compare the tokens of one sample with those of the target. Raises `UserError` if no clip is valid.
    """
    device = baselines.position_mean.device
    means, moments = MeanAccumulator(device), {}
    for batch in batches:
        context, target = latents_of(batch)
        truth = target.float()
        scores: dict[Key, Tensor] = {
            "loss": objective.loss(head, context, target, batch.sample, reduction="sample"),
        }
        samples = forecast(objective, head, context, batch.sample)
        forecasts = {"forecast": samples.mean(1), **baselines.forecasts(context)}
        for name, latents in forecasts.items():
            scores |= {(name, error): ERRORS[error](latents, truth) for error in ERRORS}
        seen = {"target": truth, "forecast": forecasts["forecast"], "copy_last": forecasts["copy_last"]}
        if objective.samples > 1:
            scores |= sample_scores(samples, truth)
            seen["sample"] = samples[:, 0]
        means.add(scores, batch.valid)
        for name, latents in {**forecasts, "forecast": samples[:, 0], "target": truth}.items():
            moments.setdefault(name, Moments(truth.shape[1], truth.shape[-1], device))
            moments[name].add(latents.expand_as(truth)[batch.valid])
        for observer in observers:
            observer.add(seen, batch)
    return _scores(norm, means, moments, objective.samples)


def _scores(norm: str, accumulated: MeanAccumulator, moments: dict[str, Moments], samples: int) -> Scores:
    means = accumulated.means()
    if not accumulated.clips:
        raise UserError(f"dataset.validation: {NONE_USABLE}")

    def with_overall(key: Key) -> Tensor:
        return torch.cat([means[key], means[key].mean().view(1)])

    errors = {name: {error: with_overall((name, error)) for error in ERRORS} for name in ("forecast", *BASELINES)}
    if samples > 1:
        errors["sample"] = {error: with_overall(("sample", error)) for error in SAMPLE_ERRORS}
        errors["best"] = {
            error: torch.cat([means["best", error], means["best_of_clip", error].view(1)]) for error in SAMPLE_ERRORS
        }
    truth = moments.pop("target").result()
    for name, moment in moments.items():
        distances = [frechet_distance(true, forecast) for true, forecast in zip(truth, moment.result(), strict=True)]
        errors[name]["frechet"] = torch.tensor(distances, dtype=torch.float64)
    variance = with_overall("variance") if samples > 1 else None
    return Scores(norm, int(accumulated.clips), means["loss"].item(), samples, errors, variance)


def evaluate_run(run: Run, observers: Sequence[Observer] = ()) -> Scores:
    """`evaluate` on the first `evaluation.max_clips` validation clips, shared between the processes."""
    config, device = run.config.evaluation, run.process.device
    batch_size = config.batch_size or run.share.micro_batch_size
    batches = run.dataset.validation_batches(run.share, batch_size, config.max_clips, device)
    clips = min(run.dataset.validation_size, config.max_clips or run.dataset.validation_size)
    rounds = -(-clips // (batch_size * run.process.world_size))
    disable = None if run.process.is_main else True
    bar = tqdm(_on_device(batches, device), "evaluating", rounds, leave=False, disable=disable)
    norm = run.config.latents.embedding_norm
    return evaluate(run.forecaster, run.objective, bar, run.latents, run.baselines, norm, observers)


def _on_device(batches: Iterable[ClipBatch], device: torch.device) -> Iterator[ClipBatch]:
    for batch in batches:
        batch.sample, batch.valid = batch.sample.to(device), batch.valid.to(device)
        yield batch
        batch.release()  # nothing is kept of its pixels or raw latents
