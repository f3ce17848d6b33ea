"""Noising and loss: the ops against autograd, the Triton kernels in the interpreter, and their machine code without a
GPU.

Tolerances are relative to plain PyTorch: against fp64, a kernel may err at most twice as much as eager code in the
same dtype.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from flperf_kernels import adaln, philox
from flperf_kernels import flow_matching as fm
from flperf_kernels.launching import launch

from benchmarks import kernel_report

SEED = 2**40 + 17
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def poison():
    """Fill what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclasses.dataclass
class Batch:
    latents: torch.Tensor
    prediction: torch.Tensor
    tau: torch.Tensor
    sample: torch.Tensor
    mean: torch.Tensor | None
    std: torch.Tensor | None
    weight: torch.Tensor | None


def batch(size, dtype=torch.float32, per_channel=False, weighted=False, device="cpu") -> Batch:
    """Latents of scale 3 about 1, as encoders have them; sample indices that need more than 32 bits."""
    generator = torch.Generator().manual_seed(0)
    b, n, d = size
    latents, prediction = (
        torch.randn(size, generator=generator) * scale + shift for scale, shift in ((3, 1), (1.5, 0))
    )
    tau, mean, std, weight = (torch.rand(k, generator=generator) for k in (b, d, d, b))
    sample = torch.arange(b) * 3 + 2**33
    made = Batch(latents.to(dtype), prediction.to(dtype), tau, sample, mean * 2, std * 3 + 0.5, weight + 0.5)
    made = dataclasses.replace(
        made, **{} if per_channel else dict(mean=None, std=None), **{} if weighted else dict(weight=None)
    )
    return Batch(*(None if t is None else t.to(device) for t in vars(made).values()))


