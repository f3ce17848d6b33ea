"""Flow matching's two memory-bound steps, one pass each: noising the target latents, and the loss together with its
gradient.

    data  = (normalise(latents) - mean) / std     noise = philox_normal(sample, seed), see philox.py x_tau = (1 - tau)
    noise + tau data            velocity = data - noise     [Lipman et al., "Flow matching", 2023; noise at 0] loss  =
    mean over n, d of l(prediction - velocity),  l in mse | l1 | smooth_l1 (beta 1)

Noise and velocity never exist in memory: both kernels draw the same noise from its counter. The loss writes the
gradient of the prediction while it holds the residual, so the backward has only a scalar left to multiply by, and
that is usually one.

Shapes: b samples, n tokens, d channels. Arithmetic is fp32. On CUDA the ops run Triton, on a CPU the PyTorch code
they are tested against.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from flperf_kernels.launching import launch
from flperf_kernels.philox import draw_normals, draw_normals_one_by_one, philox_normal, signed_64
from torch import Tensor

NORMS, LOSSES, REDUCTIONS = ("none", "l2", "layer"), ("mse", "l1", "smooth_l1"), ("sample", "mean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------------------------
# interface


def flow_matching_noise(
    latents, tau, sample, *, seed, mean=None, std=None, norm="none", eps=1e-6, out_dtype=None
) -> Tensor:
    """x_tau [b, n, d], contiguous, in `out_dtype` (default: that of the latents). Not differentiable.

    latents [b, n, d] fp32 | bf16 | fp16 with any strides; tau fp32 [b]; sample int64 [b], the global index of each
    sample, unique in the run, which with `seed` determines its noise; `norm` divides each token by its L2 norm ("l2",
    at least eps) or standardises it over channels ("layer", eps under the root); then mean and std, fp32 [d],
    standardise each channel. Raises ValueError otherwise.
    """
    _refuse_gradient(latents=latents, tau=tau)
    out_dtype = out_dtype or latents.dtype
    return torch.ops.flperf.flow_matching_noise(latents, tau, sample, signed_64(seed), mean, std, norm, eps, out_dtype)


def flow_matching_loss(
    prediction,
    latents,
    sample,
    *,
    seed,
    loss="mse",
    mean=None,
    std=None,
    norm="none",
    eps=1e-6,
    weight=None,
    reduction="sample",
    scale=1.0,
) -> Tensor:
    """Loss of a predicted velocity [b, n, d], differentiable in the prediction only; arguments as in
    `flow_matching_noise`.

    reduction "sample": fp32 [b], for each sample scale * weight * mean over n, d of l(prediction - velocity).
    reduction "mean": the mean of those over b, an fp32 scalar. Either way the forward writes the gradient of the
    returned value, and the backward leaves it alone where the incoming gradient is 1: call backward on the "mean"
    itself, and put factors such as 1 / accumulation steps in `scale`. The stored gradient is scaled in place, so a
    second backward over the same graph raises.
    """
    _refuse_gradient(latents=latents, weight=weight)
    arguments = (signed_64(seed), loss, mean, std, norm, eps, weight, reduction, scale)
    return torch.ops.flperf.flow_matching_loss(prediction, latents, sample, *arguments)


def flow_matching_velocity(latents, sample, *, seed, mean=None, std=None, norm="none", eps=1e-6) -> Tensor:
    """The regression target data - noise, fp32 [b, n, d] (fp64 for fp64 latents), by the reference."""
    data = flow_matching_data(latents, mean, std, norm, eps)
    return data - _noise_like(data, sample, seed)


# ----------------------------------------------------------------------------------------------------------------
# reference


def flow_matching_data(latents: Tensor, mean: Tensor | None, std: Tensor | None, norm: str, eps: float) -> Tensor:
    """Latents [b, n, d] as the model sees them, in at least fp32."""
    data = latents.to(torch.promote_types(latents.dtype, torch.float32))
    if norm == "l2":
        data = F.normalize(data, dim=-1, eps=eps)
    elif norm == "layer":
        data = F.layer_norm(data, data.shape[-1:], eps=eps)
    return data if mean is None else (data - mean) / std


def _noise_like(data: Tensor, sample: Tensor, seed: int) -> Tensor:
    b, n, d = data.shape
    # The one line that chooses the CPU's generator; philox.py has the measurement.
    return philox_normal(sample, n * d, seed=seed).reshape(b, n, d).to(data.dtype)


def noise_reference(latents, tau, sample, seed, mean, std, norm, eps, out_dtype) -> Tensor:
    """`flow_matching_noise` in plain PyTorch: latents [b, n, d], tau [b] and sample int64 [b] to x_tau [b, n, d] in
    `out_dtype`."""
    data = flow_matching_data(latents, mean, std, norm, eps)
    return _noise_like(data, sample, seed).lerp_(data, tau.to(data.dtype)[:, None, None]).to(out_dtype)


def loss_reference(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale) -> Tensor:
    """`flow_matching_loss` as one would write it, for autograd to differentiate: [b], or a scalar for reduction
    "mean", in at least fp32.

    prediction and latents [b, n, d]; sample int64 [b]; weight [b] and mean, std [d], or None each.
    """
    velocity = flow_matching_velocity(latents, sample, seed=seed, mean=mean, std=std, norm=norm, eps=eps)
    pointwise = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[loss]
    per_sample = pointwise(prediction.to(velocity.dtype), velocity, reduction="none").mean((1, 2)) * scale
    per_sample = per_sample if weight is None else per_sample * weight
    return per_sample.mean() if reduction == "mean" else per_sample


def loss_and_derivative(residual: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """l and its derivative l' of each element of a residual of any shape, both of that shape and dtype; loss is one
    of LOSSES."""
    if loss == "mse":
        return residual.square(), 2.0 * residual
    if loss == "l1":
        return residual.abs(), residual.sign()
    clamped = residual.clamp(-1.0, 1.0)  # r^2 / 2 inside [-1, 1] and |r| - 1/2 outside are both c (r - c / 2)
    return clamped * (residual - 0.5 * clamped), clamped


# ------------------------------------------------------------------------------------------------------------------
# kernels A program works down `steps` tiles [R, C] of one sample: R rows (tokens), C columns (channels). Where every
# element is treated alike the sample is one run of numbers instead, cut into rows of C. Where a tile begins is 64-bit
# and the same for all threads; offsets inside it are 32-bit unless WIDE, which saves the registers that hold them.


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
    pointer,
    sample,
    row,
    stride_b,
    stride_n,
    stride_d,
    mask,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    pointer += sample.to(tl.int64) * stride_b + row * stride_n + (tl.program_id(1) * C).to(tl.int64) * stride_d
    x = tl.load(pointer + _offset(stride_n, stride_d, WIDE, R, C), mask=mask, other=0.0)
    if FAST and x.dtype == tl.bfloat16:  # the compiler takes three instructions to widen two numbers, this is two
        x = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }", "=r,=r,r", [x], tl.int32, True, 2
        )
        x = x.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _channel_statistics(mean, std, width, STANDARDISE: tl.constexpr, C: tl.constexpr):
    """(x - mean) / std as x scale + shift, [1, C]: one instruction. It rounds by what the latents' own rounding
    amounts to."""
    if STANDARDISE:
        column = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
        scale = 1.0 / tl.load(std + column, mask=column < width, other=1.0)
        return scale, -tl.load(mean + column, mask=column < width, other=0.0) * scale
    else:
        return 1.0, 0.0


@triton.jit
def _data(x, mask, width, eps, scale, shift, NORM: tl.constexpr, STANDARDISE: tl.constexpr):
    """normalise(x) scale + shift."""
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
    """Noise of the tile [R, C] that begins at an element. GROUPED: rows begin at multiples of 4; SMALL: groups fit 32
    bits."""
    if GROUPED:
        first, inside = element // 4, _offset(width // 4, 1, WIDE, R, C // 4)
        group = first.to(tl.uint32) + inside.to(tl.uint32) if SMALL else first.to(tl.uint64) + inside.to(tl.uint64)
        return draw_normals(group, index, seed, variance, FAST)
    else:
        return draw_normals_one_by_one(element + _offset(width, 1, WIDE, R, C), index, seed, variance, FAST)


@triton.jit(do_not_specialize=["steps", "rows", "seed"])  # their values change no code
def noise_kernel(
    latents, tau, sample, mean, std, out, stride_b, stride_n, stride_d, steps, rows, width, total, seed: tl.int64, eps,
    NORM: tl.constexpr, STANDARDISE: tl.constexpr, GROUPED: tl.constexpr, SMALL: tl.constexpr,
    MASK: tl.constexpr, WIDE: tl.constexpr,
    FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
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
        # four neighbours sit in one thread: a quarter of the registers, no exchange
        loss += tl.sum(value.reshape(R, C // 4, 4), 2)
        if gradient is not None:
            here = gradient + b.to(tl.int64) * total + element
            tl.store(here + _offset(width, 1, WIDE, R, C), derivative.to(gradient.dtype.element_ty), mask=mask)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + b.to(tl.int64) * tl.num_programs(0) * tl.num_programs(1) + tile, tl.sum(loss) * gain)


@triton.jit
def sum_kernel(values, out, count, BLOCK: tl.constexpr):
    """Second stage: a row of partial sums in a fixed order, so that the same input gives the same bits."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(values + row * count + column, mask=column < count, other=0.0)
    tl.store(out + row, tl.sum(total))


