"""Activation checkpointing on a GPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from small_heads import GEOMETRY, forward_and_backward, inputs, small

from flperf.models.heads import build_head


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
