"""Solvers on equations with known solutions, guidance, and the loss and forecasts of a known distribution."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flperf.config import Config, Evaluation, Model, Objective, Sampling, load_config
from flperf.errors import UserError
from flperf.models.latents import LatentGeometry
from flperf.objectives.build import build_objective, forecast
from flperf.objectives.solvers import guided, integrate, time_grid


def decay_error(sampling: Sampling) -> float:
    """The error at tau = 1 of dx/dtau = -2 tau x from x = 1, whose solution ends at exp(-1)."""
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
CONFIG = Config(model=Model(head="dit"), objective=Objective(kind="flow_matching"))
MIX = torch.tensor([[0.6, 0.0, 0.0, 0.0], [0.4, 0.5, 0.0, 0.0], [0.0, -0.3, 0.7, 0.0], [0.2, 0.0, 0.0, 0.4]])
CONTEXT = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 1, 1, 2, 2)


class GaussianHead(nn.Module):
    """The velocity E[data - noise | x, tau] of targets c + MIX z around the context c, in closed form, plus a
    correction that starts at zero."""

    def __init__(self):
        super().__init__()
        self.correction = nn.Linear(9, 4)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def encode_context(self, context: Tensor) -> Tensor:
        return context.flatten(1)

    def velocity(self, noised: Tensor, tau: Tensor, memory: Tensor) -> Tensor:
        x, t, one, covariance = noised.flatten(1), tau[:, None, None], torch.eye(4), MIX @ MIX.T
        gain = (t * covariance - (1 - t) * one) @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * one)
        velocity = memory + (gain @ (x - tau[:, None] * memory)[:, :, None])[:, :, 0]
        features = torch.cat([x, tau[:, None], tau[:, None] * x], dim=1)
        return (velocity + self.correction(features)).view_as(noised)

    def forward(self, context: Tensor, noised: Tensor, tau: Tensor) -> Tensor:
        return self.velocity(noised, tau, self.encode_context(context))


def draw(context: Tensor, head: nn.Module | None = None, **sampling) -> Tensor:
    """Forecasts [clips, samples, 4]."""
    config = replace(CONFIG, evaluation=Evaluation(sampling=Sampling(**sampling)))
    with torch.no_grad():
        forecasts = forecast(
            build_objective(config, GEOMETRY), head or GaussianHead(), context, torch.arange(len(context))
        )
    return forecasts.flatten(2)


def test_the_loss_is_least_at_the_velocity_of_the_targets():
    """The gradient of the correction is half a mean of 20,000 products of residuals and features, both of variance 2 at
    most: 0.02 is three standard errors."""
    clips, head = 20_000, GaussianHead()
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(clips, 1, 1, 2, 2, generator=generator).sign()
    target = context + (torch.randn(clips, 4, generator=generator) @ MIX.T).view_as(context)
    loss = build_objective(CONFIG, GEOMETRY).loss(head, context, target, torch.arange(clips))
    gradients = torch.autograd.grad(loss, head.parameters())
    assert max(gradient.abs().max() for gradient in gradients) < 0.02


@pytest.mark.parametrize(
    "sampling", [{"solver": "heun", "steps": 20}, {"solver": "euler", "steps": 80}, {"solver": "dopri5"}], ids=str
)
def test_forecasts_have_the_mean_and_covariance_of_the_targets(sampling):
    """With 2,000 samples the standard error is 0.02 for a mean and 0.03 for a covariance."""
    forecasts = draw(CONTEXT.repeat(500, 1, 1, 1, 1), samples=4, **sampling).flatten(0, 1)
    torch.testing.assert_close(forecasts.mean(0), CONTEXT.flatten(), rtol=0, atol=0.06)
    torch.testing.assert_close(forecasts.T.cov(), MIX @ MIX.T, rtol=0, atol=0.08)


def test_forecasts_depend_on_the_seed_alone_and_differ_between_samples():
    context = torch.ones(3, 1, 1, 2, 2)
    first, second = (draw(context, samples=4) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(draw(context[:1], samples=4), first[:1])  # whatever else is in the batch
    assert (first[:, 0] - first[:, 1]).abs().min() > 0 and (first[0] - first[1]).abs().min() > 0


def test_guidance_pushes_forecasts_beyond_the_context():
    """This velocity is linear in the context, so guidance g moves the mean of forecasts from c to g c."""
    usual, guided = (draw(CONTEXT, samples=2, steps=20, guidance=guidance) for guidance in (1.0, 2.0))
    torch.testing.assert_close(guided, usual + CONTEXT.flatten())


def test_a_context_is_encoded_once_for_all_forecasts(monkeypatch):
    head, calls = GaussianHead(), []
    encode_context = head.encode_context
    monkeypatch.setattr(head, "encode_context", lambda context: calls.append(1) or encode_context(context))
    draw(torch.ones(2, 1, 1, 2, 2), head, samples=5, steps=7)
    assert len(calls) == 1
