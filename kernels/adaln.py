"""What stands between two layers of a DiT block, one pass each way: the gated residual of one branch, the norm and
modulation of the next.

    x' = x + gate y        h = (x' - mean(x')) / sqrt(var(x') + eps) (1 + scale) + shift        [DiT,
    arXiv:2212.09748, section 3.2]

Forward reads x, y and writes x', h, as Inductor's own kernel does. Backward reads the gradients of x' and h, and x',
y, writes those of x and y, and sums those of gate, shift and scale over tokens on the way; Inductor takes these sums,
which run across the rows of the norm, in passes of their own (`python -m benchmarks.norm_report` counts both).

Shapes: x, y [b, n, d]; gate, shift, scale [b, d]. Arithmetic is fp32, and the norm is that of x' as it is stored. The
sums are taken in two stages without atomics: the same input gives the same bits. On CUDA the ops run Triton, on a CPU
plain PyTorch.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from flperf_kernels.launching import launch
from torch import Tensor

PROGRAMS = 1024  # about what fills a device; each then takes the rows that are its share
MAX_ROWS = 64


def residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x', h), each [b, n, d]. x, y: [b, n, d]; gate, shift, scale: [b, d]; all in one dtype. Raises ValueError
    otherwise."""
    return torch.ops.flperf.residual_modulate(x, y, gate, shift, scale, eps)


