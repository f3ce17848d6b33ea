"""The fused gated residual, norm and modulation: the same numbers as plain PyTorch, and machine code without waste."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from flperf_kernels import adaln
from flperf_kernels.launching import launch

from benchmarks import kernel_report, norm_report
from flperf.config import Model
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of rows of one or two numbers a norm leaves nothing to differentiate: gradients are what rounding leaves of a
# difference, times 1,000.
SIZES = [(1, 1, 3), (2, 5, 16), (3, 37, 199), (2, 130, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(size, dtype, device="cpu"):
    b, _, d = size
    generator = torch.Generator().manual_seed(0)
    shapes = (size, size, (b, d), (b, d), (b, d), size, size)
    # x, y, gate, shift, scale, and two gradients
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def exact(tensors, dtype=torch.float64):
    """x', h and the five gradients by autograd in `dtype`."""
    *leaves, grad_out, grad_h = (tensor.to(dtype) for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = adaln.reference(*leaves, 1e-6)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, (grad_out, grad_h))]


def by_kernels(tensors):
    x, y, gate, shift, scale, grad_out, grad_h = tensors
    out, h, grad_x, grad_y = (torch.full_like(x, float("nan")) for _ in range(4))
    launch(*adaln.forward_launch(x, y, gate, shift, scale, 1e-6, out, h))
    backward = adaln.backward_launch(grad_out, grad_h, out, y, gate, scale, 1e-6, grad_x, grad_y)
    backward[2]["partial"].fill_(float("nan"))
    launch(*backward)
    return [out, h, grad_x, grad_y, *backward[2]["partial"].sum(1).to(x.dtype).unbind(1)]


def assert_as_good_as_plain(results, tensors):
    """Errors against fp64 of at most twice those of plain PyTorch in the same dtype, or a few roundings where that is
    lucky."""
    names = ("x'", "h", "grad x", "grad y", "grad gate", "grad shift", "grad scale")
    dtype = tensors[0].dtype
    for name, result, best, plain in zip(names, results, exact(tensors), plain_results(tensors), strict=True):
        assert result.dtype == dtype and result.isfinite().all(), f"{name}: not everything was written"
        allowed = 2 * (plain - best).abs().max() + 4 * torch.finfo(dtype).eps * best.abs().max()
        error = (result - best).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def plain_results(tensors):
    *leaves, grad_out, grad_h = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = norm_report.between_layers(*leaves)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, (grad_out, grad_h))]


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
@pytest.mark.parametrize(("size", "dtype"), list(itertools.product(SIZES, DTYPES)), ids=str)
def test_interpreted(size, dtype):
    assert_as_good_as_plain(by_kernels(inputs(size, dtype)), inputs(size, dtype))


def test_in_the_interpreter():
    """Triton decides when it is imported whether it interprets, so that takes a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "test_interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("size", "dtype"), list(itertools.product(SIZES, DTYPES)), ids=str)
def test_op(size, dtype, device):
    tensors = inputs(size, dtype, device)
    *leaves, grad_out, grad_h = tensors
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    outputs = adaln.residual_modulate(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, (grad_out, grad_h))
    assert_as_good_as_plain([*(output.detach() for output in outputs), *gradients], tensors)


def test_opcheck():
    arguments = [tensor.requires_grad_() for tensor in inputs((2, 3, 8), torch.float32)[:5]]
    torch.library.opcheck(torch.ops.flperf.residual_modulate.default, (*arguments, 1e-6))


@pytest.mark.parametrize(("place", "name"), list(enumerate(("y", "gate", "shift", "scale"), start=1)))
def test_mistakes_are_named(place, name):
    arguments = inputs((2, 3, 8), torch.float32)[:5]
    arguments[place] = arguments[place][..., :-1]
    with pytest.raises(ValueError, match=f"{name} must be"):
        adaln.residual_modulate(*arguments)
    arguments[place] = inputs((2, 3, 8), torch.bfloat16)[place]
    with pytest.raises(ValueError, match=f"{name} must be .* in torch.float32 on cpu, got .* in torch.bfloat16"):
        adaln.residual_modulate(*arguments)


@pytest.mark.parametrize("compile", [False, True])
def test_a_dit_is_the_same_with_and_without(compile):
    geometry = LatentGeometry(2, 2, 3, 3, 12)
    model = dict(head="dit", num_context_latents=2, hidden_dim=24, depth=2, num_heads=2)
    plain = build_head(Model(**model), geometry, seed=0, compile=False)
    fused = build_head(Model(**model, fused_adaln=True), geometry, seed=0, compile=compile)
    with torch.no_grad():  # gates start at zero, which would hide the blocks
        for ours, theirs in zip(plain.parameters(), fused.parameters(), strict=True):
            theirs.copy_(ours.normal_(std=0.1))
    context, noised, tau = torch.randn(2, 2, 2, 3, 3, 12).unbind() + (torch.rand(2),)
    values = [head(context, noised, tau) for head in (plain, fused)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    for value in values:
        value.square().mean().backward()
    for ours, theirs in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chip", kernel_report.CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 1024), (torch.bfloat16, 768), (torch.float32, 1024)], ids=str
)
def test_machine_code(chip, dtype, width):
    """No spills, no local memory, wide loads and stores, at least half of a processor's warps for the forward and a
    quarter for the backward, which holds a row's four tensors and three sums."""
    x, gate = torch.empty(8, 4096, width, dtype=dtype, device="meta"), torch.empty(8, width, dtype=dtype, device="meta")
    launches = {
        0.5: adaln.forward_launch(x, x, gate, gate, gate, 1e-6, x, x),
        0.25: adaln.backward_launch(x, x, x, x, gate, gate, 1e-6, x, x),
    }
    for occupancy, described in launches.items():
        code = kernel_report.disassemble(kernel_report.specialise(described, chip.capability), chip.capability)
        assert code.stack_bytes == code.local_bytes == 0 and code.loops == 1
        assert not [opcode for opcode in code.setup | code.loop if opcode.startswith(("LDL", "STL", "ATOM", "RED"))]
        narrow = [opcode for opcode in code.loop if opcode[:3] in ("LDG", "STG") and ".128" not in opcode]
        assert not narrow or width & (width - 1), "rows of a power of two must move 128 bits at a time"
        assert code.occupancy >= occupancy


def test_inductor_leaves_something_to_gain():
    """The reason for these kernels, by Inductor's own count of the bytes that its kernels touch; should it fuse the
    sums, drop them."""
    passes = norm_report.count()
    assert passes["forward"] >= norm_report.LEAST["forward"]
    assert passes["backward"] > norm_report.LEAST["backward"] + 2
