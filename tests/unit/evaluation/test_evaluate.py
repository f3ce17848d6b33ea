"""Each metric on a case whose answer is known on paper."""

import math

import pytest
import torch

from flperf.config import Config
from flperf.data.samplers import ClipBatch
from flperf.errors import UserError
from flperf.evaluation.evaluate import evaluate
from flperf.evaluation.metrics import ERRORS, Gaussian, MeanAccumulator, Moments, frechet_distance, sample_scores
from flperf.evaluation.probe import PooledLatents, probe_accuracies
from flperf.evaluation.report import summary
from flperf.models.baselines import Baselines
from flperf.models.latents import LatentGeometry
from flperf.objectives.build import build_objective, forecast

GEOMETRY = LatentGeometry(context_frames=2, target_frames=3, height=1, width=2, dim=4)
CPU = torch.device("cpu")


def latents(clips: int, frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(clips, frames, 1, 2, 4, generator=torch.Generator().manual_seed(seed))


def test_errors_of_each_frame():
    target = torch.zeros(1, 2, 1, 1, 2)
    target[..., 0] = 1.0
    forecast = target.clone()
    forecast[0, 1, 0, 0] = torch.tensor([0.0, 2.0])  # at a right angle in the second frame
    values = {name: error(forecast, target)[0].tolist() for name, error in ERRORS.items()}
    assert values == {
        "l1": [0.0, 1.5],
        "mse": [0.0, 2.5],
        "cosine": [0.0, 1.0],
        "energy": [0.0, pytest.approx(2.5**0.5)],
    }


def test_sums_leave_invalid_clips_out_even_where_they_are_not_finite():
    sums = MeanAccumulator(CPU)
    valid = torch.tensor([True, True, False])
    sums.count(valid)
    sums.add("x", torch.tensor([[1.0, 2.0], [3.0, 6.0], [math.nan, 5.0]]), valid)
    assert sums.means()["x"].tolist() == [2.0, 4.0]


def test_scores_of_two_samples_on_either_side_of_the_truth():
    """Samples at +a and -a of 0: each errs by a, their mean by nothing; their variance is 2 a^2; the energy score a -
    |2a| / 2 = 0."""
    samples = torch.stack([torch.full((1, 1, 1, 1, 4), 0.5), torch.full((1, 1, 1, 1, 4), -0.5)], dim=1)
    scores = {name: score.item() for name, score in sample_scores(samples, torch.zeros(1, 1, 1, 1, 4)).items()}
    assert scores["sample_l1"] == scores["best_l1"] == 0.5 and scores["sample_mse"] == 0.25
    assert scores["variance"] == pytest.approx(0.5) and scores["forecast_energy"] == pytest.approx(0)


def test_the_best_sample_of_a_clip_is_one_sample():
    """Each of two samples is right in one of two frames: the best of each frame errs by 0, the best of the clip by
    half."""
    samples = torch.zeros(1, 2, 2, 1, 1, 1)
    samples[0, 0, 1] = samples[0, 1, 0] = 1.0
    scores = sample_scores(samples, torch.zeros(1, 2, 1, 1, 1))
    assert scores["best_l1"].tolist() == [[0.0, 0.0]] and scores["best_clip_l1"].tolist() == [0.5]


@pytest.mark.parametrize(("deviation", "calibrated"), [(0.3, False), (1.0, True), (3.0, False)])
def test_energy_score_and_spread_tell_an_honest_spread(deviation, calibrated):
    """Truth of unit variance, 8 samples: the honest ones have the least energy score, and a spread of 1 (3,000 clips:
    to 2%)."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3000, 1, 1, 1, 4, generator=generator)
    samples = torch.randn(3000, 8, 1, 1, 1, 4, generator=generator)
    energy = lambda scale: sample_scores(scale * samples, truth)["forecast_energy"].mean().item()  # noqa: E731
    mse = (deviation * samples.mean(1) - truth).square().mean()
    variance = sample_scores(deviation * samples, truth)["variance"].mean()
    spread = ((1 + 1 / 8) * variance / mse).sqrt().item()
    assert (abs(spread - 1) < 0.03) == calibrated
    assert (spread > 1) == (deviation > 1) or calibrated
    assert calibrated == (energy(deviation) <= energy(1.0))


def test_frechet_distance_of_gaussians():
    """Diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2; and nothing between a distribution and itself, however
    it is turned."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    variances = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 0.0]).double()
    means = torch.zeros(3).double(), torch.tensor([1.0, 2.0, 0.0]).double()
    first, second = (
        Gaussian(turn @ mean, turn @ variance.diag() @ turn.T) for mean, variance in zip(means, variances, strict=True)
    )
    assert frechet_distance(first, second) == pytest.approx(5 + 1 + 4)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-12)


