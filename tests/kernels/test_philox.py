"""The noise on the CPU: the published words, the normal distribution, and the same bits for every split of the work."""

import math

import pytest
import torch
from flperf_kernels import philox

# kat_vectors of Random123 for philox4x32: counter, key, words after 7 rounds, words after 10.
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
    """Pairs of 32-bit words, the low one first, as signed 64-bit numbers."""
    halves = [int(word, 16) for word in words.split()]
    return [philox.signed_64(low | high << 32) for low, high in zip(halves[::2], halves[1::2], strict=True)]


@pytest.mark.parametrize("counter, key, seven, ten", KNOWN)
def test_words_are_the_published_ones(counter, key, seven, ten):
    (group, sample), (seed,) = wide(counter), wide(key)
    for rounds, expected in ((7, seven), (10, ten)):
        words = philox.philox_words(torch.tensor(group), torch.tensor(sample), seed, rounds)
        assert [f"{int(word):08x}" for word in words] == expected.split()


@pytest.fixture(scope="module")
def normals():
    return philox.normal_reference(torch.arange(8) + 2**35, 2**18 + 1, 2026).double()  # 2 M numbers


def test_moments(normals):
    n = normals.numel()
    # Under a standard normal x, x^2, x^3 and x^4 have variances 1, 2, 15 and 96. Five standard errors are allowed.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(normals.pow(power).mean() - expected) < 5 * math.sqrt(variance / n), power
    assert normals.abs().max() < 6.77


def test_kolmogorov_smirnov(normals):
    for position in (*range(4), slice(None)):  # each of the four outputs of a Philox call, then all together
        x = normals[:, position::4] if isinstance(position, int) else normals
        x = x.flatten().sort().values
        grid = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
        distance = torch.maximum(grid[1:] - torch.special.ndtr(x), torch.special.ndtr(x) - grid[:-1]).max()
        assert distance * math.sqrt(len(x)) < 1.95  # p = 0.001


def test_numbers_are_uncorrelated(normals):
    other_seed = philox.normal_reference(torch.arange(8) + 2**35, 2**18 + 1, 2027).double()
    next_sample = normals.roll(1, 0)
    pairs = [(normals[:, :-lag], normals[:, lag:]) for lag in (1, 2, 3, 4, 64, 1024)]
    for x, y in [*pairs, (normals, next_sample), (normals, other_seed)]:
        for f in (lambda z: z, lambda z: z**2 - 1):  # squares too: the two normals of a pair share a radius
            assert abs((f(x) * f(y)).mean() / (f(x) * f(x)).mean()) < 5 / math.sqrt(x.numel())


@pytest.mark.parametrize("count", [1, 37, 1023, 4099])  # 4,099 are drawn by compiled code
def test_bits_do_not_depend_on_the_split(count):
    sample = torch.tensor([7, 2**34, 0, 12345])
    whole = philox.philox_normal(sample, count, seed=5)
    assert whole.shape == (4, count) and whole.is_contiguous()
    assert torch.equal(whole[1:2], philox.philox_normal(sample[1:2], count, seed=5))
    assert torch.equal(whole[[3, 0]], philox.philox_normal(sample[[3, 0]], count, seed=5))
    torch.testing.assert_close(whole, philox.normal_reference(sample, count, 5), rtol=0, atol=2e-6)


def test_inside_compiled_code_it_is_the_same():
    sample = torch.tensor([7, 2**34])
    compiled = torch.compile(lambda sample: philox.philox_normal(sample, 4099, seed=5), fullgraph=True)(sample)
    torch.testing.assert_close(compiled, philox.philox_normal(sample, 4099, seed=5), rtol=0, atol=2e-6)


def test_seeds_are_64_bits():
    sample = torch.arange(3)
    assert torch.equal(philox.philox_normal(sample, 8, seed=-1), philox.philox_normal(sample, 8, seed=2**64 - 1))
    draws = torch.stack([philox.philox_normal(sample, 8, seed=seed) for seed in (0, 1, 2**32, 2**63)]).flatten()
    assert draws.unique().numel() == draws.numel()
