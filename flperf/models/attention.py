"""Attention of encoders and heads, in the layout of their projections, `b n a k`, so that no kernel has to transpose.

On CUDA it runs xFormers where that is the fastest, else PyTorch. On an H100, cuDNN's kernel, which PyTorch runs, took
0.58 to 0.72 of the time of FlashAttention-2 (benchmarks/test_attention.py). xFormers has nothing better there unless
flash_attn_3 is installed.
"""

import ctypes
from importlib.metadata import files
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

if torch.cuda.is_available():
    # Entered once and never left, rather than around each call: a graph that contains the change is compiled again at
    # every start. The change would end with the object, hence the variable.
    preferred = sdpa_kernel(ORDER, set_priority=True)
    preferred.__enter__()


def _xformers_is_fastest() -> bool:
    """Whether xFormers' kernels are faster on this GPU. Called once, before anything is traced."""
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() < (9, 0) or find_spec("flash_attn_3") is not None


XFORMERS = _xformers_is_fastest()
if XFORMERS:
    # xFormers' wheel needs the runtime of CUDA 12, and without it disables all its operators. PyTorch comes with CUDA
    # 13's.
    runtime = next(file for file in files("nvidia-cuda-runtime-cu12") or [] if file.name == "libcudart.so.12")
    ctypes.CDLL(str(runtime.locate()))
    from xformers.ops import memory_efficient_attention


def split_heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """`b n (parts a k)` to `parts` views `b n a k`.

    The parts are split where they lie. Moving them to the front first would make the backward pass write their
    gradients part by part, and copy them back to the layout of the projection.
    """
    return rearrange(projected, "b n (parts a k) -> b n parts a k", parts=parts, a=num_heads).unbind(2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(k)) v for `b n a k` tensors."""
    if query.is_cuda and _takes(query.shape[-1], query.dtype):
        return memory_efficient_attention(query, key, value)
    query, key, value = (rearrange(x, "b n a k -> b a n k") for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(query, key, value), "b a n k -> b n a k")


def _takes(width: int, dtype: torch.dtype) -> bool:
    """Whether xFormers runs its fast kernels for such heads."""
    return XFORMERS and dtype != torch.float32 and width % 8 == 0


def attention_operator(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the operator that `attention` runs for heads of this width."""
    if device.type != "cuda" or not _takes(width, dtype):
        return "PyTorch scaled_dot_product_attention" + (", cuDNN first" if device.type == "cuda" else "")
    from xformers.ops import fmha

    query = torch.empty(1, 128, 1, width, dtype=dtype, device=device)
    return f"xFormers {fmha.dispatch._dispatch_fw(fmha.Inputs(query, query, query), needs_gradient=True).NAME}"
