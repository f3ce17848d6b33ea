"""Whole evaluations of heads whose forecasts are known."""

import math

import pytest
import torch

from flperf.config import Config
from flperf.data.samplers import ClipBatch
from flperf.errors import UserError
from flperf.evaluation.evaluate import evaluate
from flperf.evaluation.probe import PooledLatents
from flperf.evaluation.scores import Scores
from flperf.models.baselines import BASELINES, Baselines
from flperf.models.latents import LatentGeometry
from flperf.objectives.build import build_objective

GEOMETRY = LatentGeometry(context_frames=2, target_frames=3, height=1, width=2, dim=4)
ZEROS = torch.zeros(3, 1, 2, 4)
BASELINES_OF_ZERO = Baselines(ZEROS, ZEROS, torch.zeros(3, 13, 4))


def latents(clips: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(clips, frames, 1, 2, 4, generator=torch.Generator().manual_seed(seed))


def batches_of(context: torch.Tensor, target: torch.Tensor, size: int):
    """`ClipBatch`es of `size` clips. The last one is filled with invalid clips of infinities, which must not count."""
    for first in range(0, len(context), size):
        rows = torch.arange(first, first + size)
        valid = rows < len(context)
        rows = rows.clamp(max=len(context) - 1)
        clips = torch.cat([context, target], dim=1)[rows]
        clips[~valid] = math.inf
        yield ClipBatch(label=rows % 2, clip=rows, sample=rows, valid=valid, latents=clips)


def evaluated(head, context, target, size, *, baselines=BASELINES_OF_ZERO, observers=(), objective=None) -> Scores:
    objective = objective or build_objective(Config(), GEOMETRY)
    split = lambda batch: (batch.latents[:, :2], batch.latents[:, 2:])  # noqa: E731
    return evaluate(head, objective, batches_of(context, target, size), split, baselines, "none", observers)


def repeat_first(context: torch.Tensor) -> torch.Tensor:
    return context[:, :1].expand(-1, 3, -1, -1, -1)


def test_scores_of_a_regression_are_the_means_of_the_valid_clips():
    context, target = latents(5, 2, 1), latents(5, 3, 2)
    baselines = Baselines(ZEROS + 0.5, ZEROS, torch.zeros(3, 13, 4))
    scores = evaluated(repeat_first, context, target, 2, baselines=baselines)
    expected = (context[:, :1] - target).abs().mean((0, 2, 3, 4))
    assert scores.clips == 5 and scores.samples == 1 and scores.errors.keys() == {"forecast", *BASELINES}
    torch.testing.assert_close(scores.errors["forecast"]["l1"], torch.tensor([*expected, expected.mean()]).double())
    overall = lambda name, error: scores.errors[name][error][-1].item()  # noqa: E731
    assert overall("copy_last", "mse") == pytest.approx((context[:, -1:] - target).square().mean().item(), rel=1e-6)
    assert overall("mean", "l1") == pytest.approx((0.5 - target).abs().mean().item(), rel=1e-6)
    for name in ("median", "ridge"):
        assert overall(name, "l1") == pytest.approx(target.abs().mean().item(), rel=1e-6)
    assert scores.loss == pytest.approx(overall("forecast", "mse"), rel=1e-6)
    again = evaluated(repeat_first, context, target, 5, baselines=baselines)
    torch.testing.assert_close(again.errors["forecast"]["l1"], scores.errors["forecast"]["l1"], rtol=1e-12, atol=0)


def test_an_evaluation_without_a_readable_clip_is_refused():
    context, target = latents(2, 2, 1), latents(2, 3, 2)
    invalid = ClipBatch(torch.zeros(2), torch.zeros(2), torch.arange(2), torch.zeros(2, dtype=torch.bool))
    objective = build_objective(Config(), GEOMETRY)
    with pytest.raises(UserError, match="none of its clips could be used"):
        evaluate(repeat_first, objective, [invalid], lambda _: (context, target), BASELINES_OF_ZERO, "none")


def test_a_perfect_forecast_has_skill_one_and_no_frechet_distance():
    context, factors = latents(6, 2, 1), torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    scores = evaluated(lambda context: context[:, -1:] * factors, context, context[:, -1:] * factors, 3)
    assert scores.skill("l1").tolist() == scores.skill("mse").tolist() == [1, 1, 1, 1]
    assert scores.errors["forecast"]["frechet"].tolist() == pytest.approx([0] * 4, abs=1e-5)


class CalibratedSamples:
    """An objective that draws k = 8 forecasts of N(0, 1) whatever the context, and keeps them."""

    samples = 8

    def __init__(self):
        self.generator, self.drawn = torch.Generator().manual_seed(3), []

    def loss(self, head, context, target, sample, reduction):
        return torch.zeros(len(sample))

    def draw(self, head, context, keys, part=0):
        self.drawn.append(torch.randn(*keys.shape, 3, 1, 2, 4, generator=self.generator))
        return self.drawn[-1]


def test_scores_of_calibrated_samples():
    """Target and samples are N(0, 1), for 1000 clips of 3 frames of 8 values. Bounds are four standard deviations of
    the estimates.

    variance: of 8 values, 1 +- (2 / 7)^0.5, 24,000 times. Squared error of the mean: (1 + 1/8)(1 +- 2^0.5); the square
    of the spread is their ratio. Energy: E|x - y| / 8^0.5 / 2, where x - y has variance 2 in each of 8 dimensions, is
    Gamma(4.5) / Gamma(4) / 8^0.5; its standard deviation for one frame is below 1.5 (2 - E^2)^0.5, with E twice that.
    """
    clips, objective = 1000, CalibratedSamples()
    context, target, pooled = latents(clips, 2, 1), latents(clips, 3, 2), PooledLatents()
    result = evaluated(None, context, target, 250, observers=[pooled], objective=objective).as_dict()
    variance_std, mse_std = (2 / 7 / 24_000) ** 0.5, (2 / 24_000) ** 0.5
    assert result["variance"] == pytest.approx(1, abs=4 * variance_std)
    assert result["forecast_mse"] == pytest.approx(1.125, rel=4 * mse_std)
    assert result["spread"] == pytest.approx(1, abs=4 * math.hypot(variance_std, mse_std) / 2)
    ratio = 1.125 * sum(result["horizon"]["variance"]) / sum(result["horizon"]["forecast_mse"])
    assert result["spread"] == pytest.approx(ratio**0.5, rel=1e-6)
    energy = math.gamma(4.5) / math.gamma(4) / 8**0.5
    assert result["forecast_energy"] == pytest.approx(energy, abs=4 * 1.5 * ((2 - 4 * energy**2) / 3000) ** 0.5)
    errors = (torch.cat(objective.drawn) - target[:, None]).abs().flatten(3).mean(3)  # clip, sample, frame
    assert result["best_l1"] == pytest.approx(errors.mean(2).amin(1).mean().item(), rel=1e-5)
    assert result["horizon"]["best_l1"] == pytest.approx(errors.amin(1).mean(0).tolist(), rel=1e-5)
    assert result["sample_l1"] == pytest.approx(errors.mean().item(), rel=1e-5)
    _, observed = pooled.gathered()
    first_samples = torch.cat([drawn[:, 0] for drawn in objective.drawn])
    torch.testing.assert_close(observed["sample"], first_samples.mean((1, 2, 3)))
    torch.testing.assert_close(observed["copy_last"], context[:, -1].mean((1, 2)))


def test_the_frechet_distance_is_that_of_each_frame():
    """Forecasts with an offset of 0, 1 and 2 in each of 4 channels: distances 0, 4 and 16."""
    context, offset = latents(50, 2, 1), torch.arange(3.0).view(1, 3, 1, 1, 1)
    target = context[:, -1:].expand(-1, 3, -1, -1, -1)
    errors = evaluated(lambda context: context[:, -1:] + offset, context, target, 25).errors
    *horizon, overall = errors["forecast"]["frechet"].tolist()
    assert horizon == pytest.approx([0, 4, 16], abs=1e-4)
    assert errors["copy_last"]["frechet"].tolist() == pytest.approx([0] * 4, abs=1e-4)
    # over all frames the offset is 1, and the forecasts have a larger variance than the target
    assert 4 < overall < 20 / 3
