"""Attention, which encoders and heads share, in the layout that their projections leave: `b n a k`, so that no kernel
has to transpose.

On CUDA xFormers where it is the fastest, else PyTorch: on an H100 cuDNN's kernel, which PyTorch runs, took 0.58 to
0.72 of the time of FlashAttention-2 (benchmarks/test_attention.py), which is all that xFormers has there unless
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
    # For good (it is undone when `preferred` goes), not around each call: a graph that holds the change is compiled
    # anew at every start.
    preferred = sdpa_kernel(ORDER, set_priority=True)
    preferred.__enter__()


def _xformers_is_fastest() -> bool:
    """Asked once, before anything is traced."""
    if not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() < (9, 0) or find_spec("flash_attn_3") is not None


XFORMERS = _xformers_is_fastest()
if XFORMERS:
    # xFormers' wheel is linked with CUDA 12's runtime, and without it refuses all its operators. PyTorch brings that
    # of CUDA 13.
    runtime = next(file for file in files("nvidia-cuda-runtime-cu12") or [] if file.name == "libcudart.so.12")
    ctypes.CDLL(str(runtime.locate()))
    from xformers.ops import memory_efficient_attention


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
    """What `attention` runs for heads of this width."""
    if device.type != "cuda" or not _takes(width, dtype):
        return "PyTorch scaled_dot_product_attention" + (", cuDNN first" if device.type == "cuda" else "")
    from xformers.ops import fmha

    query = torch.empty(1, 128, 1, width, dtype=dtype, device=device)
    return f"xFormers {fmha.dispatch._dispatch_fw(fmha.Inputs(query, query, query), needs_gradient=True).NAME}"
