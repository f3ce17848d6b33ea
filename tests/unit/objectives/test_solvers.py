"""Solvers on equations with known solutions, guidance, and a trained head on a known distribution."""

import math

import pytest
import torch

from flperf.config import Config, Model, Objective, Sampling, load_config
from flperf.errors import UserError
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry
from flperf.objectives.build import build_objective, forecast
from flperf.objectives.solvers import guided, integrate, time_grid


def decay_error(sampling: Sampling) -> float:
    """Of dx/dtau = -2 tau x from x = 1, which ends at exp(-1)."""
    end = integrate(lambda x, tau: -2 * tau * x, torch.ones(1, dtype=torch.float64), sampling)
    return abs(end.item() - math.exp(-1))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_fixed_steps_converge_at_their_order(solver, order, shift):
    errors = [decay_error(Sampling(solver=solver, steps=steps, shift=shift)) for steps in (256, 512)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_dopri5_keeps_its_tolerance(tolerance):
    assert decay_error(Sampling(solver="dopri5", tolerance=tolerance)) < 10 * tolerance


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "dopri5"])
def test_a_constant_velocity_is_followed_exactly(solver):
    noise = torch.tensor([0.0, 1.0])
    end = integrate(lambda x, tau: torch.full_like(x, 2.0), noise, Sampling(solver=solver, steps=3))
    torch.testing.assert_close(end, noise + 2.0)


def test_the_grid_is_even_or_bent_towards_the_noise():
    assert time_grid(4, 1.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    steps = time_grid(4, 3.0).diff()
    assert (steps > 0).all() and (steps.diff() > 0).all() and steps.sum().item() == pytest.approx(1)


def test_guidance_inside_its_interval_only():
    velocity = guided(lambda x, tau: x + 1, lambda x, tau: x, Sampling(guidance=3.0, guidance_interval=[0.25, 0.75]))
    x = torch.zeros(1)
    assert [velocity(x, torch.tensor(tau)).item() for tau in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1, 3, 3, 3, 1]
    assert guided(lambda x, tau: x + 1, lambda x, tau: x, Sampling(guidance=0.0))(x, torch.tensor(0.5)).item() == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("guidance=2", "needs objective.context_dropout above 0 in training"),
        ("guidance_interval=[0.5,0.1]", "must be two ascending numbers"),
        ("shift=0", "must be above 0"),
        ("solver=rk4", "evaluation.sampling.solver"),
    ],
)
def test_mistakes_are_named(tiny, override, message):
    with pytest.raises(UserError, match=message):
        load_config(tiny, [f"evaluation.sampling.{override}"])


GEOMETRY = LatentGeometry(context_frames=1, target_frames=1, height=1, width=2, dim=2)
MODEL = Model(head="dit", num_context_latents=1, hidden_dim=64, depth=2, num_heads=2)
MIX = torch.tensor([[0.6, 0.0, 0.0, 0.0], [0.4, 0.5, 0.0, 0.0], [0.0, -0.3, 0.7, 0.0], [0.2, 0.0, 0.0, 0.4]])


@pytest.fixture(scope="module")
def gaussian_head():
    """A DiT trained on targets c + MIX z: a Gaussian around the context with covariance MIX MIX^T. A tenth is trained
    without context."""
    config = Config(model=MODEL, objective=Objective(kind="flow_matching", context_dropout=0.1))
    objective, head = build_objective(config, GEOMETRY), build_head(MODEL, GEOMETRY, seed=0, compile=False)
    optimizer, steps, batch = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.0), 1200, 128
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        context = torch.randn(batch, 1, 1, 2, 2, generator=generator).sign()
        target = context + (torch.randn(batch, 4, generator=generator) @ MIX.T).view_as(context)
        loss = objective.loss(head, context, target, torch.arange(batch) + step * batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def draw(head, samples: int, context: torch.Tensor, **sampling) -> torch.Tensor:
    """[clips, samples, 4]"""
    config = Config(model=MODEL, objective=Objective(kind="flow_matching"))
    config.evaluation.sampling = Sampling(samples=samples, **sampling)
    with torch.no_grad():
        return forecast(build_objective(config, GEOMETRY), head, context, torch.arange(len(context))).flatten(2)


@pytest.mark.parametrize(
    "sampling", [{"solver": "heun", "steps": 10}, {"solver": "euler", "steps": 80}, {"solver": "dopri5"}], ids=str
)
def test_a_trained_head_reaches_mean_and_covariance(gaussian_head, sampling):
    """Of 2,000 samples each mean errs by 0.02 and each covariance by 0.03; the head itself is allowed 0.1."""
    context = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 1, 1, 2, 2).repeat(500, 1, 1, 1, 1)
    forecasts = draw(gaussian_head, 4, context, **sampling).flatten(0, 1)
    torch.testing.assert_close(forecasts.mean(0), context[0].flatten(), rtol=0, atol=0.12)
    torch.testing.assert_close(forecasts.T.cov(), MIX @ MIX.T, rtol=0, atol=0.13)


def test_forecasts_are_fixed_by_the_seed_and_differ_between_samples(gaussian_head):
    context = torch.ones(3, 1, 1, 2, 2)
    first, second = (draw(gaussian_head, 4, context) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(draw(gaussian_head, 4, context[:1]), first[:1])  # whatever else is in the batch
    assert (first[:, 0] - first[:, 1]).abs().min() > 0 and (first[0] - first[1]).abs().min() > 0


def test_guidance_moves_away_from_what_needs_no_context(gaussian_head):
    """Without context the mean is 0, so guidance of 2 pushes the forecasts' mean beyond the context."""
    context = torch.ones(200, 1, 1, 2, 2)
    config = Config(model=MODEL, objective=Objective(kind="flow_matching", context_dropout=0.1))
    means = []
    for guidance in (1.0, 2.0):
        config.evaluation.sampling = Sampling(samples=2, steps=20, guidance=guidance)
        with torch.no_grad():
            means.append(
                forecast(build_objective(config, GEOMETRY), gaussian_head, context, torch.arange(200)).mean().item()
            )
    assert means[1] > means[0] + 0.2


def test_a_context_is_projected_once_a_forecast(gaussian_head, monkeypatch):
    calls = []
    encode_context = gaussian_head.encode_context
    monkeypatch.setattr(gaussian_head, "encode_context", lambda context: calls.append(1) or encode_context(context))
    draw(gaussian_head, 5, torch.ones(2, 1, 1, 2, 2), steps=7)
    assert len(calls) == 1
