"""Flow matching in plain PyTorch: the arguments of the ops, their references for autograd, and the parts of them that
the CPU's ops share.

Shapes: b samples, n tokens, d channels. The formula is in flow_matching.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from flperf_kernels.philox import philox_normal
from torch import Tensor


class NoiseArguments(NamedTuple):
    """Arguments of the op `flow_matching_noise`, in the order of its schema."""

    latents: Tensor
    tau: Tensor
    sample: Tensor
    seed: int
    mean: Tensor | None
    std: Tensor | None
    norm: str
    eps: float
    out_dtype: torch.dtype


class LossArguments(NamedTuple):
    """Arguments of the ops `flow_matching_loss` and `flow_matching_loss_and_gradient`, in the order of their
    schemas."""

    prediction: Tensor
    latents: Tensor
    sample: Tensor
    seed: int
    loss: str
    mean: Tensor | None
    std: Tensor | None
    norm: str
    eps: float
    weight: Tensor | None
    reduction: str
    scale: float
    with_gradient: bool = False  # an argument of `flow_matching_loss_and_gradient` alone


def flow_matching_data(latents: Tensor, mean: Tensor | None, std: Tensor | None, norm: str, eps: float) -> Tensor:
    """Latents [b, n, d], normalised, in fp32 or wider."""
    data = latents.to(torch.promote_types(latents.dtype, torch.float32))
    if norm == "l2":
        data = F.normalize(data, dim=-1, eps=eps)
    elif norm == "layer":
        data = F.layer_norm(data, data.shape[-1:], eps=eps)
    return data if mean is None else (data - mean) / std


def noise_like(data: Tensor, sample: Tensor, seed: int) -> Tensor:
    """The noise of samples int64 [b], in the shape [b, n, d] and the dtype of the data."""
    b, n, d = data.shape
    return philox_normal(sample, n * d, seed=seed).reshape(b, n, d).to(data.dtype)


def flow_matching_velocity(latents, sample, *, seed, mean=None, std=None, norm="none", eps=1e-6) -> Tensor:
    """The regression target data - noise, fp32 [b, n, d] (fp64 for fp64 latents)."""
    data = flow_matching_data(latents, mean, std, norm, eps)
    return data - noise_like(data, sample, seed)


def noise_reference(latents, tau, sample, seed, mean, std, norm, eps, out_dtype) -> Tensor:
    """`flow_matching_noise` in plain PyTorch: latents [b, n, d], tau [b] and sample int64 [b] to x_tau [b, n, d] in
    `out_dtype`."""
    data = flow_matching_data(latents, mean, std, norm, eps)
    return noise_like(data, sample, seed).lerp_(data, tau.to(data.dtype)[:, None, None]).to(out_dtype)


def loss_reference(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale) -> Tensor:
    """`flow_matching_loss` in plain PyTorch, differentiated by autograd: [b], or a scalar for reduction "mean", in fp32
    or wider.

    prediction and latents [b, n, d]; sample int64 [b]; weight [b] and mean, std [d], or None each.
    """
    velocity = flow_matching_velocity(latents, sample, seed=seed, mean=mean, std=std, norm=norm, eps=eps)
    pointwise = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[loss]
    per_sample = pointwise(prediction.to(velocity.dtype), velocity, reduction="none").mean((1, 2)) * scale
    per_sample = per_sample if weight is None else per_sample * weight
    return per_sample.mean() if reduction == "mean" else per_sample


def loss_and_derivative(residual: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """The pointwise loss ("mse", "l1" or "smooth_l1") of a residual and its derivative, both of the residual's shape
    and dtype."""
    if loss == "mse":
        return residual.square(), 2.0 * residual
    if loss == "l1":
        return residual.abs(), residual.sign()
    clamped = residual.clamp(-1.0, 1.0)  # r^2 / 2 inside [-1, 1] and |r| - 1/2 outside are both c (r - c / 2)
    return clamped * (residual - 0.5 * clamped), clamped
