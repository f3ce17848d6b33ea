"""The fused gated residual, norm and modulation on the CPU: values and gradients, eager and compiled, and in a DiT."""

import pytest
import torch
from adaln_inputs import DTYPES, SIZES, assert_as_good_as_plain, differentiated, inputs
from flperf_kernels import adaln

from flperf.config import Model
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype):
    tensors = inputs(size, dtype)
    assert_as_good_as_plain(differentiated(adaln.residual_modulate, tensors), tensors)


def test_compiled_into_one_graph_it_is_the_same():
    tensors = inputs((3, 37, 199), torch.bfloat16)
    compiled = torch.compile(adaln.residual_modulate, fullgraph=True)
    assert_as_good_as_plain(differentiated(compiled, tensors), tensors)


def test_opcheck():
    arguments = [tensor.requires_grad_() for tensor in inputs((2, 3, 8), torch.float32)[:5]]
    torch.library.opcheck(torch.ops.flperf.residual_modulate.default, (*arguments, 1e-6))


@pytest.mark.parametrize(("index", "name"), list(enumerate(("y", "gate", "shift", "scale"), start=1)))
def test_mistakes_are_named(index, name):
    arguments = inputs((2, 3, 8), torch.float32)[:5]
    arguments[index] = arguments[index][..., :-1]
    with pytest.raises(ValueError, match=f"{name} must be"):
        adaln.residual_modulate(*arguments)
    arguments[index] = inputs((2, 3, 8), torch.bfloat16)[index]
    with pytest.raises(ValueError, match=f"{name} must be .* in torch.float32 on cpu, got .* in torch.bfloat16"):
        adaln.residual_modulate(*arguments)


def test_a_dit_is_the_same_with_and_without():
    """Traced and differentiated as in compilation; generating code would take a minute."""
    geometry = LatentGeometry(2, 2, 3, 3, 12)
    model = dict(head="dit", num_context_latents=2, hidden_dim=24, depth=1, num_heads=2)
    plain = build_head(Model(**model), geometry, seed=0, compile=False)
    fused = build_head(Model(**model, fused_adaln=True), geometry, seed=0, compile=False)
    with torch.no_grad():  # gates start at zero, so a fresh head ignores its blocks
        for parameter, copy in zip(plain.parameters(), fused.parameters(), strict=True):
            copy.copy_(parameter.normal_(std=0.1))
    context, noised, tau = torch.randn(2, 2, 2, 3, 3, 12).unbind() + (torch.rand(2),)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager_decomp_partition")
    values = [head(context, noised, tau) for head in (plain, compiled)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    for value in values:
        value.square().mean().backward()
    for expected, parameter in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5)
