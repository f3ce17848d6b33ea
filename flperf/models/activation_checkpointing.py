"""Activation checkpointing: what a block keeps of its forward pass; the backward pass computes the rest again.

`selective` keeps the results of matrix products and attention, which are costly. Norms, modulation, activations and
rotation are computed again, but no products. `full` keeps only the block's inputs and repeats its whole forward pass.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    *(
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
    ),
    # xFormers runs these where it has no kernel of its own.
    *(aten._flash_attention_forward, aten._efficient_attention_forward),
}
KEPT = PRODUCTS | ATTENTION
XFORMERS = ("xformers_flash", "xformers_flash3")  # namespaces of its operators


def recompute_in_backward(block: nn.Module, mode: str) -> None:
    """Wrap the block's forward; `mode` is `selective` or `full`. If the block is compiled afterwards, recomputation is
    fused into the backward graph."""
    forward, checkpointed_by = block.forward, {"selective": _keeping_products, "full": _keeping_inputs}[mode]

    def checkpointed(*inputs):
        return checkpointed_by(forward, *inputs) if torch.is_grad_enabled() else forward(*inputs)

    block.forward = checkpointed


def _policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    costly = operator.overloadpacket in KEPT or operator.namespace in XFORMERS
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_inputs = partial(checkpoint, use_reentrant=False)
_keeping_products = partial(
    checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy)
)
