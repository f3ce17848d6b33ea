"""The gated residual of one branch of a DiT block together with the norm and modulation of the next, one pass each way.

    x' = x + gate y
    h  = (x' - mean(x')) / sqrt(var(x') + eps) (1 + scale) + shift    [DiT, arXiv:2212.09748, section 3.2]

Forward reads x, y and writes x', h, as Inductor's own kernel does. Backward reads the gradients of x' and h, and x',
y. It writes the gradients of x and y, and on the way sums those of gate, shift and scale over tokens. Inductor needs
further passes for these sums, since they run across the rows of the norm (`python -m benchmarks.norm_report` counts
both).

Shapes: x, y [b, n, d]; gate, shift, scale [b, d]. Arithmetic is fp32, and the norm is that of x' as stored. The sums
are taken in two stages without atomics: the same input gives the same bits. On CUDA the ops run Triton, on a CPU
plain PyTorch.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from flperf_kernels.launching import Launch
from torch import Tensor

PROGRAMS = 1024  # about as many as fill a device
MAX_ROWS = 64  # of one program


def residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x', h), each [b, n, d]. x, y: [b, n, d]; gate, shift, scale: [b, d]; all of one dtype and device. Raises
    ValueError otherwise."""
    return torch.ops.flperf.residual_modulate(x, y, gate, shift, scale, eps)


def reference(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, differentiated by autograd: (x', h), each [b, n, d] in the dtype of x, computed in fp32 or
    wider.

    x, y: [b, n, d]; gate, shift, scale: [b, d], of any dtypes.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    gate, shift, scale = (modulation[:, None].to(dtype) for modulation in (gate, shift, scale))
    summed = (x.to(dtype) + gate * y.to(dtype)).to(x.dtype)
    h = F.layer_norm(summed.to(dtype), summed.shape[-1:], eps=eps) * (1 + scale) + shift
    return summed, h.to(x.dtype)


@triton.jit
def _normalised(x, inside, width, eps):
    """x standardised over its row, and the factor 1 / sqrt(var(x) + eps)."""
    centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * factor, factor


@triton.jit(do_not_specialize=["steps", "rows"])
def forward_kernel(x, y, gate, shift, scale, out, h, rows, steps, width, eps, EVEN: tl.constexpr, C: tl.constexpr):
    """`steps` rows of one sample, each padded to C columns. EVEN: no program has fewer rows."""
    b, column = tl.program_id(1).to(tl.int64), tl.arange(0, C)
    inside = column < width
    gain = tl.load(gate + b * width + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + b * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 + tl.load(scale + b * width + column, mask=inside, other=0.0).to(tl.float32)
    for step in range(steps):
        row = tl.program_id(0) * steps + step
        here, mask = (b * rows + row) * width + column, inside if EVEN else inside & (row < rows)
        summed = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        summed += gain * tl.load(y + here, mask=mask, other=0.0).to(tl.float32)
        stored = summed.to(out.dtype.element_ty)
        tl.store(out + here, stored, mask=mask)
        standard, _ = _normalised(stored.to(tl.float32), inside, width, eps)
        tl.store(h + here, (standard * factor + offset).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps", "rows"])
def backward_kernel(
    grad_out, grad_h, out, y, gate, scale, grad_x, grad_y, partial, rows, steps, width, eps,
    EVEN: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The gradients of `steps` rows of one sample, and the sums of those of gate, shift and scale over these rows."""
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


def _launch(kernel, x: Tensor, tensors: dict[str, Tensor], eps: float) -> Launch:
    """One of the two kernels over the rows of x [b, n, d]."""
    b, n, d = x.shape
    steps, columns = _rows_per_program(x), triton.next_power_of_2(d)
    sizes = dict(rows=n, steps=steps, width=d, EVEN=n % steps == 0, C=columns)
    num_warps = min(16, max(4, columns * x.itemsize // 512))  # 16 bytes a thread
    return Launch(kernel, (triton.cdiv(n, steps), b), tensors | dict(eps=eps) | sizes, dict(num_warps=num_warps))


def _rows_per_program(x: Tensor) -> int:
    b, n, _ = x.shape
    return min(MAX_ROWS, max(1, b * n // PROGRAMS))


def forward_launch(x, y, gate, shift, scale, eps, out, h) -> Launch:
    """`forward_kernel`: x, y [b, n, d] and gate, shift, scale [b, d] to out (x') and h, [b, n, d] each."""
    return _launch(forward_kernel, x, dict(x=x, y=y, gate=gate, shift=shift, scale=scale, out=out, h=h), eps)


def backward_launch(grad_out, grad_h, out, y, gate, scale, eps, grad_x, grad_y) -> Launch:
    """`backward_kernel`, which fills grad_x, grad_y [b, n, d] and its argument `partial` [b, programs, 3, d], allocated
    here: sums of the gradients of gate, shift and scale."""
    b, n, d = out.shape
    programs = triton.cdiv(n, _rows_per_program(out))
    partial = torch.empty(b, programs, 3, d, dtype=torch.float32, device=out.device)
    inputs = dict(grad_out=grad_out, grad_h=grad_h, out=out, y=y, gate=gate, scale=scale)
    return _launch(backward_kernel, out, inputs | dict(grad_x=grad_x, grad_y=grad_y, partial=partial), eps)


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
        forward_launch(x, y, gate, shift, scale, eps, out, h).run()
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
    launch = backward_launch(grad_out, grad_h, out, y, gate, scale, eps, grad_x, grad_y)
    launch.run()
    sums = launch.arguments["partial"].sum(1).to(gate.dtype)  # the second stage, in a fixed order
    return [grad_x, grad_y, *(total.clone() for total in sums.unbind(1))]  # results of an op must not share memory


def _save(ctx, inputs, output) -> None:
    _, y, gate, _, scale, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale)


def _differentiate(ctx, grad_out, grad_h):
    out, y, gate, scale = ctx.saved_tensors
    return *torch.ops.flperf.residual_modulate_backward(grad_out, grad_h, out, y, gate, scale, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_save)
