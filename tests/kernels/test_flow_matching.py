"""Flow matching's ops on the CPU: values and gradients against autograd and fp64, eager and compiled."""

import pytest
import torch
from flow_matching_inputs import SEED, VARIANTS, assert_as_good_as_plain, batch, exact
from flperf_kernels import flow_matching as fm
from flperf_kernels.flow_matching_reference import (
    flow_matching_data,
    flow_matching_velocity,
    loss_and_derivative,
    loss_reference,
)


@pytest.mark.parametrize("reduction", fm.REDUCTIONS)
@pytest.mark.parametrize("loss", fm.LOSSES)
def test_reference_differentiates(loss, reduction):
    x = batch((2, 3, 4), per_channel=True, weighted=True)

    def function(prediction):
        weights = (x.weight.double(), reduction, 0.5)
        return loss_reference(
            prediction, x.latents.double(), x.sample, SEED, loss, x.mean, x.std, "layer", 1e-6, *weights
        )

    assert torch.autograd.gradcheck(function, x.prediction.double().requires_grad_())


@pytest.mark.parametrize("dtype, per_channel, norm, loss, weighted", VARIANTS)
@pytest.mark.parametrize("reduction", fm.REDUCTIONS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 37, 199)], ids=str)
def test_loss_op_is_the_reference(size, reduction, dtype, per_channel, norm, loss, weighted):
    x = batch(size, dtype, per_channel, weighted)
    options = dict(loss=loss, mean=x.mean, std=x.std, norm=norm, weight=x.weight, reduction=reduction, scale=0.25)
    op, reference = (x.prediction.clone().requires_grad_() for _ in range(2))
    value = fm.flow_matching_loss(op, x.latents, x.sample, seed=SEED, **options)
    expected = loss_reference(reference, x.latents, x.sample, SEED, eps=1e-6, **options)
    assert value.dtype == torch.float32 and value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    incoming = torch.rand_like(value) + 0.5  # not one, so the backward pass must scale
    value.backward(incoming)
    expected.backward(incoming)
    assert op.grad.dtype == dtype
    # Gradients are rounded twice, when stored and when scaled; autograd's once. And the op sums prediction, noise and
    # data, each below 8, in another order. So a residual may differ by an eps of 16, times at most 2 (the derivative of
    # a square), the scale, the weight and the incoming 1.5.
    weight = 1 if x.weight is None else x.weight.max().item()
    count = x.latents.numel() if reduction == "mean" else x.latents[0].numel()
    gain = 2 * 0.25 * 1.5 * weight / count
    tolerance = 16 * torch.finfo(torch.float32).eps * gain + torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(op.grad, reference.grad, rtol=2 * torch.finfo(dtype).eps, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(value, fm.flow_matching_loss(op, x.latents, x.sample, seed=SEED, **options))


@pytest.mark.parametrize("dtype, per_channel, norm", [v[:3] for v in VARIANTS])
def test_noise_op(dtype, per_channel, norm):
    x = batch((3, 37, 199), dtype, per_channel)
    x.latents = x.latents.transpose(0, 1).contiguous().transpose(0, 1)
    options = dict(seed=SEED, mean=x.mean, std=x.std, norm=norm)
    out = fm.flow_matching_noise(x.latents, x.tau, x.sample, **options)
    assert out.dtype == dtype and out.is_contiguous()
    expected = exact(x, norm, "mse")[0]
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    full = fm.flow_matching_noise(x.latents, x.tau, x.sample, out_dtype=torch.float32, **options)
    torch.testing.assert_close(full.double(), expected, rtol=1e-5, atol=1e-5)
    velocity = flow_matching_velocity(x.latents, x.sample, **options)  # x_tau = data - (1 - tau) velocity
    data = flow_matching_data(x.latents, x.mean, x.std, norm, 1e-6)
    torch.testing.assert_close(full, data - (1 - x.tau[:, None, None]) * velocity, rtol=1e-5, atol=1e-5)


def test_an_incoming_gradient_of_one_changes_nothing():
    x = batch((2, 40, 30), torch.bfloat16)
    prediction = x.prediction.requires_grad_()
    _, gradient = torch.ops.flperf.flow_matching_loss_and_gradient(
        prediction.detach(), x.latents, x.sample, SEED, "mse", None, None, "none", 1e-6, None, "mean", 1.0,
        True)  # fmt: skip
    loss = fm.flow_matching_loss(prediction, x.latents, x.sample, seed=SEED, reduction="mean")
    loss.backward(retain_graph=True)
    assert torch.equal(prediction.grad, gradient)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fp16_gradients_survive():
    """1 / (b n d) of this loss is below the smallest fp16 number, so the loss scale must be applied before rounding."""
    x = batch((8, 512, 512), torch.float16)
    prediction = x.prediction.requires_grad_()
    (fm.flow_matching_loss(prediction, x.latents, x.sample, seed=SEED, reduction="mean") * 2.0**20).backward()
    expected = exact(x, "none", "mse")[2] * (2.0**20 / prediction.numel())
    torch.testing.assert_close(prediction.grad.double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(size):
    x = batch(size)
    assert fm.flow_matching_noise(x.latents, x.tau, x.sample, seed=SEED).shape == size
    prediction = x.prediction.requires_grad_()
    for reduction in fm.REDUCTIONS:
        value = fm.flow_matching_loss(prediction, x.latents, x.sample, seed=SEED, reduction=reduction)
        assert value.shape == (size[:1] if reduction == "sample" else ()) and value.isnan().all()
        value.sum().backward()
        assert prediction.grad.shape == size


def test_split_batches_have_the_same_noise():
    x = batch((4, 40, 100))
    whole = fm.flow_matching_noise(x.latents, x.tau, x.sample, seed=SEED)
    parts = [
        fm.flow_matching_noise(x.latents[i : i + 1], x.tau[i : i + 1], x.sample[i : i + 1], seed=SEED) for i in range(4)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_a_thousand_samples():
    x = batch((1000, 1, 8), weighted=True)
    out = fm.flow_matching_noise(x.latents, x.tau, x.sample, seed=SEED)
    loss = fm.flow_matching_loss(x.prediction, x.latents, x.sample, seed=SEED, weight=x.weight)
    residual = x.prediction - flow_matching_velocity(x.latents, x.sample, seed=SEED)
    _, gradient = loss_and_derivative(residual, "mse")
    assert_as_good_as_plain((out, loss * 8, gradient * x.weight[:, None, None]), x, "none", "mse")


MISTAKES = {
    r"latents must be \[b, n, d\]": dict(latents=torch.zeros(3, 4)),
    r"latents must be .* got .* torch.float64": dict(latents=torch.zeros(2, 3, 4).double()),
    r"prediction must be \[2, 3, 4\]": dict(prediction=torch.zeros(2, 3, 5)),
    r"prediction must be .* on cpu, got .* on meta": dict(prediction=torch.zeros(2, 3, 4, device="meta")),
    r"sample must be \[2\] in torch.int64": dict(sample=torch.zeros(2)),
    r"mean must be \[4\] in torch.float32": dict(mean=torch.zeros(3), std=torch.ones(4)),
    r"mean and std go together": dict(mean=torch.zeros(4)),
    r"weight must be \[2\]": dict(weight=torch.zeros(2, 1)),
    r"norm must be one of .* got 'l1'": dict(norm="l1"),
    r"loss must be one of .* got 'huber'": dict(loss="huber"),
    r"reduction must be one of .* got 'sum'": dict(reduction="sum"),
    r"latents requires a gradient": dict(latents=torch.zeros(2, 3, 4, requires_grad=True)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    arguments = (
        dict(prediction=torch.zeros(2, 3, 4), latents=torch.zeros(2, 3, 4), sample=torch.arange(2), seed=0)
        | MISTAKES[message]
    )
    with pytest.raises((ValueError, NotImplementedError), match=message):
        fm.flow_matching_loss(**arguments)


def test_tau_must_be_one_number_a_sample():
    with pytest.raises(ValueError, match=r"tau must be \[2\] in torch.float32"):
        fm.flow_matching_noise(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.arange(2), seed=0)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64], ids=str
)
def test_out_dtype_must_be_one_that_kernels_write(dtype):
    with pytest.raises(ValueError, match=f"out_dtype must be one of .*torch.float32.* got {dtype}"):
        fm.flow_matching_noise(torch.zeros(2, 3, 4), torch.zeros(2), torch.arange(2), seed=0, out_dtype=dtype)


def step(weight, latents, tau, sample):
    noised = fm.flow_matching_noise(latents, tau, sample, seed=SEED, norm="layer")
    return fm.flow_matching_loss(noised @ weight, latents, sample, seed=SEED, norm="layer", reduction="mean")


def test_compiled_into_one_graph_it_is_the_same():
    x = batch((3, 37, 199))
    generator = torch.Generator().manual_seed(1)
    eager = torch.randn(199, 199, generator=generator).requires_grad_()
    compiled = eager.detach().clone().requires_grad_()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    function = torch.compile(step, fullgraph=True, backend=counter)
    for sample in (x.sample, x.sample + 100):  # the next step's samples compile nothing
        (expected := step(eager, x.latents, x.tau, sample)).backward()
        (value := function(compiled, x.latents, x.tau, sample)).backward()
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", ["noise", "loss", "loss_and_gradient", "scale"])
def test_opcheck(op):
    x = batch((2, 3, 8), per_channel=True, weighted=True)
    preparation, ops = (x.mean, x.std, "l2", 1e-6), torch.ops.flperf
    prediction = x.prediction.requires_grad_(op == "loss")
    loss = (prediction, x.latents, x.sample, SEED, "l1", *preparation, x.weight, "mean", 0.5)
    function, arguments = {
        "noise": (ops.flow_matching_noise, (x.latents, x.tau, x.sample, SEED, *preparation, torch.bfloat16)),
        "loss": (ops.flow_matching_loss, loss),
        "loss_and_gradient": (ops.flow_matching_loss_and_gradient, (*loss, True)),
        "scale": (ops.scale_gradient_, (x.prediction.detach(), torch.tensor(2.0), 0.5)),
    }[op]
    torch.library.opcheck(function.default, arguments)
