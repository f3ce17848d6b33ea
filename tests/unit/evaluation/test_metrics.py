"""Each metric on a case whose answer is known."""

import math

import pytest
import torch

from flperf.evaluation.metrics import ERRORS, Gaussian, MeanAccumulator, Moments, frechet_distance, sample_scores

CPU = torch.device("cpu")


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


def test_means_leave_out_invalid_clips_even_if_they_are_not_finite():
    means = MeanAccumulator(CPU)
    means.add({"x": torch.tensor([[1.0, 2.0], [math.nan, 5.0]])}, torch.tensor([True, False]))
    means.add({"x": torch.tensor([[3.0, 6.0], [math.inf, 0.0]])}, torch.tensor([True, False]))
    assert means.means()["x"].tolist() == [2.0, 4.0] and means.clips == 2


def test_scores_of_two_samples_on_either_side_of_the_target():
    """Samples at +a and -a of 0: the error of each is a, their variance 2 a^2, the energy score a - |2a| / 2 = 0."""
    samples = torch.stack([torch.full((1, 1, 1, 1, 4), 0.5), torch.full((1, 1, 1, 1, 4), -0.5)], dim=1)
    scores = {key: score.item() for key, score in sample_scores(samples, torch.zeros(1, 1, 1, 1, 4)).items()}
    assert scores["sample", "l1"] == scores["best", "l1"] == 0.5 and scores["sample", "mse"] == 0.25
    assert scores["variance"] == pytest.approx(0.5) and scores["forecast", "energy"] == pytest.approx(0)


def test_the_best_sample_of_a_clip_is_one_sample():
    """Each of two samples is right in one of two frames: the error of the best of each frame is 0, of the best of the
    clip 1/2."""
    samples = torch.zeros(1, 2, 2, 1, 1, 1)
    samples[0, 0, 1] = samples[0, 1, 0] = 1.0
    scores = sample_scores(samples, torch.zeros(1, 2, 1, 1, 1))
    assert scores["best", "l1"].tolist() == [[0.0, 0.0]] and scores["best_of_clip", "l1"].tolist() == [0.5]


@pytest.mark.parametrize("std", [0.3, 3.0])
def test_the_energy_score_is_least_for_calibrated_samples(std):
    """A target of unit variance and 8 samples, over 3,000 clips."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3000, 1, 1, 1, 4, generator=generator)
    samples = torch.randn(3000, 8, 1, 1, 1, 4, generator=generator)
    energy = lambda scale: sample_scores(scale * samples, target)["forecast", "energy"].mean().item()  # noqa: E731
    assert energy(std) > energy(1.0)


def test_the_frechet_distance_of_gaussians():
    """For diagonal covariances it is |m1 - m2|^2 + sum of (s1 - s2)^2, in any rotated basis, and 0 between equals."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    variances = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 0.0]).double()
    means = torch.zeros(3).double(), torch.tensor([1.0, 2.0, 0.0]).double()
    first, second = (
        Gaussian(turn @ mean, turn @ variance.diag() @ turn.T) for mean, variance in zip(means, variances, strict=True)
    )
    assert frechet_distance(first, second) == pytest.approx(5 + 1 + 4)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-12)


def test_moments_are_those_of_each_frame_and_of_all_tokens():
    tokens = torch.randn(5, 3, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    moments = Moments(3, 4, CPU)
    moments.add(tokens[:2])
    moments.add(tokens[2:])
    for gaussian, part in zip(moments.result(), [tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens], strict=True):
        flat = part.flatten(0, -2).double()
        torch.testing.assert_close(gaussian.mean, flat.mean(0), atol=1e-6, rtol=0)
        torch.testing.assert_close(gaussian.covariance, flat.T.cov(correction=0), atol=1e-5, rtol=0)
