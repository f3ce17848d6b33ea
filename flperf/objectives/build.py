"""What a head is trained for, and how it then forecasts: regression in one pass, or flow matching.

Latents come in normalised; losses and noise are computed in fp32 whatever the latents' dtype. Noise and tau are pure functions
of (seed, sample), where `sample` is a clip's place in the endless order of training clips.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from flperf_kernels.flow_matching import flow_matching_loss, flow_matching_noise, philox_normal
from torch import Tensor, nn

from flperf.config import Config, Objective
from flperf.errors import UserError
from flperf.models.latents import Layout, Normaliser
from flperf.objectives.solvers import Velocity, guided, integrate

# The shift is that of Esser et al. (arXiv:2403.03206, section 5.3.2); the size that needs none is Zheng et al.'s (arXiv:2510.11690).
DIMENSION_SHIFT_BASE = 4096
# Keep these random numbers apart from those of the training noise, and the parts of a roll-out from one another.
TAU_STREAM, SAMPLING_STREAM, DROPOUT_STREAM, PART_STREAM = 1, 2, 3, 2**32


class Regression:
    """The head outputs the target latents; the loss compares them per element, or by cosine per token."""

    samples = 1

    def __init__(self, config: Config, layout: Layout):
        distance = REGRESSION_LOSSES[config.objective.loss]

        def errors(prediction: Tensor, target: Tensor) -> Tensor:
            return distance(prediction.float(), target.float()).flatten(1).mean(1)

        # Eager, each of its few operations would write the latents in fp32. A process that compiles it for more losses and shapes than
        # torch keeps goes on eager, which fullgraph would make an error.
        self.errors = torch.compile(errors, dynamic=False) if config.engine.compile else errors

    def loss(
        self, head: Callable, context: Tensor, target: Tensor, sample: Tensor, reduction: str = "mean", normaliser: Normaliser | None = None
    ) -> Tensor:
        """fp32 scalar, or [b] with reduction "sample". context, target: normalised `b t h w d`; with a normaliser, target is raw."""
        target = normaliser(target) if normaliser else target
        per_sample = self.errors(head(context), target)
        return per_sample.mean() if reduction == "mean" else per_sample

    def draw(self, head: nn.Module, context: Tensor, keys: Tensor, part: int = 0) -> Tensor:
        """fp32 `b 1 t h w d`: one forecast a clip; there is nothing to draw."""
        return head(context).float()[:, None]


class FlowMatching:
    """The head outputs the velocity data - noise at x_tau = (1 - tau) noise + tau data (Lipman et al., arXiv:2210.02747)."""

    def __init__(self, config: Config, layout: Layout):
        self.objective, self.sampling, self.seed, self.layout = config.objective, config.evaluation.sampling, config.seed, layout
        self.shift = tau_shift(config.objective, layout)

    def loss(
        self, head: Callable, context: Tensor, target: Tensor, sample: Tensor, reduction: str = "mean", normaliser: Normaliser | None = None
    ) -> Tensor:
        """fp32 scalar, or [b] with reduction "sample". context, target: normalised `b t h w d`; sample: int64 [b]. With a normaliser,
        target is raw, where the encoder left it, and is normalised as the ops read it."""
        options = normaliser.fused() if normaliser else {}
        if options is None:
            target, options = normaliser(target), {}
        tokens = rearrange(target, "b t h w d -> b (t h w) d")
        tau = draw_tau(self.objective, self.shift, sample, self.seed)
        noised = flow_matching_noise(tokens, tau, sample, seed=self.seed, out_dtype=context.dtype, **options)
        if self.objective.context_dropout and torch.is_grad_enabled():  # in training only
            context = context * self._keeps_context(sample)[:, None, None, None, None].to(context.dtype)
        prediction = head(context, noised.view(target.shape), tau)
        prediction = rearrange(prediction, "b t h w d -> b (t h w) d")
        return flow_matching_loss(prediction, tokens, sample, seed=self.seed, loss=self.objective.loss, reduction=reduction, **options)

    def _keeps_context(self, sample: Tensor) -> Tensor:
        """Which samples see their context, bool [b]: a function of the sample, like their noise. The others see zeros, the mean latent."""
        uniform = torch.special.ndtr(philox_normal(sample, 1, seed=self.seed + DROPOUT_STREAM)[:, 0])
        return uniform >= self.objective.context_dropout

    @property
    def samples(self) -> int:
        """Forecasts drawn for each clip."""
        return self.sampling.samples

    def draw(self, head: nn.Module, context: Tensor, keys: Tensor, part: int = 0) -> Tensor:
        """fp32 `b k t h w d`: a sample for each of `keys` int64 [b k], one after another, all from one computation of the context's keys
        and values. A sample's noise is a function of its key and of the part of a roll-out."""
        layout = self.layout

        def velocity_given(context: Tensor) -> Velocity:
            memory = head.remember(context)
            return lambda x, tau: head.velocity(x.to(context.dtype), tau.float().repeat(len(x)), memory).float()

        velocity = velocity_given(context)
        if self.sampling.guidance != 1:
            velocity = guided(velocity, velocity_given(torch.zeros_like(context)), self.sampling)
        forecasts = []
        for key in keys.unbind(1):
            noise = philox_normal(key, layout.target_tokens * layout.dim, seed=self.seed + SAMPLING_STREAM + PART_STREAM * part)
            noise = noise.view(-1, layout.target_frames, layout.height, layout.width, layout.dim)
            forecasts.append(integrate(velocity, noise, self.sampling))
        return torch.stack(forecasts, dim=1)


