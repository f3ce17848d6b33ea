"""Noising and loss with its gradient, 8 x 4096 x 1024 in bf16: plain PyTorch eager and compiled, and the fused ops.

    python -m pytest benchmarks/test_flow_matching.py --benchmark-columns=median,rounds

The fused op is Triton on CUDA and compiled PyTorch on a CPU. Achieved GB/s counts the bytes that have to move (4 and 6 an element), and
stands beside a copy of as many bytes, timed before each round, so that a drifting machine shows in both.
"""

import statistics
import time

import pytest
import torch
from flperf_kernels.flow_matching import flow_matching_loss, flow_matching_noise

from benchmarks.sizes import QUICK

SIZE = (2, 64, 64) if QUICK else (8, 4096, 1024)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain_noise(latents, tau, sample):
    t = tau[:, None, None]
    return ((1 - t) * torch.randn(latents.shape, device=latents.device) + t * latents.float()).to(latents.dtype)


def plain_loss(prediction, latents, sample):
    """The velocity costs the noise again; that it would otherwise be kept from the noising, in 4 bytes an element, is left out."""
    velocity = latents.float() - torch.randn(latents.shape, device=latents.device)
    return (prediction.float() - velocity).square().mean()


def fused_noise(latents, tau, sample):
    return flow_matching_noise(latents, tau, sample, seed=0)


def fused_loss(prediction, latents, sample):
    return flow_matching_loss(prediction, latents, sample, seed=0, reduction="mean")


VARIANTS = {
    "eager": (plain_noise, plain_loss),
    "compiled": (torch.compile(plain_noise), torch.compile(plain_loss)),
    "fused": (fused_noise, fused_loss),
}


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("op", ["noise", "loss"])
def test_flow_matching(benchmark, op, variant):
    noise, loss = VARIANTS[variant]
    latents, prediction = (torch.randn(SIZE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    tau, sample = torch.rand(SIZE[0], device=DEVICE), torch.arange(SIZE[0], device=DEVICE)
    prediction.requires_grad_()

    def with_gradient():
        prediction.grad = None
        loss(prediction, latents, sample).backward()

    function = with_gradient if op == "loss" else lambda: noise(latents, tau, sample)
    bytes_moved = latents.numel() * (6 if op == "loss" else 4)
    source = torch.zeros(bytes_moved // 2, dtype=torch.uint8, device=DEVICE)
    target, copies = torch.zeros_like(source), []

    def time_copy():
        copies.append(seconds(lambda: target.copy_(source)))

    rounds = 100 if DEVICE == "cuda" else 5
    benchmark.group = f"{op}, {DEVICE}"
    benchmark.pedantic(seconds, (function,), setup=time_copy, rounds=rounds, warmup_rounds=2)
    if benchmark.stats:  # absent where benchmarks are disabled
        achieved, copy = bytes_moved / benchmark.stats.stats.median / 1e9, bytes_moved / statistics.median(copies) / 1e9
        benchmark.extra_info |= {"GB/s": achieved, "copy GB/s": copy, "ratio to copy": achieved / copy}
        print(f"\n{op:5} {variant:8} {achieved:8.2f} GB/s, {achieved / copy:6.1%} of a copy's {copy:.1f} GB/s")
