"""Attention, which encoders and heads share, in the layout that their projections leave: `b n a k`, so that no kernel has to transpose.

xFormers on CUDA, since it takes FlashAttention-3 where that is installed; PyTorch's own kernel elsewhere.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(k)) v for `b n a k` tensors: xFormers on CUDA, PyTorch's own kernel elsewhere (xFormers has none)."""
    if query.is_cuda:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value)
    query, key, value = (rearrange(x, "b n a k -> b a n k") for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b a n k -> b n a k")


def attention_operator(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """What `attention` runs for heads of this width, and what it could run but for a package that is missing."""
    if device.type != "cuda":
        return "PyTorch scaled_dot_product_attention"
    from xformers.ops import fmha

    query = torch.empty(1, 128, 1, width, dtype=dtype, device=device)
    operator = fmha.dispatch._dispatch_fw(fmha.Inputs(query, query, query), needs_gradient=True)
    # FlashAttention-3's authors measured it 1.5 to 2 times as fast as FlashAttention-2 on an H100 (arXiv:2407.08608).
    hopper_unused = torch.cuda.get_device_capability(device) == (9, 0) and operator is not fmha.flash3.FwOp
    advice = "; this GPU could run FlashAttention-3: install flash_attn_3" if hopper_unused else ""
    return f"xFormers {operator.NAME}{advice}"
