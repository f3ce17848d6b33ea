"""How a case is timed and what is written down of it: in turns with what it is compared with, within a budget of
seconds."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import sizes
from benchmarks.memory import peak_memory_bytes, reset_peak_memory

Function = Callable[[], object]
BUDGET = 3.0  # s that the rounds of a case may take together, at least LEAST of them
LEAST = 3


def seconds_of(function: Function) -> float:
    start = time.perf_counter()
    function()
    if sizes.ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Recorder:
    """The fixture `record`: pytest-benchmark's `benchmark` and the device's measured peaks behind one call."""

    def __init__(self, benchmark, peaks: dict[str, float]):
        self.benchmark, self.peaks = benchmark, peaks

    def __call__(
        self,
        function: Function,
        unit: str,
        count: float,
        *,
        flops: float = 0,
        bytes: float = 0,
        dtype: torch.dtype = torch.float32,
        rounds: int = 5,
        warm: bool = True,
        beside: dict[str, Function] | None = None,
        before: Callable[[Function], object] = lambda way: None,
    ) -> dict[str, list[float]]:
        """Time calls of `function`, each of which handles `count` units; returns the seconds of every round, its own
        under "".

        `beside` names other functions that do the same work: each is called once in every round, so that a machine
        whose speed drifts shows in all, and the median of the rounds' ratios is recorded. `before` is called,
        untimed, ahead of every call, with the function that comes next. With `warm` all of them are called before the
        first round, which compiles, and once more to tell how many of `rounds` the budget allows.
        """
        ways = {**(beside or {}), "": function}
        seconds: dict[str, list[float]] = {name: [] for name in ways}

        def turn(name: str) -> float:
            before(ways[name])
            return seconds_of(ways[name])

        def others() -> None:
            for name in ways:
                if name:
                    seconds[name].append(turn(name))
            before(function)
            reset_peak_memory()

        if warm and not sizes.QUICK:
            for name in ways:
                turn(name)
            if rounds > LEAST:
                rounds = min(rounds, max(LEAST, int(BUDGET / sum(turn(name) for name in ways))))
        self.benchmark.pedantic(seconds_of, (function,), setup=others, rounds=rounds, warmup_rounds=0)
        seconds[""] = list(self.benchmark.stats.stats.data)
        self.benchmark.extra_info |= {
            "peak_memory_bytes": peak_memory_bytes(),  # of the last round
            "copy_GB_per_s": self.peaks["copy"] / 1e9,
            **self.rates(statistics.median(seconds[""]), unit, count, flops, bytes, dtype),
            **self.ratios(seconds, ""),
            **{f"seconds of {name}": statistics.median(seconds[name]) for name in beside or {}},
        }
        return seconds

    def rates(
        self, seconds: float, unit: str, count: float, flops: float, bytes: float, dtype: torch.dtype
    ) -> dict[str, float]:
        rates = {f"{unit}_per_s": count / seconds}
        if flops:
            rates |= {
                "FLOPs": flops,
                "fraction_of_peak": flops / seconds / self.peak(dtype),
                "peak_TFLOP_per_s": self.peak(dtype) / 1e12,
            }
        if bytes:  # read and written, as those of the copy are
            rates |= {"GB_per_s": bytes / seconds / 1e9, "fraction_of_copy": bytes / seconds / self.peaks["copy"]}
        return rates

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product."""
        return self.peaks["bf16" if dtype == torch.bfloat16 else "fp32"]

    @staticmethod
    def ratios(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
        """How many times as fast as each of the others one of the ways is: medians over the rounds."""
        ratios = {
            other: statistics.median(theirs / own for theirs, own in zip(others, seconds[name], strict=True))
            for other, others in seconds.items()
            if other not in ("", name)
        }
        return {f"times as fast as {other}": ratio for other, ratio in ratios.items()}
