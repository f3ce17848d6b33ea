"""The Triton kernels on a GPU."""

import fused_inputs
import pytest
import torch
from flow_matching_inputs import SEED, SIZES, VARIANTS, batch, exact, plain, run_kernels
from flperf_kernels import philox
from flperf_kernels.bias_gradients import gelu_backward, heads_backward
from flperf_kernels.flow_matching import flow_matching_loss, flow_matching_noise
from flperf_kernels.residual_norm import residual_norm_backward


# The mean error of a single number means nothing.
@pytest.mark.parametrize("size", [*SIZES[1:], (1000, 1, 8), (2, 1568, 1408)], ids=str)
@pytest.mark.parametrize("dtype, per_channel, norm, loss, weighted", VARIANTS)
def test_flow_matching(size, dtype, per_channel, norm, loss, weighted):
    x = batch(size, dtype, per_channel, weighted)
    results = run_kernels(batch(size, dtype, per_channel, weighted, device="cuda"), norm, loss)
    for result, best, pytorch in zip(results, exact(x, norm, loss), plain(x, norm, loss), strict=True):
        error = (result.cpu() - best).abs()
        assert error.isfinite().all()
        # Apart from rounding, the special functions of the noise err by 1e-6 of its size, and 1e-3 in the rarest draws.
        assert error.mean() <= 2 * (pytorch - best).abs().mean() + 1e-5 * best.abs().mean()


@pytest.mark.parametrize("dtype", fused_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("size", [*fused_inputs.SIZES, (2, 600, 1024)], ids=str)
@pytest.mark.parametrize("name", fused_inputs.NORMS)
def test_residual_norm(name, size, dtype):
    arguments = fused_inputs.norm_arguments(name, size, dtype, "cuda")
    fused_inputs.assert_exact(residual_norm_backward(*arguments), fused_inputs.exact_norm(*arguments), dtype)


@pytest.mark.parametrize("dtype", fused_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("name", fused_inputs.HEADS)
def test_heads(name, dtype):
    arguments = fused_inputs.heads_arguments(name, dtype, "cuda")
    fused_inputs.assert_exact(heads_backward(*arguments), fused_inputs.exact_heads(*arguments), dtype)


@pytest.mark.parametrize("dtype", fused_inputs.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 3), (3, 37, 199), (2, 900, 4096)], ids=str)
def test_gelu(size, dtype):
    grad, x = fused_inputs.randoms(size, size, dtype=dtype, device="cuda")
    fused_inputs.assert_exact(gelu_backward(grad, 2 * x), fused_inputs.exact_gelu(grad, 2 * x), dtype)


def test_philox_draws_what_the_cpu_draws():
    sample = torch.tensor([0, 7, 2**40])
    cpu = philox.philox_normal(sample, 10**6 + 3, seed=11)
    gpu = philox.philox_normal(sample.cuda(), 10**6 + 3, seed=11).cpu()
    # The hardware's logarithm errs by up to 2^-22 absolute. Near u = 1 the radius is its root, so the error can reach
    # 2^-11.
    assert (cpu - gpu).abs().max() < 2e-3 and (cpu - gpu).abs().mean() < 1e-5


def step(weight, latents, tau, sample):
    noised = flow_matching_noise(latents, tau, sample, seed=SEED, norm="layer")
    return flow_matching_loss(noised @ weight, latents, sample, seed=SEED, norm="layer", reduction="mean")


def test_a_step_does_not_wait_for_the_gpu():
    x = batch((2, 64, 128), torch.bfloat16, device="cuda")
    weight = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    step(weight, x.latents, x.tau, x.sample).backward()  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(weight, x.latents, x.tau, x.sample).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_to_31_elements():
    size = (1, 2**21 + 1, 1024)
    latents = torch.zeros(1, 1, 1024, dtype=torch.bfloat16, device="cuda").expand(size)
    out = flow_matching_noise(latents, torch.zeros(1, device="cuda"), torch.tensor([5], device="cuda"), seed=SEED)
    words = philox.philox_words(torch.arange(2**21 * 256, 2**21 * 256 + 256), torch.tensor(5), SEED)
    expected = torch.stack((*philox.box_muller(*words[:2]), *philox.box_muller(*words[2:])), -1).flatten()
    torch.testing.assert_close(out[0, -1].float().cpu(), expected, rtol=1e-2, atol=2e-3)
