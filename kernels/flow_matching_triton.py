"""Flow matching's Triton kernels, and how they are launched.

A sample is a matrix of rows. A program processes `steps` tiles [R, C] of one sample, one below the other: R rows
(tokens) of C columns (channels). If the arithmetic of all elements is the same and tensors are contiguous, the sample
is one run of numbers instead, cut into rows of C. A tile's first element is a 64-bit offset, the same for all
threads. Offsets inside a tile are 32-bit unless WIDE, which saves registers.

Shapes: b samples, n tokens, d channels. Arithmetic is fp32. The formula is in flow_matching.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from flperf_kernels.flow_matching_reference import LossArguments, NoiseArguments
from flperf_kernels.launching import Launch
from flperf_kernels.philox import draw_normals, draw_normals_one_by_one
from torch import Tensor

PROGRAMS = 1024  # about as many as fill a device

# ----------------------------------------------------------------------------------------------------------------------
# Device functions


@triton.jit
def _offset(stride_n, stride_d, WIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Offsets [R, C] inside a tile."""
    row, column = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    if WIDE:
        return row.to(tl.int64) * stride_n + column.to(tl.int64) * stride_d
    else:
        return row * stride_n + column * stride_d


@triton.jit
def _load(
    pointer, sample, row, stride_b, stride_n, stride_d, mask,
    WIDE: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The tile [R, C] that begins at a row, in fp32."""
    pointer += sample.to(tl.int64) * stride_b + row * stride_n + (tl.program_id(1) * C).to(tl.int64) * stride_d
    x = tl.load(pointer + _offset(stride_n, stride_d, WIDE, R, C), mask=mask, other=0.0)
    if FAST and x.dtype == tl.bfloat16:  # two instructions widen two numbers; the compiler would use three
        x = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=r,=r,r", [x], tl.int32, True, 2
        )
        x = x.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _channel_statistics(mean, std, width, STANDARDISE: tl.constexpr, C: tl.constexpr):
    """Scale and shift [1, C] such that (x - mean) / std = x scale + shift, which is one instruction.

    The rounding error is of the size of the latents' own rounding.
    """
    if STANDARDISE:
        column = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
        scale = 1.0 / tl.load(std + column, mask=column < width, other=1.0)
        return scale, -tl.load(mean + column, mask=column < width, other=0.0) * scale
    else:
        return 1.0, 0.0


@triton.jit
def _data(x, mask, width, eps, scale, shift, NORM: tl.constexpr, STANDARDISE: tl.constexpr):
    """normalise(x) scale + shift, [R, C]."""
    factor = 1.0
    if NORM == "l2":
        factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1, keep_dims=True)), eps, propagate_nan=tl.PropagateNan.ALL)
    elif NORM == "layer":
        x = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / width, 0.0)
        factor = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / width + eps)
    if STANDARDISE:
        return x * factor * scale + shift
    else:
        return x * (factor * scale)


@triton.jit
def _tile(step, steps, rows, width, total, MASK: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """First row and first element of a tile, and which of its elements exist [R, C]."""
    row = (tl.program_id(0).to(tl.int64) * steps + step) * R
    column = tl.program_id(1) * C
    element = row * width + column
    if MASK == "none":
        mask = tl.full([R, C], True, tl.int1)
    elif MASK == "flat":
        mask = _offset(width, 1, WIDE, R, C) < total - element
    else:
        mask = (tl.arange(0, R)[:, None] < rows - row) & (tl.arange(0, C)[None, :] < width - column)
    return row, element, mask


@triton.jit
def _noise(
    index, element, width, seed, variance,
    GROUPED: tl.constexpr, SMALL: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Noise of the tile [R, C] that begins at an element.

    GROUPED: rows begin at multiples of 4. SMALL: the index of a group of four elements fits 32 bits.
    """
    if GROUPED:
        first, inside = element // 4, _offset(width // 4, 1, WIDE, R, C // 4)
        group = first.to(tl.uint32) + inside.to(tl.uint32) if SMALL else first.to(tl.uint64) + inside.to(tl.uint64)
        return draw_normals(group, index, seed, variance, FAST)
    else:
        return draw_normals_one_by_one(element + _offset(width, 1, WIDE, R, C), index, seed, variance, FAST)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=["steps", "rows", "seed"])  # their values change no code
