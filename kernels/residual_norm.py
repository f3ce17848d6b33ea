"""Backward pass of what lies between two layers of a transformer block: a residual, and the norm that reads it.

    x' = x + gate (y + bias)
    h  = (x' - mean(x')) / sqrt(var(x') + eps) (one + scale) + shift    [DiT, arXiv:2212.09748, section 3.2]

Forward is left to Inductor, whose one kernel reads x, y and writes x', h. Its backward needs further passes for the
sums over tokens that are the gradients of gate, shift, scale and bias, since they run across the rows of the norm. Here
one pass computes the gradients of x and y, and these sums on the way (`python -m benchmarks.pass_report` counts both).

Shapes: x, y, h [b, n, d]; gate [b, d]; shift, scale [b, d], or [1, d] where all samples share them; bias [d]. `one` is
1 for a modulation and 0 for a norm with weights. Arithmetic is fp32, and the norm is that of x' as stored. The sums are
taken in two stages without atomics: the same input gives the same bits. On CUDA the op runs Triton, on a CPU plain
PyTorch.
"""

import torch
import triton
import triton.language as tl
from flperf_kernels.launching import Launch
from torch import Tensor

PROGRAMS = 1024  # about as many as fill a device
MAX_ROWS = 64  # of one program


@triton.jit(do_not_specialize=["steps", "rows"])
def backward_kernel(
    grad_out, grad_h, out, y, gate, scale, grad_x, grad_y, partial, rows, steps, width, one, eps, per_sample,
    NORM: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The gradients of `steps` rows of one sample, each padded to C columns, and their sums over these rows.

    With NORM, grad_x and the sums of those of shift and scale; else the gradient of x' is grad_out. With GATED, grad_y
    and the sum of gate's. The sum of the gradient of x' comes last. EVEN: no program has fewer rows.
    """
    b, column = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    inside = column < width
    gain_sum, shift_sum, scale_sum = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    total = tl.zeros([C], tl.float32)
    if NORM:
        factor = one + tl.load(scale + b * per_sample + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gain = tl.load(gate + b * width + column, mask=inside, other=0.0).to(tl.float32)
    for step in range(steps):
        row = tl.program_id(0) * steps + step
        here, mask = (b * rows + row) * width + column, inside if EVEN else inside & (row < rows)
        dx = tl.load(grad_out + here, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            dh = tl.load(grad_h + here, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(out + here, mask=mask, other=0.0).to(tl.float32)
            centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
            inverse = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
            standard = centred * inverse
            shift_sum += dh
            scale_sum += dh * standard
            dh *= factor
            dh -= tl.sum(dh, 0) / width + standard * (tl.sum(dh * standard, 0) / width)
            dx += inverse * dh
            tl.store(grad_x + here, dx.to(grad_x.dtype.element_ty), mask=mask)
        if GATED:
            gain_sum += dx * tl.load(y + here, mask=mask, other=0.0).to(tl.float32)
            tl.store(grad_y + here, (dx * gain).to(grad_y.dtype.element_ty), mask=mask)
        total += dx
    sums = partial + (b * tl.num_programs(0) + tl.program_id(0)) * (2 * NORM + GATED + 1) * width + column
    if NORM:
        tl.store(sums, shift_sum, mask=inside)
        tl.store(sums + width, scale_sum, mask=inside)
    if GATED:
        tl.store(sums + 2 * NORM * width, gain_sum, mask=inside)
    tl.store(sums + (2 * NORM + GATED) * width, total, mask=inside)


def backward_launch(
    grad_out: Tensor,
    grad_h: Tensor | None,
    out: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    one: float,
    eps: float,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
) -> Launch:
    """`backward_kernel`, which fills grad_x with a norm, grad_y with a gate, and its argument `partial` [b, programs,
    sums, d], allocated here: sums of the gradients of shift and scale, of gate, of x'."""
    b, n, d = grad_out.shape
    norm, gated = out is not None, gate is not None
    steps, columns = min(MAX_ROWS, max(1, b * n // PROGRAMS)), triton.next_power_of_2(d)
    programs = triton.cdiv(n, steps)
    partial = torch.empty(b, programs, 2 * norm + gated + 1, d, dtype=torch.float32, device=grad_out.device)
    tensors = dict(grad_out=grad_out, grad_h=grad_h, out=out, y=y, gate=gate, scale=scale, grad_x=grad_x, grad_y=grad_y)
    # A kernel without a norm or a gate does not touch these arguments.
    tensors = {name: grad_out if tensor is None else tensor for name, tensor in tensors.items()}
    per_sample = d if scale is not None and len(scale) > 1 else 0
    sizes = dict(rows=n, steps=steps, width=d, one=one, eps=eps, per_sample=per_sample)
    flags = dict(NORM=norm, GATED=gated, EVEN=n % steps == 0, C=columns)
    num_warps = min(16, max(4, columns * grad_out.itemsize // 512))  # 16 bytes a thread
    arguments = tensors | dict(partial=partial) | sizes | flags
    return Launch(backward_kernel, (programs, b), arguments, dict(num_warps=num_warps))


@torch.library.custom_op("flperf::residual_norm_backward", mutates_args=())
def residual_norm_backward(
    grad_out: Tensor,
    grad_h: Tensor | None,
    out: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    one: float,
    eps: float,
) -> list[Tensor]:
    """Gradients from those of x' and h, in this order:

    - with a norm (grad_h, out = x', scale): of x [b, n, d], shift, scale [b, d]
    - with a gate (y, gate): of y [b, n, d], gate [b, d]
    - of bias [b, d]

    Those [b, d] are fp32: the parts of each sample. Without a norm the gradient of x is grad_out; without a gate that
    of y is that of x.
    """
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    dx, results = grad_out.to(dtype), []
    stored = grad_out.dtype
    if out is not None:
        assert grad_h is not None and scale is not None
        x, dh = out.to(dtype), grad_h.to(dtype)
        centred = x - x.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        standard = centred * inverse
        sums = [dh.sum(1), (dh * standard).sum(1)]
        dh = dh * (one + scale[:, None].to(dtype))
        dx = dx + inverse * (dh - dh.mean(-1, keepdim=True) - standard * (dh * standard).mean(-1, keepdim=True))
        results += [dx.to(stored), *sums]
    total = dx.sum(1)
    if gate is not None:
        assert y is not None
        results += [(dx * gate[:, None].to(dtype)).to(stored), (dx * y.to(dtype)).sum(1)]
        total = total * gate.to(dtype)
    return [*results, total]


@residual_norm_backward.register_fake
def _(grad_out, grad_h, out, y, gate, scale, one, eps):
    dtype = torch.promote_types(grad_out.dtype, torch.float32)

    def full() -> Tensor:
        return grad_out.new_empty(grad_out.shape)

    def sums() -> Tensor:
        return grad_out.new_empty(grad_out.shape[::2], dtype=dtype)

    norm = [] if out is None else [full(), sums(), sums()]
    return [*norm, *([] if gate is None else [full(), sums()]), sums()]


@residual_norm_backward.register_kernel("cuda")
def on_cuda(grad_out, grad_h, out, y, gate, scale, one, eps):
    norm, gated = out is not None, gate is not None
    grad_h, out, y, gate, scale = (x if x is None else x.contiguous() for x in (grad_h, out, y, gate, scale))
    grad_out = grad_out.contiguous()
    grad_x, grad_y = (torch.empty_like(grad_out) if needed else None for needed in (norm, gated))
    if grad_out.numel():
        launch = backward_launch(grad_out, grad_h, out, y, gate, scale, one, eps, grad_x, grad_y)
        launch.run()
        # The second stage, in a fixed order. Results of an op must not share memory.
        sums = [part.sum(1) for part in launch.arguments["partial"].unbind(2)]
    else:
        sums = [grad_out.new_zeros(grad_out.shape[::2], dtype=torch.float32) for _ in range(2 * norm + gated + 1)]
    if gated:
        sums[-1] *= gate
    return [*([grad_x, *sums[:2]] if norm else []), *([grad_y, sums[-2]] if gated else []), sums[-1]]
