"""The mixture of weighted sources: shares that hold in every stretch of training, dealt without state."""

import math
import random
from collections import Counter

import pytest

from flperf.data.mixture import BLOCK, Mixture, shares

WEIGHTS = {
    "one": [3.0],
    "equal": [1.0, 1.0],
    "thirds": [1 / 3, 1 / 3, 1 / 3],
    "decimal": [0.1, 0.2, 0.7],
    "very unequal": [1e-6, 1.0],
    "rare between": [5.0, 1e-3, 1e-3, 2.0],
    "huge and tiny": [1e300, 1e-300, 1e300],
    "a hundred": [1.0 + number % 7 for number in range(100)],
    "a hundred odd": [math.exp(random.Random(number).uniform(-8, 0)) for number in range(100)],
}


def count_bound(sources: int) -> float:
    """How far a count may be from its share after whole blocks."""
    return 1 + math.log(sources) / 2


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_counts_follow_the_shares_at_any_length(weights):
    mixture, exact = Mixture(weights, 0), shares(weights)
    assert sum(exact) == 1
    for samples in [*range(300), *(10**power + 7 for power in range(3, 19))]:
        counts, later = mixture.counts(samples), mixture.counts(samples + 1)
        assert sum(counts) == samples
        assert sum(later) == samples + 1 and all(b >= a for a, b in zip(counts, later, strict=True))
        for count, share in zip(counts, exact, strict=True):
            assert abs(count - samples * share) <= count_bound(len(weights))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_every_stretch_of_the_stream_holds_the_shares(weights):
    """Inside a block a source may come early or late, by at most a quarter of the block."""
    mixture, exact, counts = Mixture(weights, 5), shares(weights), [0] * len(weights)
    bound = BLOCK / 4 + 3 * count_bound(len(weights))
    for sample in range(3000):
        source, number = mixture.place(sample)
        assert number == counts[source]  # the samples of a source are numbered without a gap
        counts[source] += 1
        if sample % 10 == 0:
            assert all(abs(n - (sample + 1) * share) <= bound for n, share in zip(counts, exact, strict=True))


def test_a_far_sample_costs_no_history():
    """The numbers of a source's samples are continued by arithmetic, from any block on."""
    weights, first = [0.3, 0.5, 0.2], 10**12 * BLOCK
    places = [Mixture(weights, 0).place(sample) for sample in range(first, first + BLOCK)]
    before, after = Mixture(weights, 0).counts(first), Mixture(weights, 0).counts(first + BLOCK)
    for source in range(3):
        assert [number for k, number in places if k == source] == list(range(before[source], after[source]))


def test_shares_are_those_of_the_written_decimals():
    """0.1 + 0.2 + 0.7 is no exact sum of floats; the mixture is the one of 1, 2 and 7."""
    exact, scaled = Mixture([0.1, 0.2, 0.7], 0), Mixture([1, 2, 7], 0)
    assert exact.counts(10**15) == scaled.counts(10**15) == [10**14, 2 * 10**14, 7 * 10**14]
    assert [exact.place(sample) for sample in range(1000)] == [scaled.place(sample) for sample in range(1000)]


def test_the_order_inside_blocks_depends_on_the_seed_and_the_block():
    def block(seed, number):
        return [Mixture([1, 1], seed).place(number * BLOCK + sample)[0] for sample in range(BLOCK)]

    assert block(0, 0) != block(1, 0) != block(1, 1)
    assert sum(block(0, 0)) == sum(block(1, 1)) == BLOCK // 2


def test_a_source_has_no_fixed_place_in_a_batch():
    """Else one rank would read one source alone, and held-out samples (those with odd numbers) would be of one."""
    mixture = Mixture([1, 1], 0)
    seen = Counter((sample % 8, mixture.place(sample)[0]) for sample in range(8000))
    assert all(400 < count < 600 for count in seen.values()) and len(seen) == 16


def test_a_rare_source_comes_as_often_as_it_should():
    mixture = Mixture([1e-6, 1.0], 0)
    assert mixture.counts(10**9)[0] == 1000
    assert [mixture.counts(n * 10**6)[0] for n in range(4)] == [0, 1, 2, 3]
