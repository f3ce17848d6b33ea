"""The operations between the matrix products of a head's block, with backward passes in flperf's Triton kernels. They
are used on CUDA if `model.fused_kernels` is true.

The forward pass is the plain formula, which Inductor fuses well. It does not fuse the sums over tokens of a backward
pass: each is a pass of its own. A matrix product adds its bias, but the bias gets no gradient from it (`product`). That
gradient comes from the kernel of the layer that follows, which sums what it writes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from flperf_kernels.bias_gradients import gelu_backward, heads_backward
from flperf_kernels.residual_norm import residual_norm_backward
from torch import Tensor, nn
from torch.autograd import Function

from flperf.models.attention import split_heads
from flperf.models.heads.positions import rotate

Gradients = tuple[Tensor | None, ...]
Residual = tuple[Tensor, Tensor, Tensor | None]  # y `b n d` from `product`, the bias in it [d], and a gate `b 1 d`


class Fusable:
    """A layer that uses these functions."""

    fused = False  # model.fused_kernels

    def fuses(self, x: Tensor) -> bool:
        """Autocast mixes dtypes, which the kernels do not take."""
        return self.fused and x.is_cuda and not torch.is_autocast_enabled("cuda")


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's output, from which no gradient reaches the bias."""
    return F.linear(x, layer.weight, layer.bias.detach())


class GELU(Function):
    """GELU of x `b n d`, a `product` with this bias [d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        return gelu_backward(grad, *ctx.saved_tensors)


class Heads(Function):
    """A `product` with this bias, `b n (parts a k)`, in parts `b n a k`, the first `rotated` of which are rotated. The
    tables, fp32 [n, 1, k/2], are None where positions are not rotary."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        bias: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        parts: int,
        rotated: int,
        num_heads: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cosine, sine)
        ctx.rotated = rotated
        rotary = None if cosine is None or sine is None else (cosine, sine)
        split = split_heads(projected, parts, num_heads)
        return (*(rotate(part, rotary) for part in split[:rotated]), *split[rotated:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        return (*heads_backward(list(grads), *ctx.saved_tensors, ctx.rotated), None, None, None, None, None)


class ResidualNorm(Function):
    """x' = x + gate * y, and its norm h: times 1 + scale, plus shift, `b 1 d` each, if `one` is 1; with shift and scale
    [d] as bias and weight of the norm if it is 0. x, y: `b n d`. Without y, x' is x; without a gate, the gate is 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        one: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        out = x.view_as(x) if y is None else x + (y if gate is None else gate * y)
        if one:
            h = F.layer_norm(out, out.shape[-1:], eps=eps) * (1 + scale) + shift
        else:
            h = F.layer_norm(out, out.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x if y is None else out, y if gate is not None else None, gate, scale)
        ctx.has_residual, ctx.one, ctx.eps = y is not None, one, eps
        return out, h

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_h: Tensor) -> Gradients:
        out, y, gate, scale = ctx.saved_tensors
        rows = rearrange(scale, "b 1 d -> b d") if ctx.one else scale[None]
        gates = None if gate is None else gate.squeeze(1)
        dx, shifts, scales, *others, bias = residual_norm_backward(
            grad_out, grad_h, out, y, gates, rows, ctx.one, ctx.eps
        )
        shift, scale = (_like(scale, sums) for sums in (shifts, scales))
        if not ctx.has_residual:
            return dx, None, None, None, shift, scale, None, None
        dy, gate = (others[0], _like(gate, others[1])) if gate is not None else (dx, None)
        return dx, dy, bias.sum(0).to(dx.dtype), gate, shift, scale, None, None


class AddResidual(Function):
    """x + gate * y, as in `ResidualNorm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if gate is None else y, gate)
        return x + (y if gate is None else gate * y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        y, gate = ctx.saved_tensors
        if gate is None:
            return grad, grad, grad.sum((0, 1)), None
        dy, gates, bias = residual_norm_backward(grad, None, None, y, gate.squeeze(1), None, 0.0, 0.0)
        return grad, dy, bias.sum(0).to(grad.dtype), _like(gate, gates)


def _like(parameter: Tensor, sums: Tensor) -> Tensor:
    """The sums of each sample [b, d] as the gradient of `b 1 d`, or of [d], which all samples share."""
    return (sums[:, None] if parameter.dim() == 3 else sums.sum(0)).to(parameter.dtype)
