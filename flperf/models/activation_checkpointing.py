"""What a block keeps of its forward pass for the backward pass; the rest is computed again there.

`selective` keeps what matrix products and attention made (all that is costly to make) and computes norms, modulation,
activations and rotation again: no more products than without it. `full` keeps the block's inputs alone, which costs
its forward pass once more.
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
    # which xFormers runs where it has no kernel of its own
    *(aten._flash_attention_forward, aten._efficient_attention_forward),
}
KEPT = PRODUCTS | ATTENTION
XFORMERS = ("xformers_flash", "xformers_flash3")  # namespaces of its operators


def recompute_in_backward(block: nn.Module, mode: str) -> None:
    """Wrap the block's forward; `mode` is `selective` or `full`. Compiled afterwards, recomputation is fused into the
    backward graph."""
    forward, rerun = block.forward, {"selective": _keeping_products, "full": _keeping_inputs}[mode]

    def checkpointed(*inputs):
        return rerun(forward, *inputs) if torch.is_grad_enabled() else forward(*inputs)

    block.forward = checkpointed


def _policy(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    costly = operator.overloadpacket in KEPT or operator.namespace in XFORMERS
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_inputs = partial(checkpoint, use_reentrant=False)
_keeping_products = partial(
    checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy)
)
