"""Flow matching: its loss, the distribution of tau, and forecasts integrated from noise."""

import math
from collections.abc import Callable

import torch
from einops import rearrange
from flperf_kernels.flow_matching import flow_matching_loss, flow_matching_noise
from flperf_kernels.philox import philox_normal
from torch import Tensor, nn

from flperf.config import Config, Objective
from flperf.models.latents import LatentGeometry, Normaliser
from flperf.objectives.solvers import Velocity, guided, integrate

# Latents of this size need no shift (Zheng et al., arXiv:2510.11690). The shift itself is that of Esser et al.
# (arXiv:2403.03206, section 5.3.2).
DIMENSION_SHIFT_BASE = 4096

# Added to the seed, so that no two uses draw the same numbers, nor two windows of a roll-out.
TAU_STREAM, SAMPLING_STREAM, DROPOUT_STREAM, WINDOW_STREAM = 1, 2, 3, 2**32


class FlowMatching:
    """The head outputs the velocity data - noise at x_tau = (1 - tau) noise + tau data (Lipman et al.,
    arXiv:2210.02747)."""

    def __init__(self, config: Config, geometry: LatentGeometry):
        self.objective, self.sampling, self.seed = config.objective, config.evaluation.sampling, config.seed
        self.geometry = geometry
        self.shift = tau_shift(config.objective, geometry)

    def loss(
        self,
        head: Callable,
        context: Tensor,
        target: Tensor,
        sample: Tensor,
        reduction: str = "mean",
        normaliser: Normaliser | None = None,
    ) -> Tensor:
        """fp32 scalar, or [b] with reduction "sample". context, target: normalised `b t h w d`; sample: int64 [b].

        With a normaliser, the target is raw, and the ops normalise it as they read it.
        """
        options: dict = {}
        if normaliser is not None:
            fused = normaliser.fused()
            target, options = (normaliser(target), {}) if fused is None else (target, fused)
        tokens = rearrange(target, "b t h w d -> b (t h w) d")
        tau = draw_tau(self.objective, self.shift, sample, self.seed)
        noised = flow_matching_noise(tokens, tau, sample, seed=self.seed, out_dtype=context.dtype, **options)
        if self.objective.context_dropout and torch.is_grad_enabled():  # in training only
            context = context * self._keeps_context(sample)[:, None, None, None, None].to(context.dtype)
        prediction = head(context, noised.view(target.shape), tau)
        prediction = rearrange(prediction, "b t h w d -> b (t h w) d")
        return flow_matching_loss(
            prediction, tokens, sample, seed=self.seed, loss=self.objective.loss, reduction=reduction, **options
        )

    def _keeps_context(self, sample: Tensor) -> Tensor:
        """Which samples see their context, bool [b]; depends on the sample, as the noise does. The others see zeros,
        the mean latent."""
        uniform = torch.special.ndtr(philox_normal(sample, 1, seed=self.seed + DROPOUT_STREAM)[:, 0])
        return uniform >= self.objective.context_dropout

    @property
    def samples(self) -> int:
        """Forecasts of each clip."""
        return self.sampling.samples

    def draw(self, head: nn.Module, context: Tensor, keys: Tensor, window: int = 0) -> Tensor:
        """A forecast for each of `keys` int64 [b k]: fp32 `b k t h w d`. Its noise depends on the key and on the window
        of a roll-out. The context is encoded once for all."""
        geometry = self.geometry

        def velocity_given(context: Tensor) -> Velocity:
            memory = head.encode_context(context)
            return lambda x, tau: head.velocity(x.to(context.dtype), tau.float().repeat(len(x)), memory).float()

        velocity = velocity_given(context)
        if self.sampling.guidance != 1:
            velocity = guided(velocity, velocity_given(torch.zeros_like(context)), self.sampling)
        forecasts = []
        for key in keys.unbind(1):
            seed = self.seed + SAMPLING_STREAM + WINDOW_STREAM * window
            noise = philox_normal(key, geometry.target_tokens * geometry.dim, seed=seed)
            noise = noise.view(-1, geometry.target_frames, geometry.height, geometry.width, geometry.dim)
            forecasts.append(integrate(velocity, noise, self.sampling))
        return torch.stack(forecasts, dim=1)


def tau_shift(objective: Objective, geometry: LatentGeometry) -> float:
    """The configured shift, or sqrt(n d / 4096): larger latents need more noise to be equally hidden."""
    if objective.tau_shift is not None:
        return objective.tau_shift
    return math.sqrt(geometry.target_tokens * geometry.dim / DIMENSION_SHIFT_BASE)


def draw_tau(objective: Objective, shift: float, sample: Tensor, seed: int) -> Tensor:
    """tau in (0, 1), fp32 [b]: uniform or logit-normal, then shifted to tau / (tau + shift (1 - tau))."""
    normal = philox_normal(sample, 1, seed=seed + TAU_STREAM)[:, 0]
    if objective.tau_distribution == "uniform":
        tau = torch.special.ndtr(normal)
    else:
        tau = torch.sigmoid(objective.tau_mean + objective.tau_std * normal)
    return tau / (tau + shift * (1 - tau))
