"""Attention at the size of the reference encoder (head width 64) and heads (width 128) on 64 frames of 256 x 256,
forward and backward, against each of PyTorch's kernels. Its FlashAttention-2 is also what xFormers runs if it has no
other.

    python -m pytest benchmarks/test_attention.py
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.sizes import BATCH, DEVICE, DTYPE, ON_GPU, QUICK
from flperf.models.attention import attention

TOKENS = 64 if QUICK else 8192 if ON_GPU else 1024


def by_pytorch(backend: SDPBackend, *inputs: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)


def ways() -> dict[str, Callable]:
    if not ON_GPU:
        return {"products and softmax": partial(by_pytorch, SDPBackend.MATH)}
    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
    return {name: partial(by_pytorch, backend) for name, backend in kernels.items()}


@pytest.mark.parametrize("heads, width", [(16, 64), (8, 128)] if ON_GPU else [(3, 64)])
def test_attention(benchmark, record, heads, width):
    benchmark.group = f"attention, {heads} heads of {width}"
    inputs = [
        torch.randn(BATCH, TOKENS, heads, width, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3)
    ]
    gradient = torch.randn_like(inputs[0])

    def forward_and_backward(function: Callable) -> None:
        for x in inputs:
            x.grad = None
        function(*inputs).backward(gradient)

    flops = 12 * BATCH * heads * TOKENS**2 * width
    beside = {name: partial(forward_and_backward, function) for name, function in ways().items()}
    record(partial(forward_and_backward, attention), "tokens", BATCH * TOKENS, flops=flops, dtype=DTYPE, beside=beside)