def reference(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As one would write it, for autograd to differentiate: (x', h), each [b, n, d] in the dtype of x, computed in at
    least fp32.

    x, y: [b, n, d]; gate, shift, scale: [b, d], of any dtypes.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate, shift, scale = (modulation[:, None].to(dtype) for modulation in (gate, shift, scale))
    summed = (x.to(dtype) + gate * y.to(dtype)).to(x.dtype)
    h = F.layer_norm(summed.to(dtype), summed.shape[-1:], eps=eps) * (1 + scale) + shift
    return summed, h.to(x.dtype)


@triton.jit
def _normalised(x, inside, width, eps):
    """x standardised over its row, and the factor that did it."""
    centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * factor, factor


@triton.jit(do_not_specialize=["steps", "rows"])
def forward_kernel(x, y, gate, shift, scale, out, h, rows, steps, width, eps, EVEN: tl.constexpr, C: tl.constexpr):
    b, column = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    inside = column < width
    gain = tl.load(gate + b * width + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + b * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + b * width + column, mask=inside, other=0.0).to(tl.float32)
    for step in range(steps):
        row = tl.program_id(0) * steps + step
        here, mask = (b * rows + row) * width + column, inside if EVEN else inside & (row < rows)
        summed = tl.load(x + here, mask=mask, other=0.0).to(tl.float32) + gain * tl.load(
            y + here, mask=mask, other=0.0
        ).to(tl.float32)
        stored = summed.to(out.dtype.element_ty)
        tl.store(out + here, stored, mask=mask)
        standard, _ = _normalised(stored.to(tl.float32), inside, width, eps)
        tl.store(h + here, (standard * factor + offset).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps", "rows"])
def backward_kernel(
    grad_out, grad_h, out, y, gate, scale, grad_x, grad_y, partial, rows, steps, width, eps,
    EVEN: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    b, column = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    inside = column < width
    gain = tl.load(gate + b * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + b * width + column, mask=inside, other=0.0).to(tl.float32)
    gate_sum, shift_sum, scale_sum = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for step in range(steps):
        row = tl.program_id(0) * steps + step
        here, mask = (b * rows + row) * width + column, inside if EVEN else inside & (row < rows)
        dh = tl.load(grad_h + here, mask=mask, other=0.0).to(tl.float32)
        standard, inverse = _normalised(tl.load(out + here, mask=mask, other=0.0).to(tl.float32), inside, width, eps)
        shift_sum += dh
        scale_sum += dh * standard
        dh *= factor
        dh -= tl.sum(dh, 0) / width + standard * (tl.sum(dh * standard, 0) / width)
        dx = tl.load(grad_out + here, mask=mask, other=0.0).to(tl.float32) + inverse * dh
        gate_sum += dx * tl.load(y + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + here, dx.to(grad_x.dtype.element_ty), mask=mask)
        tl.store(grad_y + here, (dx * gain).to(grad_y.dtype.element_ty), mask=mask)
    first = partial + (b * tl.num_programs(0) + tl.program_id(0)) * 3 * width + column
    tl.store(first, gate_sum, mask=inside)
    tl.store(first + width, shift_sum, mask=inside)
    tl.store(first + 2 * width, scale_sum, mask=inside)


def _tiling(x: Tensor) -> tuple[int, dict, dict]:
    """Programs a sample, the kernel's sizes, launch options."""
    b, n, d = x.shape
    steps = min(MAX_ROWS, max(1, b * n // PROGRAMS))
    columns = triton.next_power_of_2(d)
    sizes = dict(rows=n, steps=steps, width=d, EVEN=n % steps == 0, C=columns)
    # 16 bytes a thread
    return triton.cdiv(n, steps), sizes, dict(num_warps=min(16, max(4, columns * x.itemsize // 512)))


def forward_launch(x, y, gate, shift, scale, eps, out, h):
    programs, sizes, options = _tiling(x)
    return (
        forward_kernel,
        (programs, len(x)),
        dict(x=x, y=y, gate=gate, shift=shift, scale=scale, out=out, h=h, eps=eps) | sizes,
        options,
    )


def backward_launch(grad_out, grad_h, out, y, gate, scale, eps, grad_x, grad_y):
    """The kernel fills grad_x, grad_y and `partial` [b, programs, (gate, shift, scale), d], which it allocates."""
    programs, sizes, options = _tiling(out)
    partial = torch.empty(len(out), programs, 3, out.shape[-1], dtype=torch.float32, device=out.device)
    tensors = dict(
        grad_out=grad_out,
        grad_h=grad_h,
        out=out,
        y=y,
        gate=gate,
        scale=scale,
        grad_x=grad_x,
        grad_y=grad_y,
        partial=partial,
    )
    return backward_kernel, (programs, len(out)), tensors | dict(eps=eps) | sizes, options


def _check(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [b, n, d], got {list(x.shape)}")
    b, _, d = x.shape
    for name, tensor, shape in (
        ("y", y, list(x.shape)),
        ("gate", gate, [b, d]),
        ("shift", shift, [b, d]),
        ("scale", scale, [b, d]),
    ):
        if list(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            found = f"{list(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} must be {shape} in {x.dtype} on {x.device}, got {found}")


@torch.library.custom_op("flperf::residual_modulate", mutates_args=())
def _forward(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, y, gate, shift, scale)
    return reference(x, y, gate, shift, scale, eps)


@_forward.register_fake
def _(x, y, gate, shift, scale, eps):
    _check(x, y, gate, shift, scale)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_forward.register_kernel("cuda")
def _(x, y, gate, shift, scale, eps):
    _check(x, y, gate, shift, scale)
    out, h = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel():
        x, y, gate, shift, scale = (tensor.contiguous() for tensor in (x, y, gate, shift, scale))
        launch(*forward_launch(x, y, gate, shift, scale, eps, out, h))
    return out, h


@torch.library.custom_op("flperf::residual_modulate_backward", mutates_args=())
def _backward(
    grad_out: Tensor, grad_h: Tensor, out: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> list[Tensor]:
    """Gradients of x, y [b, n, d] and of gate, shift, scale [b, d]."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    dout, dh, x, branch = (tensor.to(dtype) for tensor in (grad_out, grad_h, out, y))
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    standard = centred * inverse
    sums = [dh.sum(1), (dh * standard).sum(1)]
    dh = dh * (1 + scale[:, None].to(dtype))
    dx = dout + inverse * (dh - dh.mean(-1, keepdim=True) - standard * (dh * standard).mean(-1, keepdim=True))
    results = [dx, dx * gate[:, None].to(dtype), (dx * branch).sum(1), *sums]
    return [result.to(out.dtype) for result in results]


@_backward.register_fake
def _(grad_out, grad_h, out, y, gate, scale, eps):
    return [out.new_empty(out.shape), out.new_empty(out.shape), *(gate.new_empty(gate.shape) for _ in range(3))]


@_backward.register_kernel("cuda")
def _(grad_out, grad_h, out, y, gate, scale, eps):
    grad_x, grad_y = out.new_empty(out.shape), out.new_empty(out.shape)
    grad_out, grad_h, out, y, gate, scale = (tensor.contiguous() for tensor in (grad_out, grad_h, out, y, gate, scale))
    if not out.numel():
        return [grad_x, grad_y, *(torch.zeros_like(gate) for _ in range(3))]
    kernel = backward_launch(grad_out, grad_h, out, y, gate, scale, eps, grad_x, grad_y)
    launch(*kernel)
    sums = kernel[2]["partial"].sum(1).to(gate.dtype)  # second stage, in a fixed order
    return [grad_x, grad_y, *(total.clone() for total in sums.unbind(1))]  # an op's results must not share memory


def _save(ctx, inputs, output) -> None:
    _, y, gate, _, scale, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale)


def _differentiate(ctx, grad_out, grad_h):
    out, y, gate, scale = ctx.saved_tensors
    return *torch.ops.flperf.residual_modulate_backward(grad_out, grad_h, out, y, gate, scale, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_save)
