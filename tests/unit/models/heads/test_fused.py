"""Heads with the fused backward passes, which are for CUDA, on the CPU."""

import pytest
import torch
from small_heads import GEOMETRY, forward_and_backward, inputs, perturbed, small

from flperf.config import Model
from flperf.models.heads import HEADS, build_head
from flperf.models.heads.fused import Fusable


@pytest.fixture
def fused(monkeypatch):
    """Switches the fused backward passes on (they are for CUDA) or off."""
    return lambda on: monkeypatch.setattr(Fusable, "fuses", lambda layer, x: on and layer.fused)


@pytest.mark.parametrize(
    ("name", "positions", "compiled"),
    [
        *((name, positions, False) for name in HEADS for positions in ("rope3d", "sincos")),
        *((name, "rope3d", True) for name in ("predictor", "dit")),
    ],
)
def test_a_head_is_the_same_with_and_without(name, positions, compiled, fused, graphs_only):
    gradients = {}
    for on in (False, True):
        fused(on)
        head = build_head(
            small(name, positions=positions, fused_kernels=True), GEOMETRY, seed=0, compile=compiled and on
        )
        head.load_state_dict(perturbed(name, positions=positions).state_dict())
        loss = forward_and_backward(head, inputs(name))
        gradients[on] = {key: parameter.grad for key, parameter in head.named_parameters()} | dict(loss=loss)
    for key, plain in gradients[False].items():
        atol = 1e-6 + 1e-5 * float(plain.abs().max())
        torch.testing.assert_close(gradients[True][key], plain, rtol=1e-4, atol=atol, msg=key)


@pytest.mark.parametrize(("name", "mode"), [("predictor", "selective"), ("dit", "full")])
def test_recomputed_activations_give_the_same_gradients(name, mode, fused, graphs_only):
    fused(True)
    results = []
    for changes in ({}, dict(activation_checkpointing=mode)):
        head = build_head(small(name, fused_kernels=True, **changes), GEOMETRY, seed=0, compile=bool(changes))
        head.load_state_dict(perturbed(name).state_dict())
        forward_and_backward(head, inputs(name))
        results.append([parameter.grad for parameter in head.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("on", [False, True])
def test_the_configuration_switches_them(on):
    layers = [layer for layer in perturbed("dit", fused_kernels=on).modules() if isinstance(layer, Fusable)]
    assert layers and all(layer.fused == on for layer in layers)
    default = [layer.fused for layer in perturbed("dit").modules() if isinstance(layer, Fusable)]
    assert default and not any(default)


def test_heads_of_odd_width_are_not_fused(fused):
    fused(True)
    head = build_head(
        Model(hidden_dim=30, depth=1, num_heads=2, positions="none", fused_kernels=True),
        GEOMETRY,
        seed=0,
        compile=False,
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward_and_backward(head, inputs("predictor"))
    names = {event.key for event in profile.key_averages()}
    assert "flperf::gelu_backward" in names and "flperf::heads_backward" not in names
