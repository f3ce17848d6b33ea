"""Flow matching's two memory-bound steps, one pass each: noising the target latents, and the loss with its gradient.

    data     = (normalise(latents) - mean) / std
    noise    = philox_normal(sample, seed), see philox.py
    x_tau    = (1 - tau) noise + tau data    [Lipman et al., "Flow matching", arXiv:2210.02747; noise at tau = 0]
    velocity = data - noise
    loss     = mean over n, d of l(prediction - velocity),    l in mse | l1 | smooth_l1 (beta 1)

Noise and velocity are never stored: both kernels draw the same noise from its counter. The loss kernel writes the
gradient of the prediction while it holds the residual. The backward pass then multiplies by one scalar, usually 1.

Shapes: b samples, n tokens, d channels. Arithmetic is fp32. The ops run Triton on CUDA (flow_matching_triton.py), and
on a CPU the PyTorch code that tests compare with (flow_matching_reference.py).
"""

import torch
from flperf_kernels.flow_matching_reference import (
    LossArguments,
    NoiseArguments,
    flow_matching_data,
    loss_and_derivative,
    noise_like,
    noise_reference,
)
from flperf_kernels.flow_matching_triton import loss_launch, noise_launch, scale_launch, sum_launch
from flperf_kernels.philox import signed_64
from torch import Tensor