def test_moments_are_those_of_each_frame_and_of_all_tokens():
    tokens = latents(5, 3)
    moments = Moments(3, 4, CPU)
    moments.add(tokens[:2])
    moments.add(tokens[2:])
    for gaussian, part in zip(moments.result(), [tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens], strict=True):
        flat = part.flatten(0, -2).double()
        torch.testing.assert_close(gaussian.mean, flat.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(gaussian.covariance, flat.T.cov(correction=0), atol=1e-5, rtol=0)


def batches_of(context: torch.Tensor, target: torch.Tensor, size: int):
    """`ClipBatch`es of `size` clips, the last filled up with an invalid one that must not count."""
    for first in range(0, len(context), size):
        rows = torch.arange(first, first + size)
        valid = rows < len(context)
        rows = rows.clamp(max=len(context) - 1)
        clips = torch.cat([context, target], dim=1)[rows]
        clips[~valid] = math.inf
        yield ClipBatch(label=rows % 2, clip=rows, sample=rows, valid=valid, latents=clips)


def evaluated(head, context, target, baselines, size, observers=(), objective=None):
    objective = objective or build_objective(Config(), GEOMETRY)
    split = lambda batch: (batch.latents[:, :2], batch.latents[:, 2:])  # noqa: E731
    return evaluate(head, objective, batches_of(context, target, size), split, baselines, observers)


def test_a_whole_evaluation_against_sums_by_hand():
    context, target = latents(5, 2, 1), latents(5, 3, 2)
    place = torch.zeros(3, 1, 2, 4)
    baselines = Baselines(place + 0.5, place, torch.zeros(3, 13, 4))
    head = lambda context: context[:, :1].expand(-1, 3, -1, -1, -1)  # noqa: E731
    result = evaluated(head, context, target, baselines, size=2)
    by_hand = (context[:, :1] - target).abs().mean((0, 2, 3, 4))
    assert result["clips"] == 5
    assert result["horizon"]["forecast_l1"] == pytest.approx(by_hand.tolist(), rel=1e-6)
    assert result["copy_last_mse"] == pytest.approx((context[:, -1:] - target).square().mean().item(), rel=1e-6)
    for name in ("median", "ridge"):
        assert result[f"{name}_l1"] == pytest.approx(target.abs().mean().item(), rel=1e-6)
    best = min(result[f"{name}_l1"] for name in ("copy_last", "mean", "median", "ridge"))
    assert result["skill_l1"] == pytest.approx(1 - result["forecast_l1"] / best)
    assert result["loss"] == pytest.approx(result["forecast_mse"], rel=1e-6)
    assert "skill" in summary(result) and "+3" in summary(result)
    again = evaluated(head, context, target, baselines, size=5)
    assert again["forecast_l1"] == pytest.approx(result["forecast_l1"], rel=1e-12)


def test_an_evaluation_of_nothing_is_refused():
    """Where no clip could be read there are no means."""
    context, target, place = latents(2, 2, 1), latents(2, 3, 2), torch.zeros(3, 1, 2, 4)
    batches = [
        ClipBatch(torch.zeros(2), torch.zeros(2), torch.arange(2), torch.zeros(2, dtype=torch.bool), latents=context)
    ]
    head = lambda context: context[:, :1].expand(-1, 3, -1, -1, -1)  # noqa: E731
    with pytest.raises(UserError, match="not one of its clips can be read"):
        evaluate(
            head,
            build_objective(Config(), GEOMETRY),
            batches,
            lambda _: (context, target),
            Baselines(place, place, torch.zeros(3, 13, 4)),
        )


def test_a_perfect_forecast_has_skill_one_and_no_distance():
    context = latents(6, 2, 1)
    target = context[:, -1:].expand(-1, 3, -1, -1, -1) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    place = torch.zeros(3, 1, 2, 4)
    result = evaluated(
        lambda context: context[:, -1:] * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1),
        context,
        target,
        Baselines(place, place, torch.zeros(3, 13, 4)),
        size=3,
    )
    assert result["skill_l1"] == result["skill_mse"] == 1 and result["forecast_frechet"] == pytest.approx(0, abs=1e-5)
    # finite where a trivial one is perfect too
    assert result["horizon"]["copy_last_l1"][0] == 0 and result["horizon"]["skill_l1"][0] == 1


class HonestSamples:
    """k = 8 forecasts of N(0, 1), whatever the context; they are kept."""

    samples = 8

    def __init__(self):
        self.generator, self.drawn = torch.Generator().manual_seed(3), []

    def loss(self, head, context, target, sample, reduction):
        return torch.zeros(len(sample))

    def draw(self, head, context, keys, part=0):
        self.drawn.append(torch.randn(*keys.shape, 3, 1, 2, 4, generator=self.generator))
        return self.drawn[-1]


