"""The objectives at 8 x 4096 x 1024 in bf16: flow matching's noising and loss as fused ops, against plain PyTorch,
eager and compiled; the regression losses.

    python -m pytest benchmarks/test_objective.py

The fused ops are Triton on CUDA and PyTorch with compiled noise on a CPU. GB/s count the bytes that have to move: 4 an
element for the noising, 6 for a loss with its gradient. Each round also times a copy of as many bytes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from flperf_kernels.flow_matching import flow_matching_loss, flow_matching_noise

from benchmarks.recording import MIN_ROUNDS
from benchmarks.sizes import DEVICE, ON_GPU, QUICK, configuration
from flperf.objectives.regression import Regression

SIZE = (2, 64, 64) if QUICK else (8, 4096, 1024)


def plain_noise(latents, tau, sample):
    t = tau[:, None, None]
    return ((1 - t) * torch.randn(latents.shape, device=latents.device) + t * latents.float()).to(latents.dtype)


def plain_loss(prediction, latents, sample):
    """It draws the noise again. The alternative, noise kept from the noising in 4 bytes an element, is not measured."""
    velocity = latents.float() - torch.randn(latents.shape, device=latents.device)
    return (prediction.float() - velocity).square().mean()


def fused_noise(latents, tau, sample):
    return flow_matching_noise(latents, tau, sample, seed=0)


def fused_loss(prediction, latents, sample):
    return flow_matching_loss(prediction, latents, sample, seed=0, reduction="mean")


NOISE = {"plain, eager": plain_noise, "plain, compiled": torch.compile(plain_noise), "fused": fused_noise}
LOSS = {"plain, eager": plain_loss, "plain, compiled": torch.compile(plain_loss), "fused": fused_loss}


def copy_of(bytes: int) -> Callable[[], object]:
    source = torch.zeros(bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(SIZE, device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.benchmark(group="flow matching, noise")
def test_noise(record, latents):
    tau, sample = torch.rand(SIZE[0], device=DEVICE), torch.arange(SIZE[0], device=DEVICE)
    ways = {name: partial(noise, latents, tau, sample) for name, noise in NOISE.items()}
    measure(record, ways, 4 * latents.numel())


@pytest.mark.benchmark(group="flow matching, loss and its gradient")
def test_loss(record, latents):
    prediction = torch.randn_like(latents).requires_grad_()
    sample = torch.arange(SIZE[0], device=DEVICE)

    def with_gradient(loss: Callable) -> None:
        prediction.grad = None
        loss(prediction, latents, sample).backward()

    measure(record, {name: partial(with_gradient, loss) for name, loss in LOSS.items()}, 6 * latents.numel())


@pytest.mark.benchmark(group="regression, loss and its gradient")
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_regression(record, latents, loss):
    """Compiled, as in training, against eager; a loss per element and one per token."""
    prediction = torch.randn_like(latents).requires_grad_()

    def with_gradient(loss: Callable) -> None:
        prediction.grad = None
        loss(lambda context: prediction, None, latents, None).backward()

    ways = {}
    for name, compile in {"eager": False, "compiled": True}.items():
        config = configuration("predictor", "vjepa2", f"objective.loss={loss}", f"engine.compile={compile}")
        ways[name] = partial(with_gradient, Regression(config, None).loss)
    measure(record, ways, 6 * latents.numel())


def measure(record, ways: dict[str, Callable[[], object]], bytes: int) -> None:
    """Time the last of the ways beside the others and a copy of as many bytes."""
    *others, last = ways
    beside = {name: ways[name] for name in others} | {"a copy of as many bytes": copy_of(bytes)}
    record(ways[last], "GB", bytes / 1e9, bytes=bytes, rounds=100 if ON_GPU else MIN_ROUNDS, beside=beside)
