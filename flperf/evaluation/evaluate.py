"""How good a forecast is, in normalised latents, beside the trivial forecasts that it must beat.

Every number is taken for each latent frame ahead (the horizon). Every validation clip counts once, whatever the number of processes:
sums are taken over valid clips and divided at the end. Flow matching draws k samples a clip; the forecast is their mean, and their
own scores say whether they are good and honestly spread.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from flperf.data.samplers import ClipBatch
from flperf.errors import UserError
from flperf.models.baselines import BASELINES, Baselines
from flperf.objectives.build import FlowMatching, Regression, forecast
from flperf.run import Run

# (forecast, target), both `b t h w d` or broadcastable, to the error of each frame, [b t].
ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda forecast, target: (forecast - target).abs().mean((2, 3, 4)),
    "mse": lambda forecast, target: (forecast - target).square().mean((2, 3, 4)),
    "cosine": lambda forecast, target: (1 - F.cosine_similarity(forecast, target, dim=-1)).mean((2, 3)),  # distance: 0 is best
    "energy": lambda forecast, target: (forecast - target).square().mean((2, 3, 4)).sqrt(),  # the energy score of a single forecast
}

SMALLEST = 1e-12  # what a trivial forecast's error is taken to be where it is perfect


class Sums:
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
        return {key: (part / self.clips).view(total.shape) for (key, total), part in zip(self.totals.items(), parts, strict=True)}


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
        self.total = torch.zeros(frames, dim + 1, dim, dtype=torch.float64, device=device)  # outer products, then the sum
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)  # of a frame

    def add(self, latents: Tensor) -> None:
        """latents: `b t h w d`."""
        tokens = rearrange(latents, "b t h w d -> t (b h w) d").double()  # roots of small eigenvalues show what fp32 products lose
        self.total += torch.cat([tokens.mT @ tokens, tokens.sum(1, keepdim=True)], dim=1)
        self.tokens += tokens.shape[1]

    def result(self) -> list[Gaussian]:
        """Of each frame, and at last of all frames together; over all processes, on the CPU."""
        if dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.tokens)
        frames = (self.total / self.tokens).cpu()
        return [Gaussian(total[-1], total[:-1] - torch.outer(total[-1], total[-1])) for total in [*frames, frames.mean(0)]]


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians of means [d] (Heusel et al., arXiv:1706.08500, equation 6)."""
    overlap = torch.linalg.eigvalsh(first.root @ second.covariance @ first.root).clamp(min=0).sqrt().sum()
    return ((first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace() - 2 * overlap).item()


def sample_scores(samples: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Scores of k > 1 samples `b k t h w d` against `b t h w d`, [b t] each.

    sample_*: the error of one sample, on average; best_*: of the one that is best at that frame (best_clip_*, [b]: in that clip);
    variance: over the samples, unbiased; forecast_energy: the energy score (Gneiting and Raftery 2007, equation 21, unbiased), a frame's
    distances divided by the root of its size.
    """
    count = samples.shape[1]
    scores = {}
    for name in ("l1", "mse"):
        errors = torch.stack([ERRORS[name](sample, target) for sample in samples.unbind(1)], dim=1)  # b k t
        scores |= {f"sample_{name}": errors.mean(1), f"best_{name}": errors.amin(1), f"best_clip_{name}": errors.mean(2).amin(1)}
    scores["variance"] = samples.var(1).mean((2, 3, 4))
    flat = rearrange(samples, "b k t h w d -> b t k (h w d)")
    scale = flat.shape[-1] ** 0.5
    to_target = (flat - rearrange(target, "b t h w d -> b t 1 (h w d)")).norm(dim=-1).mean(-1)
    among = sum((flat[:, :, i] - flat[:, :, j]).norm(dim=-1) for i in range(count) for j in range(i))
    scores["forecast_energy"] = (to_target - among / (count * (count - 1))) / scale
    return scores


class Observer(Protocol):
    """Judges forecasts by something else than errors of latents."""

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """Normalised latents, fp32 `b t h w d`, of "forecast", "copy_last" (t = 1) and "target"; where the forecast is the mean of several
        samples, which may be a blur, of one "sample", too."""


@dataclass
class Pooled:
    """Latents of every valid clip averaged over places and frames, by whose forecast they are ("target": the truth), for probes."""

    labels: list[Tensor] = field(default_factory=list)
    features: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """latents by whose forecast they are, `b t h w d` each."""
        valid = batch.valid.cpu()
        self.labels.append(batch.label[valid])
        for name, values in latents.items():
            self.features.setdefault(name, []).append(values.mean((1, 2, 3)).float().cpu()[valid])

    def gathered(self) -> tuple[Tensor, dict[str, Tensor]]:
        """labels [n] and features [n d] by name, of all processes."""
        mine = torch.cat(self.labels), {name: torch.cat(parts) for name, parts in self.features.items()}
        everyone = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        labels = torch.cat([labels for labels, _ in everyone])
        return labels, {name: torch.cat([features[name] for _, features in everyone]) for name in mine[1]}


@torch.no_grad()
def evaluate(
    head: torch.nn.Module,
    objective: Regression | FlowMatching,
    batches: Iterable[ClipBatch],
    latents_of: Callable,
    baselines: Baselines,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """Validation loss, errors of the forecast (the mean of its samples) and of the trivial forecasts, and skill.

    batches yield `ClipBatch`es; latents_of turns one into normalised (context, target). skill = 1 - forecast's error / the best trivial
    forecast's, for each error; above 0 the head knows something. The result holds means over all frames by name, and under "horizon" the
    same names with a list, one number a latent frame ahead. `frechet` compares the tokens of one sample with the true ones; over all frames
    it is that of all tokens together.
    Observers see the latents of every batch.
    """
    device = baselines.position_mean.device
    sums, moments = Sums(device), {}
    for batch in batches:
        context, target = latents_of(batch)
        valid, truth = batch.valid, target.float()
        sums.count(valid)
        sums.add("loss", objective.loss(head, context, target, batch.sample, reduction="sample"), valid)
        samples = forecast(objective, head, context, batch.sample)
        forecasts = {"forecast": samples.mean(1), **baselines.forecasts(context)}
        scores = {f"{name}_{error}": ERRORS[error](latents, truth) for name, latents in forecasts.items() for error in ERRORS}
        if samples.shape[1] > 1:
            scores |= sample_scores(samples, truth)
        for name, score in scores.items():
            sums.add(name, score, valid)
        for name, latents in {**forecasts, "forecast": samples[:, 0], "target": truth}.items():
            moments.setdefault(name, Moments(truth.shape[1], truth.shape[-1], device)).add(latents.expand_as(truth)[valid])
        seen = {"target": truth, "forecast": forecasts["forecast"], "copy_last": forecasts["copy_last"]}
        if samples.shape[1] > 1:
            seen["sample"] = samples[:, 0]
        for observer in observers:
            observer.add(seen, batch)
    return _result(sums, moments, objective.samples)


def _result(sums: Sums, moments: dict[str, Moments], samples: int) -> dict[str, Any]:
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
        result[f"skill_{error}"] = 1 - result[f"forecast_{error}"] / max(min(result[f"{name}_{error}"] for name in BASELINES), SMALLEST)
    result["horizon"] = {key: value.tolist() for key, value in means.items() if value.ndim == 1}
    truth = moments.pop("target").result()
    for name, moment in moments.items():
        distances = [frechet_distance(true, forecast) for true, forecast in zip(truth, moment.result(), strict=True)]
        *result["horizon"][f"{name}_frechet"], result[f"{name}_frechet"] = distances
    for error in ("l1", "mse"):  # a clip's best sample, not the best of each frame
        if f"best_{error}" in result:
            result[f"best_{error}"] = result.pop(f"best_clip_{error}")
    return result


def _spread(variance: Tensor, error: Tensor, samples: int) -> Tensor:
    """Spread of k samples against the squared error of their mean, which is 1 + 1/k of their variance where they are honest (Fortin et al.
    2014, equation 15): 1 is calibrated, less too sure."""
    return ((1 + 1 / samples) * variance / error).sqrt()


def evaluate_run(run: Run, observers: Sequence[Observer] = ()) -> dict[str, Any]:
    """`evaluate` on the first `evaluation.max_clips` validation clips, shared out over the processes, with a progress bar.

    The result names the latents' `norm`, too: errors compare only between runs that have it in common.
    """
    config, device = run.config.evaluation, run.process.device
    batch_size = config.batch_size or run.place.micro_batch_size
    batches = run.dataset.validation_batches(run.place, batch_size, config.max_clips, device)
    clips = min(run.dataset.validation_size, config.max_clips or run.dataset.validation_size)
    rounds = -(-clips // (batch_size * run.process.world_size))
    shown = tqdm(_on_device(batches, device), "evaluating", rounds, leave=False, disable=None if run.process.is_main else True)
    result = evaluate(run.forecaster, run.objective, shown, run.latents, run.baselines, observers)
    return {"norm": run.config.latents.embedding_norm, **result}


def _on_device(batches: Iterable[ClipBatch], device: torch.device) -> Iterator[ClipBatch]:
    for batch in batches:
        batch.sample, batch.valid = batch.sample.to(device), batch.valid.to(device)
        yield batch


NAMES = {"forecast": "forecast", "copy_last": "copy last", "mean": "mean latent", "median": "median latent", "ridge": "ridge"}


COLUMNS = {"l1": "L1", "mse": "MSE", "cosine": "1 - cos", "energy": "energy", "frechet": "Fréchet"}


def table(result: dict) -> tuple[list[str], list[list[str | float]]]:
    """The comparison as column names and rows: one row a forecast, errors over all frames."""
    rows: list[list[str | float]] = [[label, *(result[f"{name}_{error}"] for error in COLUMNS)] for name, label in NAMES.items()]
    return ["forecast", *COLUMNS.values()], rows


def summary(result: dict) -> str:
    """The comparison as a few lines of text: errors over all frames, then the skill of each frame ahead."""
    (_, *columns), errors = table(result)
    rows = ["".join([f"{'':>14}", *(f"{column:>9}" for column in columns)])]
    rows += ["".join([f"{label:>14}", *(f"{value:9.4f}" for value in values)]) for label, *values in errors]
    rows.append("".join([f"{'skill':>14}", *(f"{result[f'skill_{error}']:9.1%}" for error in ERRORS)]))
    ahead = result["horizon"]["skill_l1"]
    shown = sorted({round(i * (len(ahead) - 1) / 7) for i in range(8)}) if len(ahead) > 1 else [0]
    rows.append(f"{'frames ahead':>14}" + "".join(f"{f'+{frame + 1}':>9}" for frame in shown))
    rows.append(f"{'skill (L1)':>14}" + "".join(f"{ahead[frame]:9.1%}" for frame in shown))
    if "spread" in result:
        rows.append(
            f"{'samples':>14}  L1 of one {result['sample_l1']:.4f}, of the best {result['best_l1']:.4f}; "
            f"spread / error {result['spread']:.2f} (1 is calibrated)"
        )
    return "\n".join(rows)
