"""Statistics and baselines of latents whose best linear forecast is known."""

import pytest
import torch

from flperf.errors import UserError
from flperf.models.baselines import LatentSample, load_statistics, ridge_solution, save_statistics
from flperf.models.latents import LatentGeometry, Normaliser

GEOMETRY = LatentGeometry(context_frames=2, target_frames=3, height=2, width=2, dim=5)
CPU = torch.device("cpu")


def random_latents(clips: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(clips)
    draw = lambda frames: 3 * torch.randn(clips, frames, 2, 2, 5, generator=generator) + torch.arange(5.0)  # noqa: E731
    return draw(2), draw(3), torch.arange(clips)


def fitted(kind: str, *batches):
    sample = LatentSample(kind, GEOMETRY, CPU)
    for batch in batches:
        sample.add(*batch)
    return sample.result()


def test_standardised_latents_have_zero_mean_and_unit_standard_deviation_per_channel():
    context, target, clips = random_latents(64)
    statistics, _ = fitted("standardize", (context, target, clips))
    normaliser = Normaliser("standardize", torch.float32, statistics)
    tokens = torch.cat([normaliser(x).flatten(0, -2) for x in (context, target)])
    torch.testing.assert_close(tokens.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(0, correction=0), torch.ones(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "l1", "l2", "layer", "standardize"])
def test_mean_and_median_are_those_of_normalised_targets_however_clips_are_batched(kind):
    batches = [random_latents(clips) for clips in (4, 7)]
    statistics, baselines = fitted(kind, *batches)
    targets = torch.cat([Normaliser(kind, torch.float32, statistics)(target) for _, target, _ in batches])
    torch.testing.assert_close(baselines.position_mean, targets.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(baselines.position_median, targets.median(0).values)  # 11 clips: the sixth value
    even = fitted(kind, random_latents(4))[1].position_median
    assert torch.isfinite(even).all()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_latents_that_are_not_finite_are_refused(value):
    context, target, clips = random_latents(8)
    target[5, 1, 0, 1, 2] = float(value)
    with pytest.raises(UserError, match="hold NaN or infinity; check backbone.weights"):
        fitted("standardize", (context, target, clips))


def test_ridge_forecasts_linear_motion_and_the_other_baselines_do_not():
    """Frame j ahead is last + j * change, a linear function of the features."""
    generator = torch.Generator().manual_seed(0)
    previous, change = (torch.randn(200, 1, 2, 2, 5, generator=generator) for _ in range(2))
    last = previous + change
    target = torch.cat([last + j * change for j in (1, 2, 3)], dim=1)
    context = torch.cat([previous, last], dim=1)
    _, baselines = fitted("none", (context, target, torch.arange(200)))
    errors = {
        name: (forecast - target).square().mean().item() for name, forecast in baselines.forecasts(context).items()
    }
    assert errors["ridge"] < 1e-3 < 1 < min(errors["copy_last"], errors["mean"], errors["median"])


def test_ridge_chooses_the_strongest_penalty_if_targets_are_independent_of_the_context():
    """On the held-out half of the clips shrinking to the mean is best."""
    context, target, clips = random_latents(30)
    _, baselines = fitted("standardize", (context, target, clips))
    none_held_out = LatentSample("standardize", GEOMETRY, CPU)  # always has the strongest penalty
    none_held_out.add(context, target, torch.zeros(30, dtype=torch.long))
    strongest = none_held_out.result()[1]
    torch.testing.assert_close(baselines.ridge, strongest.ridge)


def test_ridge_solution_solves_the_penalised_least_squares():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(50, 4, generator=generator).double(), torch.randn(50, 3, generator=generator).double()
    x[:, -1] = 1
    penalty = torch.tensor([0.1, 0.1, 0.1, 0.0]).double() * 50
    expected = torch.linalg.lstsq(
        torch.cat([x, penalty.sqrt().diag()]), torch.cat([y, torch.zeros(4, 3).double()])
    ).solution
    torch.testing.assert_close(ridge_solution(x.T @ x, (x.T @ y)[None], 0.1)[0], expected)


def test_a_constant_channel_stays_finite():
    context, target, clips = random_latents(4)
    context[..., 0] = target[..., 0] = 2.0
    statistics, baselines = fitted("standardize", (context, target, clips))
    assert Normaliser("standardize", torch.float32, statistics)(target)[..., 0].abs().max() < 1e-5
    assert all(torch.isfinite(tensor).all() for tensor in vars(baselines).values())


def test_statistics_are_stored_exactly(tmp_path):
    measured = fitted("standardize", random_latents(4))
    save_statistics(tmp_path / "s.safetensors", *measured)
    again = load_statistics(tmp_path / "s.safetensors", CPU)
    for part, stored in zip(measured, again, strict=True):
        assert all(torch.equal(getattr(part, name), getattr(stored, name)) for name in vars(part))


@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "halved"])
def test_damaged_statistics_are_named(tmp_path, share):
    path = tmp_path / "s.safetensors"
    save_statistics(path, *fitted("standardize", random_latents(4)))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=f"{path}: is damaged .* remove it"):
        load_statistics(path, CPU)
