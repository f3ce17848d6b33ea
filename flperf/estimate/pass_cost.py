"""What a pass over a batch moves and holds in memory, counted without computing it.

PyTorch's fake tensors run the shapes of every operator as on a CPU, whose attention, like the GPU's, never writes its
n x n scores down. (On the meta device attention is made of plain products, which do.)
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flperf.models.activation_checkpointing import KEPT
from flperf.models.encoder import Encoder, encode_clip
from flperf.models.latents import LatentGeometry

aten = torch.ops.aten
UNFUSED = KEPT | {
    aten.convolution,
    aten.convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


@dataclass(frozen=True)
class PassCost:
    """Bytes. eager: every operator reads its inputs and writes its outputs. fused: what stands between two products
    (matrix products, attention) is one kernel, so each operand of a product is written or read once more. peak: held
    at most, weights and inputs apart."""

    eager: int
    fused: int
    peak: int


class Memory(TorchDispatchMode):
    """Adds up what the operators that run under it read and write, and follows what is alive of what they make."""

    def __init__(self):
        super().__init__()
        self.moved = self.products = self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        self.known.update(tensor.untyped_storage() for tensor in inputs)  # made elsewhere: weights, inputs
        if not func.is_view:
            moved = sum(map(_bytes, inputs + outputs))
            self.moved += moved
            self.products += moved if func.overloadpacket in UNFUSED else 0
        for tensor in outputs:
            self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self.alive -= count

    def cost(self) -> PassCost:
        return PassCost(self.moved, 2 * self.products, self.peak)


def encoding_cost(encoder: Encoder, geometry: LatentGeometry, mode: str, clips: int, dtype: torch.dtype) -> PassCost:
    """Of encoding `clips` clips at once. The encoder may be on the meta device; it is not usable afterwards."""
    frames = (geometry.context_frames + geometry.target_frames) * encoder.frames_per_latent
    with FakeTensorMode():
        _imagine(encoder, dtype)
        video = torch.empty(clips, frames, *encoder.resolution, 3, dtype=torch.uint8)
        with Memory() as memory:
            encode_clip(encoder, video, geometry, mode)
    return memory.cost()


def training_cost(
    head: nn.Module, geometry: LatentGeometry, clips: int, dtype: torch.dtype, flow_matching: bool
) -> PassCost:
    """Of the forward and backward pass of `clips` clips at once, each gradient of a parameter leaving as soon as it
    is complete. The head may be on the meta device; it is not usable afterwards."""
    grid = (geometry.height, geometry.width, geometry.dim)
    with FakeTensorMode():
        _imagine(head, dtype)
        for parameter in head.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        context = torch.empty(clips, geometry.context_frames, *grid, dtype=dtype)
        inputs = (
            [torch.empty(clips, geometry.target_frames, *grid, dtype=dtype), torch.empty(clips)]
            if flow_matching
            else []
        )
        with Memory() as memory:
            head(context, *inputs).float().square().mean().backward()
    return memory.cost()


def _imagine(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace parameters by fake ones in `dtype`, buffers by fake ones of their own, in place: checkpointed forwards
    are bound to it."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(
                torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
            )
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of memory behind a tensor: an expanded one has less than it has elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
