"""Inputs of the fused gated residual, norm and modulation, and what it should return."""

import torch
from flperf_kernels import adaln

from benchmarks import norm_report

# A norm over one or two numbers has gradients of nothing but rounding errors, times 1,000.
SIZES = [(1, 1, 3), (2, 5, 16), (3, 37, 199)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(size, dtype, device="cpu"):
    """x, y, gate, shift, scale, and the gradients of x' and h."""
    b, _, d = size
    generator = torch.Generator().manual_seed(0)
    shapes = (size, size, (b, d), (b, d), (b, d), size, size)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def differentiated(function, tensors):
    """x', h and the five gradients of a function of x, y, gate, shift and scale."""
    *leaves, grad_out, grad_h = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = function(*leaves)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, (grad_out, grad_h))]


def assert_as_good_as_plain(results, tensors):
    """The largest error against fp64 is at most twice that of plain PyTorch in the same dtype, plus a few roundings."""
    dtype = tensors[0].dtype
    exact = differentiated(lambda *leaves: adaln.reference(*leaves, 1e-6), [tensor.double() for tensor in tensors])
    plain = differentiated(norm_report.between_layers, tensors)
    names = ("x'", "h", "grad x", "grad y", "grad gate", "grad shift", "grad scale")
    for name, result, best, pytorch in zip(names, results, exact, plain, strict=True):
        assert result.dtype == dtype and result.isfinite().all(), f"{name}: not everything was written"
        allowed = 2 * (pytorch - best).abs().max() + 4 * torch.finfo(dtype).eps * best.abs().max()
        error = (result - best).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
