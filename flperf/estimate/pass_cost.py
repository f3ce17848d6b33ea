"""Counts the memory traffic and the peak memory of a pass over a batch, without computing it.

PyTorch's fake tensors propagate shapes through every operator as on a CPU. Attention on a CPU, like on a GPU, does not
write its n x n scores to memory; on the meta device it would.
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
    """Bytes. eager: traffic if every operator reads its inputs and writes its outputs. fused: traffic if the operators
    between two products (matrix products, attention) are one kernel, so that each operand of a product is written or
    read once more. peak: most memory in use, without weights and inputs."""

    eager: int
    fused: int
    peak: int


class MemoryCounter(TorchDispatchMode):
    """Adds up the bytes that operators in its context read and write, and tracks the memory that they allocate."""

    def __init__(self):
        super().__init__()
        self.traffic = self.products = self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        self.known.update(tensor.untyped_storage() for tensor in inputs)  # allocated before: weights, inputs
        if not func.is_view:
            traffic = sum(map(_bytes, inputs + outputs))
            self.traffic += traffic
            self.products += traffic if func.overloadpacket in UNFUSED else 0
        for tensor in outputs:
            self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, count: int) -> None:
        self.alive -= count

    def cost(self) -> PassCost:
        """The counts so far."""
        return PassCost(self.traffic, 2 * self.products, self.peak)


def encoding_cost(encoder: Encoder, geometry: LatentGeometry, mode: str, clips: int, dtype: torch.dtype) -> PassCost:
    """The cost of encoding `clips` clips at once. The encoder may be on the meta device; it is not usable
    afterwards."""
    frames = (geometry.context_frames + geometry.target_frames) * encoder.frames_per_latent
    with FakeTensorMode():
        _make_fake(encoder, dtype)
        video = torch.empty(clips, frames, *encoder.resolution, 3, dtype=torch.uint8)
        with MemoryCounter() as counter:
            encode_clip(encoder, video, geometry, mode)
    return counter.cost()


def training_cost(
    head: nn.Module, geometry: LatentGeometry, clips: int, dtype: torch.dtype, flow_matching: bool
) -> PassCost:
    """The cost of the forward and backward pass of `clips` clips at once. The gradient of a parameter is freed as soon
    as it is complete. The head may be on the meta device; it is not usable afterwards."""
    grid = (geometry.height, geometry.width, geometry.dim)
    with FakeTensorMode():
        _make_fake(head, dtype)
        for parameter in head.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        context = torch.empty(clips, geometry.context_frames, *grid, dtype=dtype)
        inputs = (
            [torch.empty(clips, geometry.target_frames, *grid, dtype=dtype), torch.empty(clips)]
            if flow_matching
            else []
        )
        with MemoryCounter() as counter:
            head(context, *inputs).float().square().mean().backward()
    return counter.cost()


def _make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace parameters by fake ones in `dtype`, and buffers by fake ones in their own. In place, because checkpointed
    forwards are bound to the module."""
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
    """Bytes of the memory of a tensor. An expanded tensor has less memory than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