def test_reported_scores_of_honest_samples():
    """Truth and samples N(0, 1): 1000 clips of 3 frames of 8 numbers. Bounds are four deviations of what is estimated.

    variance: of 8 numbers, 1 +- (2 / 7)^0.5, 24,000 times. The mean's squared error: (1 + 1/8)(1 +- 2^0.5); the
    spread's square is their ratio. Energy: E|x - y| / 8^0.5 / 2 with x - y of variance 2 in each of 8 dimensions:
    Gamma(4.5) / Gamma(4) / 8^0.5; a frame's deviates by less than 1.5 (2 - E^2)^0.5, E being twice that.
    """
    clips, objective = 1000, HonestSamples()
    context, target, place = latents(clips, 2, 1), latents(clips, 3, 2), torch.zeros(3, 1, 2, 4)
    pooled = PooledLatents()
    result = evaluated(None, context, target, Baselines(place, place, torch.zeros(3, 13, 4)), 250, [pooled], objective)
    variance_error, mse_error = (2 / 7 / 24_000) ** 0.5, (2 / 24_000) ** 0.5
    assert result["variance"] == pytest.approx(1, abs=4 * variance_error)
    assert result["forecast_mse"] == pytest.approx(1.125, rel=4 * mse_error)
    assert result["spread"] == pytest.approx(1, abs=4 * math.hypot(variance_error, mse_error) / 2)
    ratio = 1.125 * sum(result["horizon"]["variance"]) / sum(result["horizon"]["forecast_mse"])
    assert result["spread"] == pytest.approx(ratio**0.5, rel=1e-6)
    energy = math.gamma(4.5) / math.gamma(4) / 8**0.5
    assert result["forecast_energy"] == pytest.approx(energy, abs=4 * 1.5 * ((2 - 4 * energy**2) / 3000) ** 0.5)
    by_hand = (torch.cat(objective.drawn) - target[:, None]).abs().flatten(2).mean(2)  # clip, sample
    assert result["best_l1"] == pytest.approx(by_hand.amin(1).mean().item(), rel=1e-5)
    assert (
        result["sample_l1"] == pytest.approx(by_hand.mean().item(), rel=1e-5)
        and result["best_l1"] < result["sample_l1"]
    )
    assert "1 is calibrated" in summary(result)
    _, observed = pooled.gathered()
    first_samples = torch.cat([drawn[:, 0] for drawn in objective.drawn])
    torch.testing.assert_close(observed["sample"], first_samples.mean((1, 2, 3)))


def test_the_frechet_distance_is_that_of_each_frame():
    """Forecasts that are off by 0, 1 and 2 in each of 4 channels: 0, 4 and 16 apart. Together they also spread more
    than the truth."""
    context = latents(50, 2, 1)
    target = context[:, -1:].expand(-1, 3, -1, -1, -1)
    place, offset = torch.zeros(3, 1, 2, 4), torch.arange(3.0).view(1, 3, 1, 1, 1)
    result = evaluated(
        lambda context: context[:, -1:] + offset, context, target, Baselines(place, place, torch.zeros(3, 13, 4)), 25
    )
    assert result["horizon"]["forecast_frechet"] == pytest.approx([0, 4, 16], abs=1e-4)
    assert result["horizon"]["copy_last_frechet"] == pytest.approx([0, 0, 0], abs=1e-4)
    # their mean is off by 1 in each channel; a mixture is nearer than its parts
    assert 4 < result["forecast_frechet"] < 20 / 3


def test_a_probe_tells_separable_classes_and_errs_on_their_opposites():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 3, generator=generator) + 10.0 * (2 * labels - 1)[:, None]
    training, held_out = (labels[:20], features[:20]), features[20:]
    accuracies = probe_accuracies(training, (labels[20:], {"target": held_out, "opposite": -held_out}))
    assert accuracies == {"target": 1.0, "opposite": 0.0, "chance": 0.5}


def test_pooled_latents_are_those_of_the_valid_clips():
    context, target = latents(5, 2, 1), latents(5, 3, 2)
    place = torch.zeros(3, 1, 2, 4)
    pooled = PooledLatents()
    evaluated(
        lambda context: context[:, :1].expand(-1, 3, -1, -1, -1),
        context,
        target,
        Baselines(place, place, torch.zeros(3, 13, 4)),
        2,
        [pooled],
    )
    labels, features = pooled.gathered()
    assert labels.tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(features["target"], target.mean((1, 2, 3)))
    torch.testing.assert_close(features["copy_last"], context[:, -1].mean((1, 2)))


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_roll_out_of_known_dynamics_is_exact(frames):
    """The head halves the last latent at every frame; so must a roll-out, however often the head is asked."""
    head = lambda context: torch.cat([context[:, -1:] * 0.5**j for j in (1, 2, 3)], dim=1)  # noqa: E731
    context = latents(2, 2)
    rolled = forecast(build_objective(Config(), GEOMETRY), head, context, torch.arange(2), frames)
    expected = torch.stack([context[:, -1] * 0.5**j for j in range(1, frames + 1)], dim=1)
    assert torch.equal(rolled, expected[:, None])
