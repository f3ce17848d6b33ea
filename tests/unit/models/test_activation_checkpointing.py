"""Activation checkpointing: the same gradients in less memory, and products computed again by `full` alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from memory import profiled
from small_heads import GEOMETRY, forward_and_backward, inputs, perturbed, small
from torch.utils.flop_counter import FlopCounterMode

from flperf.models.heads import HEADS, build_head

MODES = ("none", "selective", "full")


@pytest.mark.parametrize("name", HEADS)
def test_it_changes_no_gradient_and_only_full_multiplies_again(name):
    results, products = [], {}
    for mode in MODES:
        head = perturbed(name, activation_checkpointing=mode)
        with FlopCounterMode(display=False) as counter:
            loss = forward_and_backward(head, inputs(name))
        results.append([loss, *(parameter.grad for parameter in head.parameters())])
        products[mode] = counter.get_total_flops()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))
    assert products["none"] == products["selective"] < products["full"]


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in HEADS), ("predictor", True)])
def test_it_saves_memory(name, compiled, graphs_only):
    geometry, held, products = replace(GEOMETRY, height=8, width=8), {}, {}
    for mode in MODES:
        torch._dynamo.reset()
        head = build_head(small(name, activation_checkpointing=mode), geometry, seed=0, compile=compiled)
        for parameter in head.parameters():
            parameter.grad = torch.zeros_like(parameter)  # they are there in every update but the first
        step = partial(forward_and_backward, head, inputs(name, geometry))
        step()  # compiles
        held[mode], products[mode] = profiled(step)
    assert held["none"] > 1.1 * held["selective"] > 1.1 * held["full"], held
    if compiled:  # eager passes record products that `selective` only looks up
        assert products["none"] == products["selective"] < products["full"], products