def forecast(objective: Regression | FlowMatching, head: nn.Module, context: Tensor, sample: Tensor, frames: int | None = None) -> Tensor:
    """fp32 `b k t h w d`: k samples (1 in regression) of what follows the normalised context `b t h w d`; sample: int64 [b].

    More frames than the head forecasts at once are rolled out: each sample goes on from its own last frames as context.
    """
    keys = sample[:, None] * objective.samples + torch.arange(objective.samples, device=sample.device)
    forecasts = objective.draw(head, context, keys)
    part = 0
    while frames is not None and forecasts.shape[2] < frames:
        part += 1
        past = torch.cat([repeat(context.float(), "b t h w d -> b k t h w d", k=keys.shape[1]), forecasts], dim=2)
        past = past[:, :, -context.shape[1] :].to(context.dtype)
        # Sample by sample, so that the batch keeps its shape and nothing is compiled again.
        following = [objective.draw(head, past[:, i].contiguous(), keys[:, i : i + 1], part) for i in range(keys.shape[1])]
        forecasts = torch.cat([forecasts, torch.cat(following, dim=1)], dim=2)
    return forecasts[:, :, :frames]


OBJECTIVES: dict[str, type[Regression] | type[FlowMatching]] = {"regression": Regression, "flow_matching": FlowMatching}

REGRESSION_LOSSES = {
    "mse": lambda prediction, target: (prediction - target).square(),
    "l1": lambda prediction, target: (prediction - target).abs(),
    "smooth_l1": lambda prediction, target: F.smooth_l1_loss(prediction, target, reduction="none"),
    "cosine": lambda prediction, target: 1 - F.cosine_similarity(prediction, target, dim=-1),
}


def build_objective(config: Config, layout: Layout) -> Regression | FlowMatching:
    """What the configuration trains for; raises `UserError` where its head can't be trained for that."""
    if config.objective.kind not in OBJECTIVES:
        raise UserError(f"objective.kind: {config.objective.kind!r} is unknown; known: {', '.join(OBJECTIVES)}")
    needs_dit = config.objective.kind == "flow_matching"
    if needs_dit != (config.model.head == "dit"):
        raise UserError(f"objective.kind {config.objective.kind!r} can't train model.head {config.model.head!r} (dit is for flow_matching)")
    return OBJECTIVES[config.objective.kind](config, layout)


def tau_shift(objective: Objective, layout: Layout) -> float:
    """The configured shift, or sqrt(n d / 4096): the larger a clip's latents, the more noise hides as much of them."""
    if objective.tau_shift is not None:
        return objective.tau_shift
    return math.sqrt(layout.target_tokens * layout.dim / DIMENSION_SHIFT_BASE)


def draw_tau(objective: Objective, shift: float, sample: Tensor, seed: int) -> Tensor:
    """tau in (0, 1), fp32 [b], one for each sample: uniform, or logit-normal; then shifted to tau / (tau + shift (1 - tau))."""
    normal = philox_normal(sample, 1, seed=seed + TAU_STREAM)[:, 0]
    if objective.tau_distribution == "uniform":
        tau = torch.special.ndtr(normal)
    else:
        tau = torch.sigmoid(objective.tau_mean + objective.tau_std * normal)
    return tau / (tau + shift * (1 - tau))
