"""The Triton kernels in the interpreter, against plain PyTorch and fp64. test_smoke.py and test_interpreter.py run this
file."""

import math

import fused_inputs
import pytest
import torch
import triton
import triton.language as tl
from flow_matching_inputs import SIZES, VARIANTS, Batch, assert_as_good_as_plain, batch, run_kernels
from flperf_kernels import bias_gradients, flow_matching_triton, philox, residual_norm
from flperf_kernels.flow_matching_triton import loss_launch, noise_launch, scale_launch

# ----------------------------------------------------------------------------------------------------------------------
# philox


@triton.jit
def words_kernel(group, sample, seed: tl.int64, out, SMALL: tl.constexpr, N: tl.constexpr):
    g = tl.load(group + tl.arange(0, N))
    words = philox.draw_words(g.to(tl.uint32 if SMALL else tl.uint64), tl.load(sample), seed, False)
    for i in tl.static_range(4):
        tl.store(out + i * N + tl.arange(0, N), words[i].to(tl.int64))


@pytest.mark.parametrize("first, small", [(0, True), (2**32 - 8, False), (2**61, False)])
@pytest.mark.parametrize("sample, seed", [(0, 0), (2**33 + 5, 1), (2**63 - 1, -1)])
def test_words(first, small, sample, seed):
    group, out = torch.arange(first, first + 16), torch.empty(4, 16, dtype=torch.int64)
    words_kernel[(1,)](group, torch.tensor([sample]), seed, out, SMALL=small, N=16)
    assert torch.equal(out, torch.stack(philox.philox_words(group, torch.tensor(sample), seed)))


