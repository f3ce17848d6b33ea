"""Backward passes that end at a product with a bias. The bias's gradient is the sum over rows of the gradient that the
product receives. Both are computed in one pass, where Inductor reads the written gradient again to sum it.

- `gelu_backward`: of GELU, exact (with erf)
- `heads_backward`: of splitting queries, keys and values into heads and rotating them

Each sum has two stages without atomics: the same input gives the same bits. Arithmetic is fp32. On CUDA the ops run
Triton, on a CPU plain PyTorch.
"""

import math

import torch
import triton
import triton.language as tl
from flperf_kernels.launching import Launch
from torch import Tensor

PROGRAMS = 1024  # about as many as fill a device
TILE = 2048  # elements that a program reads at a time: 8 for each thread of 8 warps
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY_AT_ZERO = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit(do_not_specialize=["steps", "rows"])
def gelu_kernel(grad, x, out, partial, rows, steps, width, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """grad * GELU'(x) of `steps` tiles of R rows and C columns, and its sums over these rows. EVEN: no tile is cut."""
    column = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
    total = tl.zeros([R, C], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * R + tl.arange(0, R)[:, None]
        here, mask = row * width + column, (column < width) if EVEN else (column < width) & (row < rows)
        value = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        slope = 0.5 + 0.5 * tl.erf(value * SQRT_HALF) + value * tl.exp(-0.5 * value * value) * DENSITY_AT_ZERO
        result = tl.load(grad + here, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(out + here, result.to(out.dtype.element_ty), mask=mask)
        total += result
    column = tl.program_id(1) * C + tl.arange(0, C)
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + column, tl.sum(total, 0), mask=column < width)


@triton.jit(do_not_specialize=["steps", "rows", "tokens"])
def heads_kernel(
    grad, cosine, sine, out, partial, rows, steps, tokens, width, stride,
    HALF: tl.constexpr, ROTATED: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`steps` tiles of R rows of grad [rows, width] to rows of out, `stride` apart, rotated back if ROTATED, and their
    sums. Column c of a tile is the pair c % HALF of head c // HALF. EVEN: no tile is cut."""
    pair = tl.arange(0, C)
    first = (pair // HALF * (2 * HALF) + pair % HALF)[None, :]
    first_sum, second_sum = tl.zeros([R, C], tl.float32), tl.zeros([R, C], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * R + tl.arange(0, R)[:, None]
        mask = (first < width) if EVEN else (first < width) & (row < rows)
        a = tl.load(grad + row * width + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(grad + row * width + first + HALF, mask=mask, other=0.0).to(tl.float32)
        if ROTATED:
            angle = row % tokens * HALF + (pair % HALF)[None, :]
            c, s = tl.load(cosine + angle, mask=mask, other=0.0), tl.load(sine + angle, mask=mask, other=0.0)
            a, b = a * c + b * s, b * c - a * s
        tl.store(out + row * stride + first, a.to(out.dtype.element_ty), mask=mask)
        tl.store(out + row * stride + first + HALF, b.to(out.dtype.element_ty), mask=mask)
        first_sum += a
        second_sum += b
    first = pair // HALF * (2 * HALF) + pair % HALF
    sums = partial + tl.program_id(0).to(tl.int64) * stride + first
    tl.store(sums, tl.sum(first_sum, 0), mask=first < width)
    tl.store(sums + HALF, tl.sum(second_sum, 0), mask=first < width)


def _tiles(rows: int, columns: int, blocks: int) -> tuple[dict[str, int], int]:
    """Sizes of tiles of `columns` columns, `blocks` of which make a row, and the number of programs that share the
    rows."""
    high = max(1, TILE // columns)
    steps = triton.cdiv(rows, high * max(1, PROGRAMS // blocks))
    sizes = dict(rows=rows, steps=steps, EVEN=rows % (high * steps) == 0, R=high, C=columns)
    return sizes, triton.cdiv(rows, high * steps)


def _warps(sizes: dict[str, int]) -> dict[str, int]:
    return dict(num_warps=min(16, max(4, sizes["R"] * sizes["C"] // 256)))


def gelu_launch(grad: Tensor, x: Tensor, out: Tensor) -> Launch:
    """`gelu_kernel` on [rows, width], which fills out and its argument `partial` [programs, width], allocated here."""
    rows, width = x.shape
    columns = min(1024, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, columns)
    sizes, programs = _tiles(rows, columns, blocks)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    arguments = dict(grad=grad, x=x, out=out, partial=partial, width=width) | sizes
    return Launch(gelu_kernel, (programs, blocks), arguments, _warps(sizes))


def heads_launches(
    grads: list[Tensor], cosine: Tensor | None, sine: Tensor | None, rotated: int, out: Tensor
) -> tuple[list[Launch], Tensor]:
    """A launch of `heads_kernel` for each part `b n a k`, which fills its columns of out [b n, parts a k], and those of
    the sums [programs, parts a k], allocated here."""
    b, n, a, k = grads[0].shape
    width, stride = a * k, out.shape[1]
    sizes, programs = _tiles(b * n, triton.next_power_of_2(width // 2), 1)
    partial = torch.empty(programs, stride, dtype=torch.float32, device=out.device)
    launches = []
    for part, grad in enumerate(grads):
        turned = cosine is not None and part < rotated
        table = dict(cosine=cosine, sine=sine) if turned else dict(cosine=grad, sine=grad)
        columns = slice(part * width, (part + 1) * width)
        tensors = dict(grad=grad, out=out[:, columns], partial=partial[:, columns]) | table
        shape = dict(tokens=n, width=width, stride=stride, HALF=k // 2, ROTATED=turned)
        launches.append(Launch(heads_kernel, (programs,), tensors | shape | sizes, _warps(sizes)))
    return launches, partial


@torch.library.custom_op("flperf::gelu_backward", mutates_args=())
def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """grad * GELU'(x), of the shape of x [..., d], and its sum over all but the last dimension, [d]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    result = torch.ops.aten.gelu_backward(grad.to(dtype), x.to(dtype))
    return result.to(x.dtype), result.flatten(0, -2).sum(0).to(x.dtype)


@gelu_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:])


@gelu_backward.register_kernel("cuda")
def gelu_on_cuda(grad, x):
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out, x.new_zeros(x.shape[-1:])
    launch = gelu_launch(*(tensor.flatten(0, -2) for tensor in (grad, x, out)))
    launch.run()
    return out, launch.arguments["partial"].sum(0).to(x.dtype)  # the second stage, in a fixed order


@torch.library.custom_op("flperf::heads_backward", mutates_args=())
def heads_backward(
    grads: list[Tensor], cosine: Tensor | None, sine: Tensor | None, rotated: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the parts of a projection, `b n a k` each, to that of the projection `b n (parts a k)` and its sum
    over b and n. The first `rotated` parts were rotated by cosine and sine, fp32 [n, 1, k/2], if there are any."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    results = [grad.to(dtype) for grad in grads]
    if cosine is not None:
        for part in range(rotated):
            first, second = results[part].chunk(2, dim=-1)
            results[part] = torch.cat([first * cosine + second * sine, second * cosine - first * sine], dim=-1)
    result = torch.stack(results, dim=2).flatten(2)
    return result.to(grads[0].dtype), result.sum((0, 1)).to(grads[0].dtype)


@heads_backward.register_fake
def _(grads, cosine, sine, rotated):
    b, n, a, k = grads[0].shape
    return grads[0].new_empty(b, n, len(grads) * a * k), grads[0].new_empty(len(grads) * a * k)


@heads_backward.register_kernel("cuda")
def heads_on_cuda(grads, cosine, sine, rotated):
    b, n, a, k = grads[0].shape
    out = grads[0].new_empty(b, n, len(grads) * a * k)
    if not out.numel():
        return out, out.new_zeros(out.shape[-1])
    contiguous = [grad.contiguous() for grad in grads]
    launches, partial = heads_launches(contiguous, cosine, sine, rotated, out.flatten(0, 1))
    for launch in launches:
        launch.run()
    return out, partial.sum(0).to(out.dtype)  # the second stage, in a fixed order