@triton.jit
def scale_kernel(gradient, factor, factor_stride, gain, total, steps, BLOCK: tl.constexpr):
    """Multiply each sample's gradient by its incoming scalar, or leave at once."""
    b = tl.program_id(1).to(tl.int64)
    scale = tl.load(factor + b * factor_stride) * gain
    if scale != 1.0:
        for step in range(steps):
            element = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(gradient + b * total + element, mask=element < total)
            tl.store(gradient + b * total + element, (x.to(tl.float32) * scale).to(x.dtype), mask=element < total)


# -------------------------------------------------------------------------------------------------------------------
# launch


def _tiling(latents: Tensor, strided: tuple[Tensor, ...], per_channel: bool, norm: str, per_thread: int):
    b, n, d = latents.shape
    flat = norm == "none" and not per_channel and all(t.stride(2) == 1 and t.stride(1) == d for t in strided)
    tile, power = 128 * per_thread, d & -d
    if flat:
        rows, width, c = triton.cdiv(n * d, tile), tile, tile
    else:  # a norm needs the whole token in one tile; otherwise the power of two in d fits the columns without waste
        rows, width, c = n, d, triton.next_power_of_2(d) if norm != "none" or power < 64 else power
        c = max(16, c if norm != "none" else min(c, tile))
    r, chunks = max(1, tile // c), triton.cdiv(width, c)
    # The tiles of up to 2^15 elements share a program's setup, as long as about a thousand programs are left, which
    # is what fills a device.
    programs = triton.cdiv(rows, r) * chunks * b
    steps = 1 << max(1, min(2**15 // (r * c), programs // 1024)).bit_length() - 1
    even = rows % (r * steps) == 0 and (n * d if flat else d) % c == 0
    strides = [(t.stride(0), width, 1) if flat else t.stride() for t in strided]
    extent = max(abs(stride_n) * r + abs(stride_d) * c for _, stride_n, stride_d in (*strides, (0, width, 1)))
    arguments = dict(steps=steps, rows=rows, width=width, total=n * d, NORM=norm, STANDARDISE=per_channel, R=r, C=c)
    arguments |= dict(
        GROUPED=flat or d % 4 == 0, SMALL=n * d <= 2**34, MASK="none" if even else "flat" if flat else "rows"
    )
    arguments |= dict(WIDE=extent >= 2**31, FAST=not latents.is_cpu)
    return (
        (triton.cdiv(rows, r * steps), chunks, b),
        arguments,
        strides,
        dict(num_warps=min(32, max(4, r * c // (32 * per_thread)))),
    )


# Elements a thread: as many as leave half of a processor's threads room for their registers, which the tests hold for
# every combination.


def noise_launch(latents, tau, sample, seed, mean, std, norm, eps, out):
    per_thread = 8 if norm != "none" else 16 if mean is not None or max(latents.itemsize, out.itemsize) > 2 else 32
    grid, arguments, [strides], options = _tiling(latents, (latents,), mean is not None, norm, per_thread)
    arguments |= dict(
        zip(("stride_b", "stride_n", "stride_d"), strides, strict=True),
        latents=latents,
        tau=tau,
        sample=sample,
        out=out,
    )
    return noise_kernel, grid, arguments | dict(mean=mean, std=std, seed=seed, eps=eps), options


def loss_launch(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, gradient, gain, gradient_gain):
    """The kernel fills `partial` [b, tiles], which it allocates, and `gradient` unless that is None."""
    grid, arguments, strides, options = _tiling(latents, (prediction, latents), mean is not None, norm, per_thread=8)
    names = ("prediction_b", "prediction_n", "prediction_d", "stride_b", "stride_n", "stride_d")
    arguments |= dict(
        zip(names, (*strides[0], *strides[1]), strict=True), prediction=prediction, latents=latents, sample=sample
    )
    partial = torch.empty((grid[2], grid[0] * grid[1]), dtype=torch.float32, device=latents.device)
    arguments |= dict(
        mean=mean, std=std, weight=weight, gradient=gradient, partial=partial, seed=seed, eps=eps, LOSS=loss
    )
    return loss_kernel, grid, arguments | dict(gain=gain, gradient_gain=gradient_gain), options


def sum_launch(values: Tensor, out: Tensor):
    return (
        sum_kernel,
        (values.shape[0],),
        dict(values=values, out=out, count=values.shape[1], BLOCK=1024),
        dict(num_warps=4),
    )


def scale_launch(gradient: Tensor, factor: Tensor, gain: float):
    b, total, block, steps = gradient.shape[0], gradient[0].numel(), 2048, 8
    # one for all, or one a sample
    arguments = dict(gradient=gradient, factor=factor, factor_stride=factor.dim(), gain=gain)
    grid = (triton.cdiv(total, block * steps), b)
    return scale_kernel, grid, arguments | dict(total=total, steps=steps, BLOCK=block), dict(num_warps=4)


# --------------------------------------------------------------------------------------------------------------
# registration


def _refuse_gradient(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"flow matching is differentiable in the prediction only, but {name} requires a gradient: detach it "
                "first"
            )


def _check(
    latents,
    sample,
    mean,
    std,
    norm,
    prediction=None,
    tau=None,
    weight=None,
    loss="mse",
    reduction="mean",
    out_dtype=torch.float32,
) -> None:
    """What every implementation relies on; the fake ones check it too, so compiled code fails while it is traced."""
    if latents.dim() != 3 or latents.dtype not in DTYPES:
        raise ValueError(f"latents must be [b, n, d] in {DTYPES}, got {list(latents.shape)} in {latents.dtype}")
    b, n, d = latents.shape
    float32, integers = (torch.float32,), (torch.int64,)
    expected = dict(prediction=(prediction, [b, n, d], DTYPES), sample=(sample, [b], integers), tau=(tau, [b], float32))
    expected |= dict(weight=(weight, [b], float32), mean=(mean, [d], float32), std=(std, [d], float32))
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is not None and (
            list(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != latents.device
        ):
            wanted = f"{shape} in {' or '.join(map(str, dtypes))} on {latents.device}"
            raise ValueError(f"{name} must be {wanted}, got {list(tensor.shape)} in {tensor.dtype} on {tensor.device}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together")
    choices = dict(
        norm=(norm, NORMS), loss=(loss, LOSSES), reduction=(reduction, REDUCTIONS), out_dtype=(out_dtype, DTYPES)
    )
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


# By schema and not by torch.library.custom_op, which turns torch.compile off inside its kernels: the CPU's noise is
# compiled.
library = torch.library.Library("flperf", "FRAGMENT")
PREPARATION = "SymInt seed, Tensor? mean, Tensor? std, str norm, float eps"
LOSS = (
    "Tensor prediction, Tensor latents, Tensor sample, SymInt seed, str loss, Tensor? mean, Tensor? std, "
    "str norm, float eps, "
)
LOSS += "Tensor? weight, str reduction, float scale"
library.define(
    f"flow_matching_noise(Tensor latents, Tensor tau, Tensor sample, {PREPARATION}, ScalarType out_dtype) -> Tensor"
)
library.define(f"flow_matching_loss({LOSS}) -> Tensor")
library.define(f"flow_matching_loss_and_gradient({LOSS}, bool with_gradient) -> (Tensor loss, Tensor gradient)")
library.define("scale_gradient_(Tensor(a!) gradient, Tensor factor, float gain) -> ()")


def _noise_fake(latents, tau, sample, seed, mean, std, norm, eps, out_dtype):
    _check(latents, sample, mean, std, norm, tau=tau, out_dtype=out_dtype)
    return torch.empty(latents.shape, dtype=out_dtype, device=latents.device)


def _noise_cpu(latents, tau, sample, seed, mean, std, norm, eps, out_dtype):
    _check(latents, sample, mean, std, norm, tau=tau, out_dtype=out_dtype)
    return noise_reference(latents, tau, sample, seed, mean, std, norm, eps, out_dtype)


def _noise_cuda(latents, tau, sample, seed, mean, std, norm, eps, out_dtype):
    out = _noise_fake(latents, tau, sample, seed, mean, std, norm, eps, out_dtype)
    if out.numel():
        launch(*noise_launch(latents, tau, sample, seed, mean, std, norm, eps, out))
    return out


def _gains(prediction: Tensor, reduction: str, scale: float) -> tuple[float, float, float]:
    """Factors of the loss, of the gradient that is stored and of the gradient in the backward.

    1 / (b n d) of an fp16 number would vanish, so fp16 gradients are stored without it and meet it, and the loss
    scale, in the backward.
    """
    b, n, d = prediction.shape
    gain = scale / max(1, n * d * (b if reduction == "mean" else 1))
    return (gain, 1.0, gain) if prediction.dtype == torch.float16 else (gain, gain, 1.0)


def _loss_fake(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale, with_gradient):
    _check(latents, sample, mean, std, norm, prediction, weight=weight, loss=loss, reduction=reduction)
    out = torch.empty(() if reduction == "mean" else latents.shape[:1], dtype=torch.float32, device=latents.device)
    return out, torch.empty(latents.shape if with_gradient else 0, dtype=prediction.dtype, device=latents.device)


def _loss_cpu(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale, with_gradient):
    out, gradient = _loss_fake(
        prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale, with_gradient
    )
    if prediction.numel() == 0:
        return out.fill_(torch.nan), gradient  # as PyTorch has it for the mean of nothing
    gain, gradient_gain, _ = _gains(prediction, reduction, scale)
    data = flow_matching_data(latents, mean, std, norm, eps)
    # in place: fresh memory costs a CPU more than arithmetic
    residual = _noise_like(data, sample, seed).add_(prediction).sub_(data)
    value, derivative = loss_and_derivative(residual, loss)
    weight = torch.ones_like(sample, dtype=torch.float32) if weight is None else weight
    per_sample = value.sum((1, 2)) * (weight * gain)
    if with_gradient:
        gradient.copy_(derivative.mul_((weight * gradient_gain)[:, None, None]))
    return per_sample.sum() if reduction == "mean" else per_sample, gradient


def _loss_cuda(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale, with_gradient):
    out, gradient = _loss_fake(
        prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, reduction, scale, with_gradient
    )
    if prediction.numel() == 0:
        return out.fill_(torch.nan), gradient
    written, gains = gradient if with_gradient else None, _gains(prediction, reduction, scale)[:2]
    kernel = loss_launch(prediction, latents, sample, seed, loss, mean, std, norm, eps, weight, written, *gains)
    launch(*kernel)
    per_sample = out if reduction == "sample" else torch.empty_like(sample, dtype=torch.float32)
    launch(*sum_launch(kernel[2]["partial"], per_sample))
    if reduction == "mean":
        launch(*sum_launch(per_sample[None], out))
    return out, gradient


def _scale_cpu(gradient, factor, gain):
    if (factor * gain != 1).any():
        gradient.mul_((factor * gain).reshape(-1, 1, 1))


def _scale_cuda(gradient, factor, gain):
    if gradient.numel():
        launch(*scale_launch(gradient, factor, gain))


class _Loss(torch.autograd.Function):
    """An op that returned the gradient beside the loss could not scale it in place: the caller might hold it."""

    @staticmethod
    def forward(ctx, prediction, *arguments):
        loss, gradient = torch.ops.flperf.flow_matching_loss_and_gradient(prediction, *arguments, True)
        ctx.save_for_backward(gradient)
        ctx.gain = _gains(prediction, reduction=arguments[-2], scale=arguments[-1])[2]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        torch.ops.flperf.scale_gradient_(gradient, grad_loss, ctx.gain)
        torch.autograd.graph.increment_version(gradient)  # a second backward must fail, not scale twice
        return gradient, *[None] * 11


def _loss_autograd(prediction, *arguments):
    if prediction.requires_grad and torch.is_grad_enabled():
        return _Loss.apply(prediction, *arguments)
    return _loss_value(prediction, *arguments)


def _loss_value(prediction, *arguments):
    return torch.ops.flperf.flow_matching_loss_and_gradient(prediction, *arguments, False)[0]


for _name, _cpu, _cuda, _fake in (
    ("flow_matching_noise", _noise_cpu, _noise_cuda, _noise_fake),
    ("flow_matching_loss_and_gradient", _loss_cpu, _loss_cuda, _loss_fake),
    ("scale_gradient_", _scale_cpu, _scale_cuda, lambda gradient, factor, gain: None),
):
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"flperf::{_name}", _fake, lib=library)
library.impl("flow_matching_loss", _loss_value, "CompositeExplicitAutograd")
library.impl("flow_matching_loss", _loss_autograd, "Autograd")
