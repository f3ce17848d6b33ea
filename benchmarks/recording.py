"""Times a benchmark case in turns with its alternatives, within a time budget, and records the results."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import sizes
from benchmarks.memory import peak_memory_bytes, reset_peak_memory

Function = Callable[[], object]
BUDGET = 3.0  # seconds for all rounds of a case
MIN_ROUNDS = 3  # even if they take longer


def seconds_of(function: Function) -> float:
    start = time.perf_counter()
    function()
    if sizes.ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Recorder:
    """The fixture `record`: times a case with pytest-benchmark and compares it with the measured peaks of the device.

    `peaks`: FLOP/s of "bf16" and "fp32" matrix products, and bytes/s of a "copy".
    """

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
        """Time `function`, which processes `count` units per call. Returns the seconds of each round by name; those of
        `function` itself are under "".

        `beside` has alternatives that do the same work. Each is called once per round, so that a drift in the machine's
        speed affects all of them alike, and the median of the ratios of the rounds is recorded. `before` is called with
        the next function ahead of every call and is not timed. With `warm`, all functions are called once to compile
        them, and once more to find out how many of the `rounds` fit into the budget.
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
            if rounds > MIN_ROUNDS:
                rounds = min(rounds, max(MIN_ROUNDS, int(BUDGET / sum(turn(name) for name in ways))))
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
        if bytes:  # read and written, as for the copy
            rates |= {"GB_per_s": bytes / seconds / 1e9, "fraction_of_copy": bytes / seconds / self.peaks["copy"]}
        return rates

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of a matrix product."""
        return self.peaks["bf16" if dtype == torch.bfloat16 else "fp32"]

    @staticmethod
    def ratios(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
        """The speed of the named function relative to each other one: medians of the ratios of the rounds."""
        ratios = {
            other: statistics.median(theirs / own for theirs, own in zip(others, seconds[name], strict=True))
            for other, others in seconds.items()
            if other not in ("", name)
        }
        return {f"times as fast as {other}": ratio for other, ratio in ratios.items()}
