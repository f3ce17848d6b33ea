"""Which of several weighted sources each sample of training comes from: a pure function of the seed and the sample.

Samples are dealt in blocks. The first n samples hold n times a source's share of it, rounded, where n is a whole number
of blocks; inside a block the order is shuffled. Shares are exact in the long run, nothing is drawn by chance but the
order in a block, and how often a source came before a sample needs no count of the samples before it.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

BLOCK = 64  # samples; large enough to part a sample's source from its place in the batch


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Each weight's share of all, exact for the decimal numbers that the weights were written as."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return [weight / sum(exact) for weight in exact]


class Mixture:
    """Deals samples to sources in proportion to `weights`, which are above 0 and need not sum to 1."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        # Each source takes its part of the samples that are left by those before it. Rounding errors are smallest if
        # the heaviest comes first; with k sources they stay below 1 + ln(k) / 2.
        self.parts: list[tuple[int, int, int]] = []  # source, numerator and denominator of its part
        left = Fraction(1)
        for source, share in sorted(enumerate(shares(weights)), key=lambda pair: -pair[1]):
            part = share / left
            self.parts.append((source, part.numerator, part.denominator))
            left -= share
        self._block = lru_cache(maxsize=64)(self._deal)

    def place(self, sample: int) -> tuple[int, int]:
        """(k, j): the sample is the j-th of source k. Both count from 0."""
        return self._block(sample // BLOCK)[sample % BLOCK]

    def counts(self, samples: int) -> list[int]:
        """How many of `samples` samples each source gets. They are the first of the stream for any whole number of
        blocks; no count falls when `samples` grows."""
        counts, left = [0] * len(self.parts), samples
        for source, numerator, denominator in self.parts:
            counts[source] = (2 * left * numerator + denominator) // (2 * denominator)  # rounded, in exact integers
            left -= counts[source]
        return counts

    def _deal(self, block: int) -> list[tuple[int, int]]:
        """The places of a block's samples."""
        following, end = self.counts(block * BLOCK), self.counts((block + 1) * BLOCK)
        quotas = np.subtract(end, following)
        # The trailing 2 keeps this order apart from the other numbers of a run.
        order = np.random.default_rng((self.seed, block, 0, 2)).permutation(np.repeat(np.arange(len(quotas)), quotas))
        places = []
        for source in order.tolist():
            places.append((source, following[source]))
            following[source] += 1
        return places
