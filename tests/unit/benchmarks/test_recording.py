"""How a benchmark case is timed, on functions with invented times."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import recording
from benchmarks.recording import Recorder


class Clock:
    """Replaces `time.perf_counter`. Its functions advance it by a given time, and their calls are recorded."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def function(self, name: str, seconds: float):
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


class Benchmark:
    """The part of pytest-benchmark's fixture that is used."""

    def __init__(self):
        self.extra_info, self.stats = {}, None

    def pedantic(self, function, arguments, *, setup, rounds, warmup_rounds) -> None:
        data = []
        for _ in range(rounds):
            setup()
            data.append(function(*arguments))
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(recording, "time", clock)
    return clock


def recorded(clock: Clock, **options) -> tuple[dict, dict]:
    recorder = Recorder(Benchmark(), {"bf16": 100.0, "fp32": 50.0, "copy": 20.0})
    seconds = recorder(clock.function("ours", 2.0), "clips", 8, **options)
    return seconds, recorder.benchmark.extra_info


def test_alternatives_take_turns_and_ratios_are_those_of_their_rounds(clock):
    seconds, info = recorded(clock, beside={"usual": clock.function("usual", 3.0)})
    assert clock.calls[:4] == ["usual", "ours"] * 2, "the first call of each compiles, the second sets the rounds"
    assert clock.calls[4:] == ["usual", "ours"] * 3
    assert seconds == {"usual": [3.0] * 3, "": [2.0] * 3}
    assert info["times as fast as usual"] == 1.5 and info["clips_per_s"] == 4.0


@pytest.mark.parametrize("usual, rounds", [(0.25, 4), (0.0, 5), (60.0, 3)])
def test_long_cases_take_fewer_rounds_but_at_least_three(clock, monkeypatch, usual, rounds):
    monkeypatch.setattr(recording, "BUDGET", 10.0)
    seconds, _ = recorded(clock, beside={"usual": clock.function("usual", usual)}, rounds=9)
    assert len(seconds[""]) == rounds


def test_fractions_are_of_the_measured_peaks(clock):
    _, info = recorded(clock, flops=60, bytes=10, dtype=torch.bfloat16)
    assert info["fraction_of_peak"] == pytest.approx(0.3)
    assert info["fraction_of_copy"] == pytest.approx(0.25) and info["GB_per_s"] == pytest.approx(5e-9)


def test_before_is_called_ahead_of_every_call_and_not_timed(clock):
    usual, announced, wait = clock.function("usual", 3.0), [], clock.function("before", 10.0)

    def before(way):
        announced.append(way)
        wait()

    seconds, _ = recorded(clock, beside={"usual": usual}, before=before, rounds=1, warm=False)
    assert clock.calls == ["before", "usual", "before", "ours"]
    assert announced[0] is usual and announced[1] is not usual
    assert seconds == {"usual": [3.0], "": [2.0]}