def exact_noise(sample, count):
    """The noise in fp64, from the same words."""
    words = philox.philox_words(torch.arange(-(-count // 4))[None], sample[:, None], SEED)
    pairs = [
        ((-2 * ((a.double() + 0.5) / 2**32).log()).sqrt(), c.double() * (2 * math.pi / 2**32))
        for a, c in (words[:2], words[2:])
    ]
    return torch.stack([r * f(angle) for r, angle in pairs for f in (torch.cos, torch.sin)], -1).flatten(1)[:, :count]


def oracle(x: Batch, norm, loss):
    """x_tau, per-sample loss times n d and its gradient in fp64."""
    b, n, d = x.latents.shape
    double = [None if t is None else t.double() for t in (x.mean, x.std)]
    data, noise = (
        fm.flow_matching_data(x.latents.double(), *double, norm, 1e-6),
        exact_noise(x.sample, n * d).view(b, n, d),
    )
    return torch.lerp(noise, data, x.tau.double()[:, None, None]), *pointwise(x, data, noise, loss, torch.float64)


def plain(x: Batch, norm, loss):
    """The same in PyTorch, every tensor in the dtype of the latents."""
    b, n, d = x.latents.shape
    dtype = x.latents.dtype
    data = fm.flow_matching_data(x.latents, x.mean, x.std, norm, 1e-6).to(dtype)
    noise = philox.normal_reference(x.sample, n * d, SEED).view(b, n, d).to(dtype)
    tau = x.tau.to(dtype)[:, None, None]
    return (1 - tau) * noise + tau * data, *pointwise(x, data, noise, loss, dtype)


def pointwise(x: Batch, data, noise, loss, dtype):
    value, derivative = fm.loss_and_derivative(x.prediction.to(dtype) - (data - noise), loss)
    weight = torch.ones(len(value), 1, 1, dtype=dtype) if x.weight is None else x.weight.to(dtype)[:, None, None]
    return (value * weight).sum((1, 2)), derivative * weight


def assert_as_good_as_plain(results, x: Batch, norm, loss):
    exact = oracle(x, norm, loss)
    for name, result, reference, pytorch in zip(
        ("x_tau", "loss", "gradient"), results, exact, plain(x, norm, loss), strict=True
    ):
        assert result.isfinite().all(), f"{name}: not everything was written"
        error, allowed = (result - reference).abs().max(), 2 * (pytorch - reference).abs().max()
        # where plain PyTorch is exact by luck: one rounding
        allowed += torch.finfo(result.dtype).eps * reference.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, twice plain PyTorch's is {allowed:.3g}"


def run_kernels(x: Batch, norm, loss):
    """Launch both kernels into NaN; b, n, d > 0."""
    b, n, d = x.latents.shape
    out, gradient = torch.full((2, b, n, d), math.nan, dtype=x.latents.dtype, device=x.latents.device)
    launch(*fm.noise_launch(x.latents, x.tau, x.sample, SEED, x.mean, x.std, norm, 1e-6, out))
    kernel = fm.loss_launch(
        x.prediction, x.latents, x.sample, SEED, loss, x.mean, x.std, norm, 1e-6, x.weight, gradient, 1.0, 1.0
    )
    launch(*kernel)
    per_sample = torch.full((b,), math.nan, device=x.latents.device)
    launch(*fm.sum_launch(kernel[2]["partial"], per_sample))
    return out, per_sample, gradient


# ------------------------------------------------------------------------------------------------------ kernels,
# interpreted

SIZES = [(1, 1, 1), (2, 37, 199), (3, 5, 64), (1, 33, 100)]
VARIANTS = [
    (torch.float32, False, "none", "mse", False),
    (torch.float32, True, "layer", "smooth_l1", True),
    (torch.bfloat16, True, "none", "l1", True),
    (torch.bfloat16, False, "l2", "mse", False),
    (torch.float16, True, "l2", "smooth_l1", False),
    (torch.float16, False, "layer", "l1", True),
]


VIEWS = {
    "frames of a clip": lambda t: t[:, 12:],
    "channels first": lambda t: t.transpose(1, 2)[:, :, :20],
    "every other channel": lambda t: t[:, :, ::2],
    "one token for all": lambda t: t[:, :1].expand(-1, 9, -1),
}


@triton.jit
def offsets_kernel(out, step, steps, rows, width, total, MASK: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    row, element, mask = fm._tile(step, steps, rows, width, total, MASK, False, R, C)
    tl.store(out + fm._offset(C, 1, False, R, C), tl.where(mask, element + fm._offset(width, 1, False, R, C), -1))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="test_in_the_interpreter runs these")
class TestInterpreted:
    @pytest.mark.parametrize("dtype, per_channel, norm, loss, weighted", VARIANTS)
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_kernels(self, poison, size, dtype, per_channel, norm, loss, weighted):
        x = batch(size, dtype, per_channel, weighted)
        assert_as_good_as_plain(run_kernels(x, norm, loss), x, norm, loss)

    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_any_strides(self, poison, view, per_channel):
        x = batch((2, 36, 48), torch.bfloat16, per_channel)
        x.latents, x.prediction = VIEWS[view](x.latents), VIEWS[view](x.prediction)
        if per_channel:
            x.mean, x.std = x.mean[: x.latents.shape[2]], x.std[: x.latents.shape[2]]
        assert_as_good_as_plain(run_kernels(x, "none", "mse"), x, "none", "mse")

    @pytest.mark.parametrize("b, n, d", [(1, 64, 128), (4, 9, 199), (3, 128, 32)])
    def test_noise_is_the_same_in_every_tiling(self, b, n, d):
        """Latents of zero leave the noise alone: as one run of numbers, in rows, element by element, and one sample
        of the batch."""
        zeros, padded = torch.zeros(b, n, d), torch.zeros(b, n, d + 3)[..., :d]
        tau, sample, mean, std = torch.zeros(b), torch.arange(b), torch.zeros(d), torch.ones(d)
        outs = []
        for latents, first, statistics in (
            (zeros, 0, (None, None)),
            (padded, 0, (None, None)),
            (zeros, 0, (mean, std)),
            (zeros, b - 1, (None, None)),
        ):
            out = torch.full((b - first, n, d), math.nan)
            launch(*fm.noise_launch(latents[first:], tau[first:], sample[first:], SEED, *statistics, "none", 1e-6, out))
            outs.append(out)
        assert all(torch.equal(outs[0][-len(out) :], out) for out in outs)

    def test_same_input_same_bits(self):
        x = batch((2, 20, 96), torch.bfloat16, True)
        first, second = run_kernels(x, "none", "mse"), run_kernels(x, "none", "mse")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_offsets_beyond_32_bits(self):
        """The last, partial tile of 2^24 + 3 tokens of 1,000 channels: the second of two programs of 2^22 tiles each
        writes last."""
        rows, width, out = 2**24 + 3, 1000, torch.empty(4, 1024, dtype=torch.int64)
        offsets_kernel[(2,)](out, 0, 2**22, rows, width, rows * width, MASK="rows", R=4, C=1024)
        expected = torch.full((4, 1024), -1)
        expected[:3, :width] = torch.arange(2**24 * width, rows * width).view(3, width)
        assert torch.equal(out, expected) and expected.max() > 2**33

    def test_latents_beyond_32_bits(self):
        """A stride of more than 2^31 elements, in memory that is reserved but never touched."""
        storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
        latents = storage.as_strided((2, 16, 64), (2**31, 64, 1))
        x = batch((2, 16, 64), torch.bfloat16)
        latents.copy_(x.latents)
        expected, x.latents = run_kernels(x, "none", "mse"), latents
        assert all(torch.equal(a, b) for a, b in zip(run_kernels(x, "none", "mse"), expected, strict=True))

    def test_scale_leaves_ones_alone(self):
        gradient = torch.randn(3, 37, 199)
        expected = gradient * torch.tensor([1.0, 2.0, -0.5])[:, None, None]
        launch(*fm.scale_launch(gradient, torch.tensor([4.0, 8.0, -2.0]), 0.25))
        assert torch.equal(gradient, expected)
        strided = torch.tensor([0.5, 9.0, 4.0, 9.0, 1.0, 9.0])[::2]  # the gradient that a stack of losses passes on
        launch(*fm.scale_launch(gradient, strided, 1.0))
        assert torch.equal(gradient, expected * strided[:, None, None])
        launch(*fm.scale_launch(gradient, torch.tensor(2.0).expand(3), 1.0))
        assert torch.equal(gradient, expected * strided[:, None, None] * 2)
        half = torch.full((2, 5, 8), 3.0, dtype=torch.float16)
        launch(*fm.scale_launch(half, torch.tensor(65536.0), 2.0**-24))  # a gain that fp16 can't hold
        assert torch.equal(half, torch.full_like(half, 3 * 2.0**-8))


def test_in_the_interpreter():
    """Triton decides when it is imported whether it interprets, so that takes a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "TestInterpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------------
# the ops


@pytest.mark.parametrize("reduction", fm.REDUCTIONS)
@pytest.mark.parametrize("loss", fm.LOSSES)
def test_reference_differentiates(loss, reduction):
    x = batch((2, 3, 4), per_channel=True, weighted=True)

    def function(prediction):
        arguments = (
            x.latents.double(),
            x.sample,
            SEED,
            loss,
            x.mean,
            x.std,
            "layer",
            1e-6,
            x.weight.double(),
            reduction,
            0.5,
        )
        return fm.loss_reference(prediction, *arguments)

    assert torch.autograd.gradcheck(function, x.prediction.double().requires_grad_())


@pytest.mark.parametrize("dtype, per_channel, norm, loss, weighted", VARIANTS)
@pytest.mark.parametrize("reduction", fm.REDUCTIONS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 37, 199)], ids=str)
def test_loss_op_is_the_reference(size, reduction, dtype, per_channel, norm, loss, weighted):
    x = batch(size, dtype, per_channel, weighted)
    options = dict(loss=loss, mean=x.mean, std=x.std, norm=norm, weight=x.weight, reduction=reduction, scale=0.25)
    op, reference = (x.prediction.clone().requires_grad_() for _ in range(2))
    value = fm.flow_matching_loss(op, x.latents, x.sample, seed=SEED, **options)
    expected = fm.loss_reference(reference, x.latents, x.sample, SEED, eps=1e-6, **options)
    assert value.dtype == torch.float32 and value.shape == expected.shape
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    incoming = torch.rand_like(value) + 0.5  # not one, so the backward must scale
    value.backward(incoming)
    expected.backward(incoming)
    assert op.grad.dtype == dtype
    # Stored, then scaled: two roundings where autograd has one. And the op sums prediction, noise and data (each
    # below 8) in another order: each residual may differ by an eps of 16, and is multiplied by at most 2 (of a
    # square), the scale, the weight and 1.5.
    gain = (
        2
        * 0.25
        * 1.5
        * (1 if x.weight is None else x.weight.max().item())
        / (x.latents.numel() if reduction == "mean" else x.latents[0].numel())
    )
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
    exact, tolerance = oracle(x, norm, "mse")[0], torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=1e-5)
    full = fm.flow_matching_noise(x.latents, x.tau, x.sample, out_dtype=torch.float32, **options)
    torch.testing.assert_close(full.double(), exact, rtol=1e-5, atol=1e-5)
    velocity = fm.flow_matching_velocity(x.latents, x.sample, **options)  # x_tau = data - (1 - tau) velocity
    data = fm.flow_matching_data(x.latents, x.mean, x.std, norm, 1e-6)
    torch.testing.assert_close(full, data - (1 - x.tau[:, None, None]) * velocity, rtol=1e-5, atol=1e-5)


def test_unit_gradient_is_not_touched():
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
    """1 / (b n d) of this loss is below the smallest fp16 number; the loss scale has to reach the gradient before it
    is rounded."""
    x = batch((8, 512, 512), torch.float16)
    prediction = x.prediction.requires_grad_()
    (fm.flow_matching_loss(prediction, x.latents, x.sample, seed=SEED, reduction="mean") * 2.0**20).backward()
    exact = oracle(x, "none", "mse")[2] * (2.0**20 / prediction.numel())
    torch.testing.assert_close(prediction.grad.double(), exact, rtol=2e-3, atol=1e-5)


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
    gradient = fm.loss_and_derivative(x.prediction - fm.flow_matching_velocity(x.latents, x.sample, seed=SEED), "mse")[
        1
    ]
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


def test_compiles_whole():
    x = batch((2, 5, 16))
    eager, compiled = (
        torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    function = torch.compile(step, fullgraph=True, backend=counter)
    for sample in (x.sample, x.sample + 100):  # a new step is no new code
        (expected := step(eager, x.latents, x.tau, sample)).backward()
        (value := function(compiled, x.latents, x.tau, sample)).backward()
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", ["noise", "loss", "loss_and_gradient", "scale"])
def test_opcheck(op):
    x = batch((2, 3, 8), per_channel=True, weighted=True)
    preparation, ops = (x.mean, x.std, "l2", 1e-6), torch.ops.flperf
    loss = (
        x.prediction.requires_grad_(op == "loss"),
        x.latents,
        x.sample,
        SEED,
        "l1",
        *preparation,
        x.weight,
        "mean",
        0.5,
    )
    function, arguments = {
        "noise": (ops.flow_matching_noise, (x.latents, x.tau, x.sample, SEED, *preparation, torch.bfloat16)),
        "loss": (ops.flow_matching_loss, loss),
        "loss_and_gradient": (ops.flow_matching_loss_and_gradient, (*loss, True)),
        "scale": (ops.scale_gradient_, (x.prediction.detach(), torch.tensor(2.0), 0.5)),
    }[op]
    torch.library.opcheck(function.default, arguments)


# -------------------------------------------------------------------------------------------------------------
# machine code


def assert_lean(code: kernel_report.Code):
    assert code.stack_bytes == 0 and code.local_bytes == 0, "registers spill"
    opcodes = code.setup | code.loop
    assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL", "ATOM", "RED"))], (
        "local memory or atomics"
    )
    assert code.loops == 1
    narrow = [opcode for opcode in code.loop if opcode[:3] in ("LDG", "STG") and ".128" not in opcode]
    assert not narrow, "tiles must move 128 bits at a time"
    assert code.occupancy >= 0.5


@pytest.mark.parametrize("chip", kernel_report.CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("case", kernel_report.covering(kernel_report.every()), ids=str)
def test_machine_code(case, chip):
    assert_lean(kernel_report.compile_case(case, chip.capability))


@pytest.mark.machine_code
@pytest.mark.parametrize("chip", kernel_report.CHIPS, ids=lambda chip: chip.name)
def test_machine_code_of_every_specialisation(chip):
    for case in kernel_report.every():
        try:
            assert_lean(kernel_report.compile_case(case, chip.capability))
        except AssertionError as error:
            raise AssertionError(str(case)) from error


# Of the memory time, by chip. A B200 moves its bytes so fast that four normals for a Philox call and two special
# functions a pair alone are above 70% of its 17 instructions an element. Normalising reduces over the token twice:
# more arithmetic, but less than the bytes of a pass of its own, which would double the noising's time. There and on a
# B200 it must not get worse.
ARITHMETIC = {
    "plain": {"A100": kernel_report.ROOM, "H100": kernel_report.ROOM, "B200": 1.1},
    "normalised": {"A100": 0.95, "H100": 0.85, "B200": 1.75},
}


@pytest.mark.parametrize("chip", kernel_report.CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("op", ["noise", "loss"])
@pytest.mark.parametrize("per_channel, norm", [(False, "none"), (True, "none"), (True, "layer")])
def test_memory_bound(op, per_channel, norm, chip):
    case = kernel_report.Case(op, per_channel=per_channel, norm=norm)
    cost = kernel_report.cost(case, chip)
    assert cost.bytes_moved == case.bytes_bound
    assert cost.ratio < ARITHMETIC["plain" if norm == "none" else "normalised"][chip.name]


META = dict(device="meta")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code_of_the_small_kernels(capability):
    values, gradient = torch.empty(8, 256, **META), torch.empty(8, 4096, 1024, dtype=torch.bfloat16, **META)
    normal = philox.normal_launch(torch.empty(8, dtype=torch.int64, **META), values, SEED)
    for described in (
        normal,
        fm.sum_launch(values, torch.empty(8, **META)),
        fm.scale_launch(gradient, torch.empty((), **META), 1.0),
    ):
        code = kernel_report.disassemble(kernel_report.specialise(described, capability), capability)
        assert code.stack_bytes == 0 and code.local_bytes == 0 and code.occupancy >= 0.5


@pytest.mark.parametrize("chip", kernel_report.CHIPS, ids=lambda chip: chip.name)
def test_no_number_replaces_a_nan(chip):
    """A minimum or maximum of the hardware drops NaN unless told otherwise, and the loss of a broken step would look
    fine."""
    case = kernel_report.Case("loss", norm="l2", loss="smooth_l1")
    assembly = kernel_report.specialise(case.launch(), chip.capability).asm["ptx"]
    limits = re.findall(r"\b(?:min|max)\.\S*f32", assembly)
    assert limits and all(".NaN." in limit for limit in limits), limits


@pytest.mark.parametrize("name", ["noise", "loss", "scale", "normal", "adaln forward", "adaln backward"])
def test_a_batch_that_no_grid_holds_is_refused(name):
    b = 2**16
    x, vector, sample = torch.empty(b, 4, 8, **META), torch.empty(b, **META), torch.empty(b, dtype=torch.int64, **META)
    gate = torch.empty(b, 8, **META)
    described = {
        "noise": lambda: fm.noise_launch(x, vector, sample, SEED, None, None, "none", 1e-6, x),
        "loss": lambda: fm.loss_launch(x, x, sample, SEED, "mse", None, None, "none", 1e-6, None, x, 1.0, 1.0),
        "scale": lambda: fm.scale_launch(x, vector, 1.0),
        "normal": lambda: philox.normal_launch(sample, gate, SEED),
        "adaln forward": lambda: adaln.forward_launch(x, x, gate, gate, gate, 1e-6, x, x),
        "adaln backward": lambda: adaln.backward_launch(x, x, x, x, gate, gate, 1e-6, x, x),
    }[name]()
    with pytest.raises(ValueError, match="CUDA allows at most 65535 samples a batch"):
        launch(*described)


@pytest.mark.parametrize("op", ["noise", "loss"])
@pytest.mark.parametrize("size", [(2, 37, 199), (2, 2**22, 1024), (1, 2**26, 1024)], ids=str)
def test_unusual_sizes_compile(op, size):
    """Rows that don't start at a multiple of four; samples whose offsets need more than 31 bits, and whose groups
    more than 32."""
    case = kernel_report.Case(op, per_channel=True, size=size)
    compiled = kernel_report.specialise(case.launch(), 90)
    assert compiled.src.signature["total"] == ("i64" if size[1] > 37 else "i32")
    assert case.launch()[2]["SMALL"] == (size[1] < 2**26)


# --------------------------------------------------------------------------------------------------------------------
# a GPU


@pytest.mark.parametrize("dtype, per_channel, norm, loss, weighted", VARIANTS)
# of one number there is no mean error
@pytest.mark.parametrize("size", [*SIZES[1:], (1000, 1, 8), (2, 1568, 1408)], ids=str)
class TestGPU:
    pytestmark = gpu

    def test_kernels(self, poison, size, dtype, per_channel, norm, loss, weighted):
        x = batch(size, dtype, per_channel, weighted)
        results = run_kernels(batch(size, dtype, per_channel, weighted, device="cuda"), norm, loss)
        exact = oracle(x, norm, loss)
        for result, reference, pytorch in zip(results, exact, plain(x, norm, loss), strict=True):
            error = (result.cpu() - reference).abs()
            assert error.isfinite().all()
            # Beside rounding there is the special functions' error in the noise, 1e-6 of its size and 1e-3 for the
            # rarest of draws.
            assert error.mean() <= 2 * (pytorch - reference).abs().mean() + 1e-5 * reference.abs().mean()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_step_does_not_wait_for_the_gpu():
    x = batch((2, 64, 128), torch.bfloat16, device="cuda")
    weight = torch.randn(128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    step(weight, x.latents, x.tau, x.sample).backward()  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(weight, x.latents, x.tau, x.sample).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_more_than_2_to_31_elements():
    size = (1, 2**21 + 1, 1024)
    latents = torch.zeros(1, 1, 1024, dtype=torch.bfloat16, device="cuda").expand(size)
    out = fm.flow_matching_noise(latents, torch.zeros(1, device="cuda"), torch.tensor([5], device="cuda"), seed=SEED)
    groups = torch.arange(2**21 * 256, 2**21 * 256 + 256)
    words = philox.philox_words(groups, torch.tensor(5), SEED)
    expected = torch.stack((*philox.box_muller(*words[:2]), *philox.box_muller(*words[2:])), -1).flatten()
    torch.testing.assert_close(out[0, -1].float().cpu(), expected, rtol=1e-2, atol=2e-3)
