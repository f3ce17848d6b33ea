"""Inputs of the backward passes between the products of a head, and what they should return: gradients in fp64."""

import math

import torch
import torch.nn.functional as F
from flperf_kernels.bias_gradients import gelu_launch, heads_launches
from flperf_kernels.residual_norm import backward_launch

from flperf.models.attention import split_heads
from flperf.models.heads.positions import rotate

# A norm over one or two numbers has gradients of nothing but rounding errors, times 1,000.
SIZES = [(1, 1, 3), (2, 5, 16), (3, 37, 199)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = {  # (norm, gated, one)
    "modulated": (True, False, 1.0),
    "with weights": (True, False, 0.0),
    "gated and modulated": (True, True, 1.0),
    "gated": (False, True, 0.0),
}
HEADS = {  # (b, n, a, k), parts, rotated
    "queries, keys, values": ((2, 37, 3, 10), 3, 2),
    "queries": ((1, 5, 2, 64), 1, 1),
    "keys, values": ((3, 9, 2, 24), 2, 1),
    "without positions": ((2, 4, 1, 6), 3, 0),
}


def randoms(*shapes, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def norm_arguments(name, size, dtype, device="cpu"):
    """Arguments of `residual_norm_backward`."""
    norm, gated, one = NORMS[name]
    b, _, d = size
    grad_out, grad_h, out, y, gate, scale = randoms(
        size, size, size, size, (b, d), (b if one else 1, d), dtype=dtype, device=device
    )
    normed = (grad_h, out) if norm else (None, None)
    return [grad_out, *normed, *((y, gate) if gated else (None, None)), scale if norm else None, one, 1e-6]


def exact_norm(grad_out, grad_h, out, y, gate, scale, one, eps):
    """What `residual_norm_backward` should return, by autograd in fp64."""

    def leaf(tensor):
        return None if tensor is None else tensor.cpu().double().requires_grad_()

    (b, _, d), y, gate, scale = grad_out.shape, leaf(y), leaf(gate), leaf(scale)
    x = leaf(torch.zeros_like(grad_out) if out is None else out)
    shift, bias = (torch.zeros(b, d, dtype=torch.double, requires_grad=True) for _ in range(2))
    residual = bias[:, None] if gate is None else gate[:, None] * (y + bias[:, None])
    summed = x + residual - residual.detach()  # x is x' as stored
    expanded = None if scale is None else scale.expand(b, d)  # the gradient of each sample
    outputs, grads = [summed], [grad_out.cpu().double()]
    leaves = [y, gate] if gate is not None else []
    if out is not None:
        h = F.layer_norm(summed, (d,), eps=eps) * (one + expanded[:, None]) + shift[:, None]
        outputs, grads, leaves = [summed, h], [*grads, grad_h.cpu().double()], [x, shift, expanded, *leaves]
    return torch.autograd.grad(outputs, [*leaves, bias], grads)


def run_norm_kernel(grad_out, grad_h, out, y, gate, scale, one, eps):
    """The same from the kernel. Everything that it should write is NaN before."""
    grad_x, grad_y = (torch.full_like(grad_out, math.nan) if needed is not None else None for needed in (out, gate))
    launch = backward_launch(grad_out, grad_h, out, y, gate, scale, one, eps, grad_x, grad_y)
    launch.arguments["partial"].fill_(math.nan)
    launch.run()
    *sums, bias = launch.arguments["partial"].sum(1).unbind(1)
    norm = [] if out is None else [grad_x, *sums[:2]]
    return [*norm, *([] if gate is None else [grad_y, sums[-1]]), bias if gate is None else bias * gate]


def heads_arguments(name, dtype, device="cpu"):
    """Arguments of `heads_backward`. The parts are views as attention returns them."""
    (b, n, a, k), parts, rotated = HEADS[name]
    grads = [grad.transpose(1, 2) for grad in randoms(*[(b, a, n, k)] * parts, dtype=dtype, device=device)]
    cosine, sine = (
        randoms((n, 1, k // 2), (n, 1, k // 2), dtype=torch.float32, device=device) if rotated else [None] * 2
    )
    return grads, cosine, sine, rotated


def exact_heads(grads, cosine, sine, rotated):
    b, n, a, k = grads[0].shape
    x = torch.zeros(b, n, len(grads) * a * k, dtype=torch.double, requires_grad=True)
    tables = None if cosine is None else (cosine.cpu().double(), sine.cpu().double())
    split = split_heads(x, len(grads), a)
    # `rotate` computes in fp32; each of these numbers is one, or a product of two.
    parts = [*(rotate(part, tables) for part in split[:rotated]), *split[rotated:]]
    (result,) = torch.autograd.grad(parts, [x], [grad.cpu().double() for grad in grads])
    return result, result.sum((0, 1))


def run_heads_kernel(grads, cosine, sine, rotated):
    b, n, a, k = grads[0].shape
    out = torch.full((b * n, len(grads) * a * k), math.nan, dtype=grads[0].dtype)
    launches, partial = heads_launches([grad.contiguous() for grad in grads], cosine, sine, rotated, out)
    partial.fill_(math.nan)
    for launch in launches:
        launch.run()
    return out.view(b, n, -1), partial.sum(0)


def exact_gelu(grad, x):
    x = x.cpu().double().requires_grad_()
    (result,) = torch.autograd.grad(F.gelu(x), x, grad.cpu().double())
    return result, result.flatten(0, -2).sum(0)


def run_gelu_kernel(grad, x):
    out = torch.full_like(x, math.nan)
    launch = gelu_launch(grad.flatten(0, -2), x.flatten(0, -2), out.flatten(0, -2))
    launch.arguments["partial"].fill_(math.nan)
    launch.run()
    return out, launch.arguments["partial"].sum(0)


def assert_exact(results, expected, inputs_dtype):
    """Each result within a rounding of its dtype, and fp32 arithmetic, of the largest number."""
    for number, (result, best) in enumerate(zip(results, expected, strict=True)):
        assert result.shape == best.shape and result.isfinite().all(), f"{number}: not everything was written"
        allowed = (2 * torch.finfo(result.dtype).eps + 2e-5) * best.abs().max() + 1e-6
        error = (result.cpu().double() - best).abs().max()
        assert error <= allowed, f"{number}: error {error:.3g}, allowed {allowed:.3g} ({inputs_dtype})"
