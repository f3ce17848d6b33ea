"""Parameters and floating-point operations of encoder and head, counted without weights or data."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flperf.models.encoder import Encoder
from flperf.models.latents import LatentGeometry


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(module: nn.Module, *shapes: tuple[int, ...]) -> int:
    """Floating-point operations of one forward pass on inputs of these shapes, counted on the meta device. A
    multiply-add counts as two."""
    tensors = (*module.parameters(), *module.buffers())
    twin = copy.deepcopy(module, memo={id(tensor): tensor.detach().to("meta", torch.float32) for tensor in tensors})
    for submodule in twin.modules():
        vars(submodule).pop("forward", None)  # compiled or checkpointed forwards are bound to the original
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops()


def encoder_flops(encoder: Encoder, geometry: LatentGeometry, mode: str) -> int:
    """Forward FLOPs of encoding one clip."""
    frames = (
        [geometry.context_frames, geometry.target_frames]
        if mode == "split"
        else [geometry.context_frames + geometry.target_frames]
    )
    return sum(
        count_flops(encoder.backbone, (1, count * encoder.frames_per_latent, 3, *encoder.resolution))
        for count in frames
    )


def head_flops(head: nn.Module, geometry: LatentGeometry, flow_matching: bool) -> int:
    """Forward FLOPs of one clip. Training costs three times that, since each product has two in the backward pass."""
    context = (1, geometry.context_frames, geometry.height, geometry.width, geometry.dim)
    target = (1, geometry.target_frames, geometry.height, geometry.width, geometry.dim)
    return count_flops(head, context, *([target, (1,)] if flow_matching else []))