@pytest.mark.parametrize("count", [1, 37, 1024, 4099])
def test_normals(count):
    sample, out = torch.tensor([3, 2**40]), torch.full((2, count), math.nan)
    philox.normal_launch(sample, out, 99).run()
    torch.testing.assert_close(out, philox.normal_reference(sample, count, 99), rtol=0, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# flow matching


@pytest.mark.parametrize("dtype, per_channel, norm, loss, weighted", VARIANTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flow_matching(size, dtype, per_channel, norm, loss, weighted):
    x = batch(size, dtype, per_channel, weighted)
    assert_as_good_as_plain(run_kernels(x, norm, loss), x, norm, loss)


@pytest.mark.parametrize("per_channel", [False, True], ids=["flat", "in rows"])
@pytest.mark.parametrize("size", [(2, 37, 199), (1, 50, 1024)], ids=str)
def test_programs_of_several_tiles(size, per_channel, monkeypatch):
    monkeypatch.setattr(flow_matching_triton, "PROGRAMS", 4)
    x = batch(size, torch.bfloat16, per_channel)
    assert loss_launch(x.loss_arguments("none", "mse"), None, 1.0, 1.0).arguments["steps"] > 1
    assert_as_good_as_plain(run_kernels(x, "none", "mse"), x, "none", "mse")


VIEWS = {
    "frames of a clip": lambda t: t[:, 12:],
    "channels first": lambda t: t.transpose(1, 2)[:, :, :20],
    "every other channel": lambda t: t[:, :, ::2],
    "one token for all": lambda t: t[:, :1].expand(-1, 9, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_any_strides(view, per_channel):
    x = batch((2, 36, 48), torch.bfloat16, per_channel)
    x.latents, x.prediction = VIEWS[view](x.latents), VIEWS[view](x.prediction)
    if per_channel:
        x.mean, x.std = x.mean[: x.latents.shape[2]], x.std[: x.latents.shape[2]]
    assert_as_good_as_plain(run_kernels(x, "none", "mse"), x, "none", "mse")


@pytest.mark.parametrize("b, n, d", [(1, 64, 128), (4, 9, 199), (3, 128, 32)])
def test_noise_is_the_same_in_every_tiling(b, n, d):
    """Latents of zero at tau = 0 leave the noise: as one run of numbers, in rows, element by element, and for the last
    sample alone."""
    zeros, padded = torch.zeros(b, n, d), torch.zeros(b, n, d + 3)[..., :d]
    tau, sample, mean, std = torch.zeros(b), torch.arange(b), torch.zeros(d), torch.ones(d)
    outs = []
    for latents, statistics in (
        (zeros, (None, None)),
        (padded, (None, None)),
        (zeros, (mean, std)),
        (zeros[-1:], (None, None)),
    ):
        count = len(latents)
        x = Batch(latents, latents, tau[-count:], sample[-count:], *statistics, None)
        outs.append(torch.full((count, n, d), math.nan))
        noise_launch(x.noise_arguments("none"), outs[-1]).run()
    assert all(torch.equal(outs[0][-len(out) :], out) for out in outs)


def test_same_input_same_bits():
    x = batch((2, 20, 96), torch.bfloat16, True)
    first, second = run_kernels(x, "none", "mse"), run_kernels(x, "none", "mse")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@triton.jit
def offsets_kernel(out, step, steps, rows, width, total, MASK: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    row, element, mask = flow_matching_triton._tile(step, steps, rows, width, total, MASK, False, R, C)
    offset = flow_matching_triton._offset(width, 1, False, R, C)
    tl.store(out + flow_matching_triton._offset(C, 1, False, R, C), tl.where(mask, element + offset, -1))


def test_offsets_beyond_32_bits():
    """The last, partial tile of 2^24 + 3 tokens of 1,000 channels, which the second of two programs writes."""
    rows, width, out = 2**24 + 3, 1000, torch.empty(4, 1024, dtype=torch.int64)
    offsets_kernel[(2,)](out, 0, 2**22, rows, width, rows * width, MASK="rows", R=4, C=1024)
    expected = torch.full((4, 1024), -1)
    expected[:3, :width] = torch.arange(2**24 * width, rows * width).view(3, width)
    assert torch.equal(out, expected) and expected.max() > 2**33


def test_latents_beyond_32_bits():
    """A stride of 2^31 elements, in memory that is reserved but never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    latents = storage.as_strided((2, 16, 64), (2**31, 64, 1))
    x = batch((2, 16, 64), torch.bfloat16)
    latents.copy_(x.latents)
    expected, x.latents = run_kernels(x, "none", "mse"), latents
    assert all(torch.equal(a, b) for a, b in zip(run_kernels(x, "none", "mse"), expected, strict=True))


def test_scale():
    gradient = torch.randn(3, 37, 199)
    expected = gradient * torch.tensor([1.0, 2.0, -0.5])[:, None, None]
    scale_launch(gradient, torch.tensor([4.0, 8.0, -2.0]), 0.25).run()
    assert torch.equal(gradient, expected)
    strided = torch.tensor([0.5, 9.0, 4.0, 9.0, 1.0, 9.0])[::2]  # the incoming gradient of a stack of losses
    scale_launch(gradient, strided, 1.0).run()
    assert torch.equal(gradient, expected * strided[:, None, None])
    scale_launch(gradient, torch.tensor(2.0).expand(3), 1.0).run()
    assert torch.equal(gradient, expected * strided[:, None, None] * 2)
    half = torch.full((2, 5, 8), 3.0, dtype=torch.float16)
    scale_launch(half, torch.tensor(65536.0), 2.0**-24).run()  # a gain that fp16 can't hold
    assert torch.equal(half, torch.full_like(half, 3 * 2.0**-8))


# ----------------------------------------------------------------------------------------------------------------------
# backward passes of a head


@pytest.mark.parametrize("dtype", fused_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("size", fused_inputs.SIZES, ids=str)
@pytest.mark.parametrize("name", fused_inputs.NORMS)
def test_residual_norm(name, size, dtype, monkeypatch):
    """Few programs, so that each has several rows, and the last one fewer than the others."""
    monkeypatch.setattr(residual_norm, "PROGRAMS", 4)
    arguments = fused_inputs.norm_arguments(name, size, dtype)
    results = fused_inputs.run_norm_kernel(*arguments)
    fused_inputs.assert_exact(results, fused_inputs.exact_norm(*arguments), dtype)


@pytest.mark.parametrize("dtype", fused_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("name", fused_inputs.HEADS)
def test_heads(name, dtype, monkeypatch):
    monkeypatch.setattr(bias_gradients, "PROGRAMS", 3)
    monkeypatch.setattr(bias_gradients, "TILE", 64)
    arguments = fused_inputs.heads_arguments(name, dtype)
    fused_inputs.assert_exact(fused_inputs.run_heads_kernel(*arguments), fused_inputs.exact_heads(*arguments), dtype)


@pytest.mark.parametrize("dtype", fused_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 3), (3, 37, 199), (2, 9, 1030)], ids=str)
def test_gelu(size, dtype, monkeypatch):
    monkeypatch.setattr(bias_gradients, "PROGRAMS", 4)
    grad, x = fused_inputs.randoms(size, size, dtype=dtype)
    fused_inputs.assert_exact(fused_inputs.run_gelu_kernel(grad, 2 * x), fused_inputs.exact_gelu(grad, 2 * x), dtype)


@pytest.mark.parametrize("name", fused_inputs.NORMS)
def test_residual_norm_as_called(name):
    arguments = fused_inputs.norm_arguments(name, (3, 37, 199), torch.bfloat16)
    arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    fused_inputs.assert_exact(residual_norm.on_cuda(*arguments), fused_inputs.exact_norm(*arguments), torch.bfloat16)
    empty = [x[:, :0] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in arguments]
    expected = residual_norm.residual_norm_backward(*empty)
    assert all(torch.equal(a, b) for a, b in zip(residual_norm.on_cuda(*empty), expected, strict=True))


def test_bias_gradients_as_called():
    for name in fused_inputs.HEADS:
        arguments = fused_inputs.heads_arguments(name, torch.bfloat16)
        results = bias_gradients.heads_on_cuda(*arguments)
        fused_inputs.assert_exact(results, fused_inputs.exact_heads(*arguments), torch.bfloat16)
    grad, x = fused_inputs.randoms((5, 3, 40), (5, 3, 40), dtype=torch.bfloat16)
    results = bias_gradients.gelu_on_cuda(grad.transpose(0, 1), x.transpose(0, 1))
    expected = fused_inputs.exact_gelu(grad.transpose(0, 1), x.transpose(0, 1))
    fused_inputs.assert_exact(results, expected, torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------------------
# one case of each kernel


def test_smoke(monkeypatch):
    test_normals(37)
    test_flow_matching((1, 33, 100), torch.bfloat16, True, "layer", "smooth_l1", True)
    test_scale()
    test_residual_norm("gated and modulated", (2, 5, 16), torch.bfloat16, monkeypatch)
    test_heads("keys, values", torch.bfloat16, monkeypatch)
    test_gelu((3, 37, 199), torch.bfloat16, monkeypatch)