NORMS, LOSSES, REDUCTIONS = ("none", "l2", "layer"), ("mse", "l1", "smooth_l1"), ("sample", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Functions


def flow_matching_noise(
    latents, tau, sample, *, seed, mean=None, std=None, norm="none", eps=1e-6, out_dtype=None
) -> Tensor:
    """x_tau [b, n, d], contiguous, in `out_dtype` (default: that of the latents). Not differentiable.

    latents [b, n, d] fp32 | bf16 | fp16 with any strides; tau fp32 [b]; sample int64 [b], the global index of each
    sample, unique in the run, which with `seed` determines its noise. `norm` divides each token by its L2 norm ("l2",
    at least eps) or standardises it over channels ("layer", eps under the root). Then mean and std, fp32 [d],
    standardise each channel. Raises ValueError for anything else.
    """
    _refuse_gradient(latents=latents, tau=tau)
    out_dtype = out_dtype or latents.dtype
    return torch.ops.flperf.flow_matching_noise(latents, tau, sample, signed_64(seed), mean, std, norm, eps, out_dtype)


def flow_matching_loss(
    prediction,
    latents,
    sample,
    *,
    seed,
    loss="mse",
    mean=None,
    std=None,
    norm="none",
    eps=1e-6,
    weight=None,
    reduction="sample",
    scale=1.0,
) -> Tensor:
    """Loss of a predicted velocity [b, n, d], differentiable in the prediction only; other arguments as in
    `flow_matching_noise`.

    reduction "sample": fp32 [b], for each sample scale * weight * mean over n, d of l(prediction - velocity).
    reduction "mean": the mean of those over b, an fp32 scalar.

    The forward pass stores the gradient of the returned value, and the backward pass scales it in place unless the
    incoming gradient is 1. So call backward on the "mean" itself, and put factors such as 1 / accumulation steps into
    `scale`. A second backward pass over the same graph raises an error.
    """
    _refuse_gradient(latents=latents, weight=weight)
    arguments = (signed_64(seed), loss, mean, std, norm, eps, weight, reduction, scale)
    return torch.ops.flperf.flow_matching_loss(prediction, latents, sample, *arguments)


def _refuse_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"flow matching is differentiable in the prediction only, but {name} requires a gradient: detach it "
                "first"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Ops. A fake implementation gives the shapes to code that is being compiled.

# By schema rather than torch.library.custom_op, which disables torch.compile inside an op: the CPU's noise is compiled.
library = torch.library.Library("flperf", "FRAGMENT")
NORMALISATION = "SymInt seed, Tensor? mean, Tensor? std, str norm, float eps"
LOSS = (
    "Tensor prediction, Tensor latents, Tensor sample, SymInt seed, str loss, Tensor? mean, Tensor? std, str norm, "
    "float eps, Tensor? weight, str reduction, float scale"
)
library.define(
    f"flow_matching_noise(Tensor latents, Tensor tau, Tensor sample, {NORMALISATION}, ScalarType out_dtype) -> Tensor"
)
library.define(f"flow_matching_loss({LOSS}) -> Tensor")
library.define(f"flow_matching_loss_and_gradient({LOSS}, bool with_gradient) -> (Tensor loss, Tensor gradient)")
library.define("scale_gradient_(Tensor(a!) gradient, Tensor factor, float gain) -> ()")


def _check(call: NoiseArguments | LossArguments) -> None:
    """Raise ValueError for arguments that the implementations don't support. The fake ones check too, so that compiled
    code fails while it is traced."""
    latents, given = call.latents, call._asdict()
    if latents.dim() != 3 or latents.dtype not in DTYPES:
        raise ValueError(f"latents must be [b, n, d] in {DTYPES}, got {list(latents.shape)} in {latents.dtype}")
    b, n, d = latents.shape
    float32, int64 = (torch.float32,), (torch.int64,)
    expected = dict(prediction=([b, n, d], DTYPES), sample=([b], int64), tau=([b], float32))
    expected |= dict(weight=([b], float32), mean=([d], float32), std=([d], float32))
    for name, (shape, dtypes) in expected.items():
        tensor = given.get(name)
        if tensor is not None and (
            list(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != latents.device
        ):
            wanted = f"{shape} in {' or '.join(map(str, dtypes))} on {latents.device}"
            raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)} in {tensor.dtype} on {tensor.device}")
    if (call.mean is None) != (call.std is None):
        raise ValueError("mean and std go together")
    for name, allowed in dict(norm=NORMS, loss=LOSSES, reduction=REDUCTIONS, out_dtype=DTYPES).items():
        if name in given and given[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {given[name]!r}")


def _noise_fake(*arguments):
    call = NoiseArguments(*arguments)
    _check(call)
    return torch.empty(call.latents.shape, dtype=call.out_dtype, device=call.latents.device)


def _noise_cpu(*arguments):
    call = NoiseArguments(*arguments)
    _check(call)
    return noise_reference(*call)


def _noise_cuda(*arguments):
    out = _noise_fake(*arguments)
    if out.numel():
        noise_launch(NoiseArguments(*arguments), out).run()
    return out


def _gains(prediction: Tensor, reduction: str, scale: float) -> tuple[float, float, float]:
    """Factors of the loss, of the gradient as it is stored, and of the stored gradient in the backward pass.

    fp16 can't hold 1 / (b n d), so fp16 gradients are stored without that factor. The backward pass applies it together
    with the loss scale.
    """
    b, n, d = prediction.shape
    gain = scale / max(1, n * d * (b if reduction == "mean" else 1))
    return (gain, 1.0, gain) if prediction.dtype == torch.float16 else (gain, gain, 1.0)


def _loss_fake(*arguments):
    """Loss, [b] or a scalar, and the gradient of the prediction [b, n, d], or [0] where none is asked for."""
    call = LossArguments(*arguments)
    _check(call)
    b, device = len(call.latents), call.latents.device
    loss = torch.empty(() if call.reduction == "mean" else (b,), dtype=torch.float32, device=device)
    shape = call.latents.shape if call.with_gradient else 0
    return loss, torch.empty(shape, dtype=call.prediction.dtype, device=device)


def _loss_cpu(*arguments):
    call, (out, gradient) = LossArguments(*arguments), _loss_fake(*arguments)
    if call.prediction.numel() == 0:
        return out.fill_(torch.nan), gradient  # PyTorch's mean of nothing
    gain, gradient_gain, _ = _gains(call.prediction, call.reduction, call.scale)
    data = flow_matching_data(call.latents, call.mean, call.std, call.norm, call.eps)
    # In place: on a CPU, new memory costs more than the arithmetic.
    residual = noise_like(data, call.sample, call.seed).add_(call.prediction).sub_(data)
    value, derivative = loss_and_derivative(residual, call.loss)
    weight = torch.ones_like(call.sample, dtype=torch.float32) if call.weight is None else call.weight
    per_sample = value.sum((1, 2)) * (weight * gain)
    if call.with_gradient:
        gradient.copy_(derivative.mul_((weight * gradient_gain)[:, None, None]))
    return per_sample.sum() if call.reduction == "mean" else per_sample, gradient


def _loss_cuda(*arguments):
    call, (out, gradient) = LossArguments(*arguments), _loss_fake(*arguments)
    if call.prediction.numel() == 0:
        return out.fill_(torch.nan), gradient
    gain, gradient_gain, _ = _gains(call.prediction, call.reduction, call.scale)
    launch = loss_launch(call, gradient if call.with_gradient else None, gain, gradient_gain)
    launch.run()
    per_sample = out if call.reduction == "sample" else torch.empty_like(call.sample, dtype=torch.float32)
    sum_launch(launch.arguments["partial"], per_sample).run()
    if call.reduction == "mean":
        sum_launch(per_sample[None], out).run()
    return out, gradient


def _scale_cpu(gradient, factor, gain):
    if (factor * gain != 1).any():
        gradient.mul_((factor * gain).reshape(-1, 1, 1))


def _scale_cuda(gradient, factor, gain):
    if gradient.numel():
        scale_launch(gradient, factor, gain).run()


# ----------------------------------------------------------------------------------------------------------------------
# Differentiation


class _Loss(torch.autograd.Function):
    """The loss keeps its gradient here, where the backward pass may scale it in place. A caller of an op that returned
    both might still use it."""

    @staticmethod
    def forward(ctx, *arguments):
        call = LossArguments(*arguments)
        loss, gradient = torch.ops.flperf.flow_matching_loss_and_gradient(*arguments, True)
        ctx.save_for_backward(gradient)
        ctx.gain = _gains(call.prediction, call.reduction, call.scale)[2]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        torch.ops.flperf.scale_gradient_(gradient, grad_loss, ctx.gain)
        torch.autograd.graph.increment_version(gradient)  # a second backward pass must fail, not scale again
        return gradient, *[None] * 11


def _loss_autograd(prediction, *arguments):
    if prediction.requires_grad and torch.is_grad_enabled():
        return _Loss.apply(prediction, *arguments)
    return _loss_value(prediction, *arguments)


def _loss_value(*arguments):
    return torch.ops.flperf.flow_matching_loss_and_gradient(*arguments, False)[0]


for _name, _cpu, _cuda, _fake in (
    ("flow_matching_noise", _noise_cpu, _noise_cuda, _noise_fake),
    ("flow_matching_loss_and_gradient", _loss_cpu, _loss_cuda, _loss_fake),
    ("scale_gradient_", _scale_cpu, _scale_cuda, lambda gradient, factor, gain: None),
):
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"flperf::{_name}", _fake, lib=library)
library.impl("flow_matching_loss", _loss_value, "CompositeExplicitAutograd")
library.impl("flow_matching_loss", _loss_autograd, "Autograd")
