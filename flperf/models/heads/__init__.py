"""The table of heads by `model.head`. A new one is a file in this folder, built from `layers`, and a line in the
table."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flperf.config import Model
from flperf.errors import UserError
from flperf.models.activation_checkpointing import recompute_in_backward
from flperf.models.compile import compile_forward
from flperf.models.heads.cross_attention import CrossAttentionPredictor
from flperf.models.heads.dit import DiT
from flperf.models.heads.fused import Fusable
from flperf.models.heads.layers import Block, KeysValues
from flperf.models.heads.predictor import Predictor
from flperf.models.latents import LatentGeometry

HEADS = {"predictor": Predictor, "cross_attention": CrossAttentionPredictor, "dit": DiT}
REPEATED_NAMES = {Block: "block", KeysValues: "context projection"}
REPEATED = tuple(REPEATED_NAMES)  # each is compiled, checkpointed and, in ZeRO 3, gathered as a whole


def build_head(model: Model, geometry: LatentGeometry, *, seed: int, compile: bool) -> nn.Module:
    """A freshly initialised head in fp32 on the CPU. Its weights depend only on `seed`."""
    if model.head not in HEADS:
        raise UserError(f"model.head: {model.head!r} is unknown; known: {', '.join(HEADS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = HEADS[model.head](model, geometry)
    for module in head.modules():
        if isinstance(module, Fusable):
            module.fused = model.fused_kernels
    for kind in REPEATED:
        modules = [module for module in head.modules() if isinstance(module, kind)]
        for number, module in enumerate(modules, start=1):
            if model.activation_checkpointing != "none" and kind is Block:
                recompute_in_backward(module, model.activation_checkpointing)
            if compile:
                compile_forward(module, f"head {REPEATED_NAMES[kind]} {number}/{len(modules)}")
    return head


def use_initial_weights(head: nn.Module, file: str) -> None:
    """Copy the parameters in a safetensors file into a head, by name; the others stay. Raises `UserError` for those
    that don't fit."""
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.initial_weights: {file} can't be read as safetensors ({error})") from None
    parameters = dict(head.named_parameters())
    weights = {
        name.removeprefix("head."): tensor for name, tensor in stored.items() if not name.startswith("statistics.")
    }
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            here = list(parameters[name].shape) if name in parameters else "no such parameter"
            raise UserError(f"model.initial_weights: {file}: {name} is {list(tensor.shape)}; this head has {here}")
        parameters[name].data.copy_(tensor)
