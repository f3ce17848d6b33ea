"""Heads on a GPU: the fused backward passes, and activation checkpointing."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_heads import GEOMETRY, forward_and_backward, inputs, small

from flperf.models.heads import HEADS, build_head


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", HEADS)
def test_the_fused_backward_passes_give_the_same_gradients(name, compiled):
    gradients = {}
    for fused in (False, True):
        torch._dynamo.reset()
        head = build_head(small(name, fused_kernels=fused), GEOMETRY, seed=0, compile=compiled).to("cuda")
        with torch.no_grad():
            torch.manual_seed(2)
            for parameter in head.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape).cuda())
        forward_and_backward(head, [x.cuda() for x in inputs(name)])
        gradients[fused] = [parameter.grad for parameter in head.parameters()]
    for ours, plain in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5 + 1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_activation_checkpointing_saves_memory(compiled):
    geometry, held, gradients = replace(GEOMETRY, height=16, width=16), {}, {}
    for mode in ("none", "selective", "full"):
        torch._dynamo.reset()
        model = replace(small("dit", activation_checkpointing=mode), depth=8)
        head = build_head(model, geometry, seed=0, compile=compiled).to("cuda", torch.bfloat16)
        context, target, tau = (x.cuda() for x in inputs("dit", geometry))
        step = partial(forward_and_backward, head, [context.bfloat16(), target.bfloat16(), tau])
        step()  # compiles
        torch.cuda.reset_peak_memory_stats()
        step()
        held[mode] = torch.cuda.max_memory_allocated()
        gradients[mode] = [parameter.grad for parameter in head.parameters()]
    assert held["none"] > held["selective"] > held["full"], held
    for mode in ("selective", "full"):
        torch.testing.assert_close(gradients[mode], gradients["none"])
