"""The noise: right words, right distribution, and the same bits however the work is split."""

import math
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from flperf_kernels import philox
from flperf_kernels.launching import launch

# kat_vectors of Random123, philox4x32: counter, key, words after 7 and after 10 rounds.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "5f6fb709 0d893f64 4f121f81 4f730a48",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def wide(words: str) -> list[int]:
    """Pairs of 32-bit words, low one first, as signed 64-bit numbers."""
    halves = [int(word, 16) for word in words.split()]
    return [philox.signed_64(low | high << 32) for low, high in zip(halves[::2], halves[1::2], strict=True)]


@pytest.mark.parametrize("counter, key, seven, ten", KNOWN)
def test_words_are_the_published_ones(counter, key, seven, ten):
    (group, sample), (seed,) = wide(counter), wide(key)
    for rounds, expected in ((7, seven), (10, ten)):
        words = philox.philox_words(torch.tensor(group), torch.tensor(sample), seed, rounds)
        assert [f"{int(word):08x}" for word in words] == expected.split()


@triton.jit
def words_kernel(group, sample, seed: tl.int64, out, SMALL: tl.constexpr, N: tl.constexpr):
    g = tl.load(group + tl.arange(0, N))
    words = philox.draw_words(g.to(tl.uint32 if SMALL else tl.uint64), tl.load(sample), seed, False)
    for i in tl.static_range(4):
        tl.store(out + i * N + tl.arange(0, N), words[i].to(tl.int64))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="test_in_the_interpreter runs these")
class TestInterpreted:
    @pytest.mark.parametrize("first, small", [(0, True), (2**32 - 8, False), (2**61, False)])
    @pytest.mark.parametrize("sample, seed", [(0, 0), (2**33 + 5, 1), (2**63 - 1, -1)])
    def test_same_words(self, first, small, sample, seed):
        group, out = torch.arange(first, first + 16), torch.empty(4, 16, dtype=torch.int64)
        words_kernel[(1,)](group, torch.tensor([sample]), seed, out, SMALL=small, N=16)
        assert torch.equal(out, torch.stack(philox.philox_words(group, torch.tensor(sample), seed)))

    @pytest.mark.parametrize("count", [1, 37, 1024, 4099])
    def test_same_normals(self, count):
        sample, out = torch.tensor([3, 2**40]), torch.full((2, count), math.nan)
        launch(*philox.normal_launch(sample, out, 99))
        torch.testing.assert_close(out, philox.normal_reference(sample, count, 99), rtol=0, atol=2e-6)


def test_in_the_interpreter():
    """Triton decides when it is imported whether it interprets, so that takes a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "TestInterpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def normals():
    return philox.normal_reference(torch.arange(8) + 2**35, 2**18 + 1, 2026).double()  # 2 M numbers


def test_moments(normals):
    n = normals.numel()
    # Variances of the sample moments of a standard normal: of x 1, of x^2 2, of x^3 15, of x^4 96; five standard
    # errors.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(normals.pow(power).mean() - expected) < 5 * math.sqrt(variance / n), power
    assert normals.abs().max() < 6.77


def test_kolmogorov_smirnov(normals):
    for position in (*range(4), slice(None)):  # each of the four outputs of a Philox call, and all of them
        x = normals[:, position::4] if isinstance(position, int) else normals
        x = x.flatten().sort().values
        grid = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
        distance = torch.maximum(grid[1:] - torch.special.ndtr(x), torch.special.ndtr(x) - grid[:-1]).max()
        assert distance * math.sqrt(len(x)) < 1.95  # p = 0.001


def test_numbers_are_uncorrelated(normals):
    other_seed = philox.normal_reference(torch.arange(8) + 2**35, 2**18 + 1, 2027).double()
    next_sample = normals.roll(1, 0)
    pairs = [(normals[:, :-lag], normals[:, lag:]) for lag in (1, 2, 3, 4, 64, 1024)] + [
        (normals, next_sample),
        (normals, other_seed),
    ]
    for x, y in pairs:
        for f in (lambda z: z, lambda z: z**2 - 1):  # radii, too: the cosine and the sine of a pair share theirs
            assert abs((f(x) * f(y)).mean() / (f(x) * f(x)).mean()) < 5 / math.sqrt(x.numel())


@pytest.mark.parametrize("count", [1, 37, 1023, 4099])  # from 1024 on the CPU's code is compiled
def test_bits_do_not_depend_on_the_split(count):
    sample = torch.tensor([7, 2**34, 0, 12345])
    whole = philox.philox_normal(sample, count, seed=5)
    assert whole.shape == (4, count) and whole.is_contiguous()
    assert torch.equal(whole[1:2], philox.philox_normal(sample[1:2], count, seed=5))
    assert torch.equal(whole[[3, 0]], philox.philox_normal(sample[[3, 0]], count, seed=5))
    torch.testing.assert_close(whole, philox.normal_reference(sample, count, 5), rtol=0, atol=2e-6)


def test_seeds_are_64_bits():
    sample = torch.arange(3)
    assert torch.equal(philox.philox_normal(sample, 8, seed=-1), philox.philox_normal(sample, 8, seed=2**64 - 1))
    draws = torch.stack([philox.philox_normal(sample, 8, seed=seed) for seed in (0, 1, 2**32, 2**63)]).flatten()
    assert draws.unique().numel() == draws.numel()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_draws_what_the_cpu_draws():
    sample = torch.tensor([0, 7, 2**40])
    cpu, gpu = (
        philox.philox_normal(sample, 10**6 + 3, seed=11),
        philox.philox_normal(sample.cuda(), 10**6 + 3, seed=11).cpu(),
    )
    # The hardware's logarithm is good to 2^-22 absolute, so near u = 1, where the radius is its root, the error can
    # reach 2^-11.
    assert (cpu - gpu).abs().max() < 2e-3 and (cpu - gpu).abs().mean() < 1e-5
