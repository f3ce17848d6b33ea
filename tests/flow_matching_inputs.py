"""Inputs of the flow-matching ops, and what they should return: in fp64, and by eager PyTorch in the inputs' dtype."""

import math
from dataclasses import dataclass, replace

import torch
from flperf_kernels import philox
from flperf_kernels.flow_matching_reference import (
    LossArguments,
    NoiseArguments,
    flow_matching_data,
    loss_and_derivative,
)
from flperf_kernels.flow_matching_triton import loss_launch, noise_launch, sum_launch

SEED = 2**40 + 17
SIZES = [(1, 1, 1), (2, 37, 199), (3, 5, 64), (1, 33, 100)]
VARIANTS = [  # dtype, standardised per channel, norm, loss, weighted
    (torch.float32, False, "none", "mse", False),
    (torch.float32, True, "layer", "smooth_l1", True),
    (torch.bfloat16, True, "none", "l1", True),
    (torch.bfloat16, False, "l2", "mse", False),
    (torch.float16, True, "l2", "smooth_l1", False),
    (torch.float16, False, "layer", "l1", True),
]


@dataclass
class Batch:
    """Inputs of both ops."""

    latents: torch.Tensor
    prediction: torch.Tensor
    tau: torch.Tensor
    sample: torch.Tensor
    mean: torch.Tensor | None
    std: torch.Tensor | None
    weight: torch.Tensor | None

    def noise_arguments(self, norm: str) -> NoiseArguments:
        return NoiseArguments(
            self.latents, self.tau, self.sample, SEED, self.mean, self.std, norm, 1e-6, self.latents.dtype
        )

    def loss_arguments(self, norm: str, loss: str) -> LossArguments:
        statistics = (self.mean, self.std)
        return LossArguments(
            self.prediction, self.latents, self.sample, SEED, loss, *statistics, norm, 1e-6, self.weight, "sample", 1.0
        )


def batch(size, dtype=torch.float32, per_channel=False, weighted=False, device="cpu") -> Batch:
    """Latents of mean 1 and standard deviation 3; sample indices that need more than 32 bits."""
    generator = torch.Generator().manual_seed(0)
    b, n, d = size
    latents, prediction = (
        torch.randn(size, generator=generator) * scale + shift for scale, shift in ((3, 1), (1.5, 0))
    )
    tau, mean, std, weight = (torch.rand(k, generator=generator) for k in (b, d, d, b))
    sample = torch.arange(b) * 3 + 2**33
    made = Batch(latents.to(dtype), prediction.to(dtype), tau, sample, mean * 2, std * 3 + 0.5, weight + 0.5)
    made = replace(made, **{} if per_channel else dict(mean=None, std=None), **{} if weighted else dict(weight=None))
    return Batch(*(None if t is None else t.to(device) for t in vars(made).values()))


def exact_noise(sample, count):
    """The noise in fp64, from the same words."""
    words = philox.philox_words(torch.arange(-(-count // 4))[None], sample[:, None], SEED)
    pairs = [
        ((-2 * ((a.double() + 0.5) / 2**32).log()).sqrt(), c.double() * (2 * math.pi / 2**32))
        for a, c in (words[:2], words[2:])
    ]
    return torch.stack([r * f(angle) for r, angle in pairs for f in (torch.cos, torch.sin)], -1).flatten(1)[:, :count]


def exact(x: Batch, norm, loss):
    """x_tau, per-sample loss times n d, and its gradient, in fp64."""
    b, n, d = x.latents.shape
    mean, std = (None if t is None else t.double() for t in (x.mean, x.std))
    data = flow_matching_data(x.latents.double(), mean, std, norm, 1e-6)
    noise = exact_noise(x.sample, n * d).view(b, n, d)
    return torch.lerp(noise, data, x.tau.double()[:, None, None]), *_loss(x, data, noise, loss, torch.float64)


def plain(x: Batch, norm, loss):
    """The same in PyTorch, every tensor in the dtype of the latents."""
    b, n, d = x.latents.shape
    dtype = x.latents.dtype
    data = flow_matching_data(x.latents, x.mean, x.std, norm, 1e-6).to(dtype)
    noise = philox.normal_reference(x.sample, n * d, SEED).view(b, n, d).to(dtype)
    tau = x.tau.to(dtype)[:, None, None]
    return (1 - tau) * noise + tau * data, *_loss(x, data, noise, loss, dtype)


def _loss(x: Batch, data, noise, loss, dtype):
    value, derivative = loss_and_derivative(x.prediction.to(dtype) - (data - noise), loss)
    weight = torch.ones(len(value), 1, 1, dtype=dtype) if x.weight is None else x.weight.to(dtype)[:, None, None]
    return (value * weight).sum((1, 2)), derivative * weight


def assert_as_good_as_plain(results, x: Batch, norm, loss):
    """The largest error against fp64 is at most twice that of plain PyTorch, plus one rounding."""
    names = ("x_tau", "loss", "gradient")
    for name, result, best, pytorch in zip(names, results, exact(x, norm, loss), plain(x, norm, loss), strict=True):
        assert result.isfinite().all(), f"{name}: not everything was written"
        error, allowed = (result - best).abs().max(), 2 * (pytorch - best).abs().max()
        allowed += torch.finfo(result.dtype).eps * best.abs().max()  # plain PyTorch may be exact by luck
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def run_kernels(x: Batch, norm, loss):
    """x_tau, per-sample loss times n d, and its gradient by the kernels, which write into memory full of NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out, gradient = x.latents.new_empty((2, *x.latents.shape))
        per_sample = torch.empty(len(x.latents), device=x.latents.device)
        noise_launch(x.noise_arguments(norm), out).run()
        launch = loss_launch(x.loss_arguments(norm, loss), gradient, gain=1.0, gradient_gain=1.0)
        launch.run()
        sum_launch(launch.arguments["partial"], per_sample).run()
    finally:
        torch.use_deterministic_algorithms(False)
    return out, per_sample, gradient
