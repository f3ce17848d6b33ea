"""The objectives: losses, tau, context dropout, and training steps with the fused ops against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from flow_matching_training import (
    CONFIG,
    GEOMETRY,
    MODEL,
    assert_fused_and_compiled_trains_as_the_reference,
    dit,
)
from flperf_kernels.philox import philox_normal

from flperf.config import Config, Engine, Model, Objective
from flperf.errors import UserError
from flperf.models.latents import LatentGeometry, Normaliser, Statistics
from flperf.objectives.build import build_objective
from flperf.objectives.flow_matching import draw_tau, tau_shift

SAMPLES = torch.arange(20_000)


def regression(loss: str = "mse", compile: bool = False) -> Config:
    return Config(model=Model(head="predictor"), objective=Objective(loss=loss), engine=Engine(compile=compile))


def test_traced_into_one_graph_the_fused_ops_train_a_dit_as_the_reference_in_eager_mode(monkeypatch):
    """tests/integration/test_compilation.py generates code, which would take a minute for a DiT."""
    assert_fused_and_compiled_trains_as_the_reference(dit, "cpu", "aot_eager_decomp_partition", monkeypatch)


def test_the_velocity_is_data_minus_noise():
    """A head that knows the noise reaches loss 0. x_tau + (1 - tau) velocity, one Euler step to tau = 1, is the
    data."""
    objective, target, sample = build_objective(CONFIG, GEOMETRY), torch.randn(3, 2, 3, 3, 12), torch.arange(3)
    tokens = rearrange(target, "b t h w d -> b (t h w) d")
    noise = philox_normal(sample, tokens[0].numel(), seed=objective.seed).view_as(target)
    assert objective.loss(lambda context, noised, tau: target - noise, target, target, sample).item() < 1e-10
    seen = {}

    def head(context, noised, tau):
        seen.update(noised=noised, tau=tau)
        return torch.zeros_like(noised)

    objective.loss(head, target, target, sample)
    tau = seen["tau"][:, None, None, None, None]
    torch.testing.assert_close(seen["noised"] + (1 - tau) * (target - noise), target, rtol=1e-4, atol=1e-4)


def test_losses_of_samples_average_to_the_loss():
    target, sample = torch.randn(3, 2, 3, 3, 12), torch.arange(3)

    def head(context, *_):
        return torch.zeros_like(target)

    for config in (CONFIG, regression("l1")):
        objective = build_objective(config, GEOMETRY)
        each = objective.loss(head, target, target, sample, reduction="sample")
        assert each.shape == (3,)
        torch.testing.assert_close(each.mean(), objective.loss(head, target, target, sample))


@pytest.mark.parametrize("kind", ["standardize", "layer", "l2", "l1", "none"])
@pytest.mark.parametrize("config", [CONFIG, regression()], ids=["flow_matching", "regression"])
def test_raw_targets_are_normalised_in_the_loss(kind, config):
    """The target may be a strided view of the latents of a clip."""
    objective, latents, sample = build_objective(config, GEOMETRY), 3 * torch.randn(3, 4, 3, 3, 12) + 1, torch.arange(3)
    normaliser = Normaliser(kind, torch.float32, Statistics(torch.linspace(0, 2, 12), torch.linspace(1, 4, 12)))
    seen = []

    def head(context, *noised):
        seen.append(noised)
        return torch.ones(3, 2, 3, 3, 12)

    raw = objective.loss(head, latents[:, :2], latents[:, 2:], sample, normaliser=normaliser)
    ready = objective.loss(head, latents[:, :2], normaliser(latents[:, 2:]), sample)
    torch.testing.assert_close(raw, ready)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize(
    ("loss", "expected", "compile"),
    [
        ("mse", F.mse_loss, False),
        ("l1", F.l1_loss, False),
        ("smooth_l1", F.smooth_l1_loss, False),
        ("smooth_l1", F.smooth_l1_loss, True),
    ],
)
def test_regression_losses_and_gradients_are_those_of_torch(loss, expected, compile, graphs_only):
    prediction, target = (
        latents.requires_grad_() for latents in torch.randn(2, 3, 2, 3, 3, 12).to(torch.bfloat16).unbind()
    )
    objective = build_objective(regression(loss, compile), GEOMETRY)
    value = objective.loss(lambda context: prediction, None, target, torch.arange(3))
    assert value.dtype == torch.float32  # whatever the dtype of the latents
    reference = expected(prediction.float(), target.float())
    torch.testing.assert_close(value, reference)
    gradients = (torch.autograd.grad(loss, prediction)[0] for loss in (value, reference))
    torch.testing.assert_close(*gradients)


def test_cosine_ignores_length_and_is_two_for_the_opposite():
    target = torch.randn(3, 2, 3, 3, 12)
    objective = build_objective(regression("cosine"), GEOMETRY)
    assert objective.loss(lambda context: 5 * target, None, target, None).item() == pytest.approx(0, abs=1e-6)
    assert objective.loss(lambda context: -target, None, target, None).item() == pytest.approx(2, abs=1e-6)


def test_tau_depends_on_sample_and_seed_alone():
    config = Objective(tau_distribution="logit_normal")
    # Not bit for bit: the last bit of a vectorised logarithm depends on the index in the vector.
    torch.testing.assert_close(draw_tau(config, 1.0, SAMPLES, 3)[100:200], draw_tau(config, 1.0, SAMPLES[100:200], 3))
    assert not torch.equal(draw_tau(config, 1.0, SAMPLES, 3), draw_tau(config, 1.0, SAMPLES, 4))


def test_uniform_tau_is_uniform():
    """The Kolmogorov-Smirnov distance of 20,000 draws exceeds 1.95 / sqrt(20,000) for one seed in a thousand."""
    tau = draw_tau(Objective(tau_distribution="uniform"), 1.0, SAMPLES, 0).sort().values
    steps = torch.arange(1, len(tau) + 1) / len(tau)
    assert (tau - steps).abs().max() < 1.95 / math.sqrt(len(tau))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_shift_moves_the_median_of_logit_normal_tau(shift):
    """The median 1/2 becomes 1 / (1 + shift): more noise for a shift above 1. The median of 20,000 logits of standard
    deviation 1 has a standard error of 0.01."""
    tau = draw_tau(Objective(tau_distribution="logit_normal"), shift, SAMPLES, 0)
    assert tau.min() > 0 and tau.max() < 1
    assert tau.logit().median().item() == pytest.approx(-math.log(shift), abs=0.04)


def test_context_dropout_takes_its_share_of_clips_in_training_alone():
    """The share of 20,000 draws of probability p is within four standard errors, (p (1 - p) / 20,000)^0.5 each, of
    p."""
    geometry, rate, seen = LatentGeometry(1, 1, 1, 1, 2), 0.2, []
    config = Config(model=MODEL, objective=Objective(kind="flow_matching", context_dropout=rate))
    objective, context = build_objective(config, geometry), torch.ones(len(SAMPLES), 1, 1, 1, 2)

    def head(context, noised, tau):
        seen.append(context.flatten(1))
        return torch.zeros_like(noised)

    objective.loss(head, context, context, SAMPLES)
    with torch.no_grad():
        objective.loss(head, context, context, SAMPLES)
    kept = seen[0].mean(1)
    assert set(kept.tolist()) == {0.0, 1.0} and seen[1].eq(1).all()
    assert 1 - kept.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(SAMPLES)) ** 0.5)


def test_the_tau_shift_grows_with_the_root_of_a_clips_latents_unless_it_is_configured():
    base = LatentGeometry(2, 2, 8, 8, 32)  # 2 * 8 * 8 tokens of 32 channels are 4096 numbers
    assert tau_shift(Objective(tau_shift=None), base) == 1.0
    assert tau_shift(Objective(tau_shift=None), LatentGeometry(2, 8, 8, 8, 32)) == 2.0
    assert tau_shift(Objective(tau_shift=2.5), base) == 2.5


def test_heads_and_objectives_that_do_not_go_together():
    with pytest.raises(UserError, match="'flow_matching' can't train model.head 'predictor'"):
        build_objective(Config(objective=Objective(kind="flow_matching")), GEOMETRY)
    with pytest.raises(UserError, match="'regression' can't train model.head 'dit'"):
        build_objective(Config(model=MODEL), GEOMETRY)
    with pytest.raises(UserError, match="objective.kind: 'diffusion' is unknown"):
        build_objective(Config(objective=Objective(kind="diffusion")), GEOMETRY)