def noise_kernel(
    latents, tau, sample, mean, std, out, stride_b, stride_n, stride_d, steps, rows, width, total, seed: tl.int64, eps,
    NORM: tl.constexpr, STANDARDISE: tl.constexpr, GROUPED: tl.constexpr, SMALL: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out = (1 - tau) noise + tau data."""
    b = tl.program_id(2)
    index, t = tl.load(sample + b), tl.load(tau + b)
    scale, shift = _channel_statistics(mean, std, width, STANDARDISE, C)
    scale *= t
    shift *= t
    for step in range(steps):
        row, element, mask = _tile(step, steps, rows, width, total, MASK, WIDE, R, C)
        x = _load(latents, b, row, stride_b, stride_n, stride_d, mask, WIDE, FAST, R, C)
        x = _data(x, mask, width, eps, scale, shift, NORM, STANDARDISE)
        x += _noise(index, element, width, seed, (1.0 - t) * (1.0 - t), GROUPED, SMALL, WIDE, FAST, R, C)
        here = out + b.to(tl.int64) * total + element
        tl.store(here + _offset(width, 1, WIDE, R, C), x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps", "rows", "seed"])  # their values change no code
def loss_kernel(
    prediction, latents, sample, mean, std, weight, gradient, partial, prediction_b, prediction_n, prediction_d,
    stride_b, stride_n, stride_d, steps, rows, width, total, seed: tl.int64, eps, gain, gradient_gain,
    LOSS: tl.constexpr, NORM: tl.constexpr, STANDARDISE: tl.constexpr, GROUPED: tl.constexpr,
    SMALL: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """partial [b, programs] = gain weight sum(l(residual)), gradient = gradient_gain weight l'(residual), of the
    residual prediction - velocity."""
    b = tl.program_id(2)
    index = tl.load(sample + b)
    if weight is not None:
        gain *= tl.load(weight + b)
        gradient_gain *= tl.load(weight + b)
    scale, shift = _channel_statistics(mean, std, width, STANDARDISE, C)
    loss = tl.zeros([R, C // 4], tl.float32)
    for step in range(steps):
        row, element, mask = _tile(step, steps, rows, width, total, MASK, WIDE, R, C)
        residual = _load(prediction, b, row, prediction_b, prediction_n, prediction_d, mask, WIDE, FAST, R, C)
        x = _load(latents, b, row, stride_b, stride_n, stride_d, mask, WIDE, FAST, R, C)
        residual += _noise(index, element, width, seed, 1.0, GROUPED, SMALL, WIDE, FAST, R, C)
        residual -= _data(x, mask, width, eps, scale, shift, NORM, STANDARDISE)
        if LOSS == "mse":
            value, derivative = residual * residual, residual * (2.0 * gradient_gain)
        elif LOSS == "l1":
            value, derivative = (
                tl.abs(residual),
                tl.where(residual > 0, gradient_gain, tl.where(residual < 0, -gradient_gain, 0.0)),
            )
        else:
            clamped = tl.clamp(residual, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
            value, derivative = clamped * (residual - 0.5 * clamped), clamped * gradient_gain
        value = value if MASK == "none" else tl.where(mask, value, 0.0)
        # A thread holds four neighbours, so their sum needs no exchange, and the total a quarter of the registers.
        loss += tl.sum(value.reshape(R, C // 4, 4), 2)
        if gradient is not None:
            here = gradient + b.to(tl.int64) * total + element
            tl.store(here + _offset(width, 1, WIDE, R, C), derivative.to(gradient.dtype.element_ty), mask=mask)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + b.to(tl.int64) * tl.num_programs(0) * tl.num_programs(1) + tile, tl.sum(loss) * gain)


@triton.jit
def sum_kernel(values, out, count, BLOCK: tl.constexpr):
    """out [b] = the sum of each row of values [b, count]. The order is fixed: the same input gives the same bits."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(values + row * count + column, mask=column < count, other=0.0)
    tl.store(out + row, tl.sum(total))


@triton.jit
def scale_kernel(gradient, factor, factor_stride, gain, total, steps, BLOCK: tl.constexpr):
    """Multiply each sample's gradient by factor gain, in place. A product of one returns at once."""
    b = tl.program_id(1).to(tl.int64)
    scale = tl.load(factor + b * factor_stride) * gain
    if scale != 1.0:
        for step in range(steps):
            element = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(gradient + b * total + element, mask=element < total)
            tl.store(gradient + b * total + element, (x.to(tl.float32) * scale).to(x.dtype), mask=element < total)


# ----------------------------------------------------------------------------------------------------------------------
# Launches


@dataclass(frozen=True)
class Tiling:
    """How the programs divide b samples among them: each sample has `rows` of `width` elements and `total` elements."""

    batch: int
    rows: int
    width: int
    total: int
    flat: bool  # the sample is one run of numbers
    tile_rows: int
    tile_columns: int
    steps: int  # tiles of a program
    num_warps: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs down the rows, across the columns, and samples."""
        down = triton.cdiv(self.rows, self.tile_rows * self.steps)
        return down, triton.cdiv(self.width, self.tile_columns), self.batch

    @property
    def mask(self) -> str:
        """Which elements of a tile may not exist: "none", those beyond the end of the sample ("flat"), or those in rows
        or columns beyond the last ("rows")."""
        elements = self.total if self.flat else self.width
        if self.rows % (self.tile_rows * self.steps) == 0 and elements % self.tile_columns == 0:
            return "none"
        return "flat" if self.flat else "rows"

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """Elements of [b, n, d] from one sample, row and column to the next."""
        return (tensor.stride(0), self.width, 1) if self.flat else tensor.stride()

    def needs_wide_offsets(self, strided: tuple[Tensor, ...]) -> bool:
        """Whether offsets inside a tile of one of the tensors, or of a contiguous one, exceed 32 bits."""
        strides = [self.strides(tensor) for tensor in strided] + [(0, self.width, 1)]
        extents = [abs(row) * self.tile_rows + abs(column) * self.tile_columns for _, row, column in strides]
        return max(extents) >= 2**31


def choose_tiling(
    call: NoiseArguments | LossArguments, strided: tuple[Tensor, ...], elements_per_thread: int
) -> Tiling:
    """The tiling of a call; strided: the tensors [b, n, d] that its kernel reads with any strides."""
    b, n, d = call.latents.shape
    tile = 128 * elements_per_thread  # of four warps
    contiguous = all(tensor.stride(2) == 1 and tensor.stride(1) == d for tensor in strided)
    flat = contiguous and call.norm == "none" and call.mean is None
    rows, width = (triton.cdiv(n * d, tile), tile) if flat else (n, d)
    columns = tile if flat else _tile_columns(d, call.norm, tile)
    tile_rows = max(1, tile // columns)
    # The tiles of a program, up to 2^15 elements, share its setup.
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns) * b
    most_steps = max(1, min(2**15 // (tile_rows * columns), programs // PROGRAMS))
    return Tiling(
        batch=b,
        rows=rows,
        width=width,
        total=n * d,
        flat=flat,
        tile_rows=tile_rows,
        tile_columns=columns,
        steps=1 << most_steps.bit_length() - 1,  # a power of two
        num_warps=min(32, max(4, tile_rows * columns // (32 * elements_per_thread))),
    )


def _tile_columns(d: int, norm: str, tile: int) -> int:
    """Columns of a tile, a power of two. A norm reduces over a token, so the tile holds all of it. Otherwise a power
    of two that divides d wastes no columns, unless it is too small."""
    if norm != "none":
        return max(16, triton.next_power_of_2(d))
    divisor = d & -d  # the largest power of two that divides d
    return max(16, min(tile, divisor if divisor >= 64 else triton.next_power_of_2(d)))


def _shared_arguments(
    call: NoiseArguments | LossArguments, tiling: Tiling, strided: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Arguments of both kernels by parameter name."""
    stride_b, stride_n, stride_d = tiling.strides(call.latents)
    return dict(
        latents=call.latents, sample=call.sample, mean=call.mean, std=call.std, seed=call.seed, eps=call.eps,
        stride_b=stride_b, stride_n=stride_n, stride_d=stride_d,
        steps=tiling.steps, rows=tiling.rows, width=tiling.width, total=tiling.total,
        NORM=call.norm, STANDARDISE=call.mean is not None, GROUPED=tiling.width % 4 == 0, SMALL=tiling.total <= 2**34,
        MASK=tiling.mask, WIDE=tiling.needs_wide_offsets(strided), FAST=not call.latents.is_cpu,
        R=tiling.tile_rows, C=tiling.tile_columns,
    )  # fmt: skip


# A thread takes as many elements as leave its processor at least half occupied, whatever the specialisation.


def noise_launch(call: NoiseArguments, out: Tensor) -> Launch:
    """`noise_kernel`, which fills out [b, n, d]."""
    if call.norm != "none":
        per_thread = 8
    elif call.mean is not None or max(call.latents.itemsize, out.itemsize) > 2:
        per_thread = 16
    else:
        per_thread = 32
    strided = (call.latents,)
    tiling = choose_tiling(call, strided, per_thread)
    arguments = _shared_arguments(call, tiling, strided) | dict(tau=call.tau, out=out)
    return Launch(noise_kernel, tiling.grid, arguments, dict(num_warps=tiling.num_warps))


def loss_launch(call: LossArguments, gradient: Tensor | None, gain: float, gradient_gain: float) -> Launch:
    """`loss_kernel`, which fills gradient [b, n, d], unless that is None, and its argument `partial` [b, programs],
    which is allocated here."""
    strided = (call.prediction, call.latents)
    tiling = choose_tiling(call, strided, elements_per_thread=8)
    down, across, b = tiling.grid
    prediction_b, prediction_n, prediction_d = tiling.strides(call.prediction)
    arguments = _shared_arguments(call, tiling, strided) | dict(
        prediction=call.prediction, weight=call.weight, gradient=gradient,
        partial=torch.empty((b, down * across), dtype=torch.float32, device=call.latents.device),
        prediction_b=prediction_b, prediction_n=prediction_n, prediction_d=prediction_d,
        gain=gain, gradient_gain=gradient_gain, LOSS=call.loss,
    )  # fmt: skip
    return Launch(loss_kernel, tiling.grid, arguments, dict(num_warps=tiling.num_warps))


def sum_launch(values: Tensor, out: Tensor) -> Launch:
    """`sum_kernel`: values [b, count] to out [b]."""
    arguments = dict(values=values, out=out, count=values.shape[1], BLOCK=1024)
    return Launch(sum_kernel, (values.shape[0],), arguments, dict(num_warps=4))


def scale_launch(gradient: Tensor, factor: Tensor, gain: float) -> Launch:
    """`scale_kernel`: gradient [b, …] times factor gain, in place; factor is [b] or a scalar for all samples."""
    b, total, block, steps = gradient.shape[0], gradient[0].numel(), 2048, 8
    arguments = dict(gradient=gradient, factor=factor, factor_stride=factor.dim(), gain=gain)
    arguments |= dict(total=total, steps=steps, BLOCK=block)
    return Launch(scale_kernel, (triton.cdiv(total, block * steps), b), arguments, dict(num_warps=4))
