"""Times steps in turns."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise, repeat

import torch

from benchmarks import sizes
from benchmarks.recording import seconds_of
from benchmarks.training_step import OurStep, configuration
from flperf.data.prefetch import prefetch_to_device
from flperf.data.samplers import ClipBatch
from flperf.training import loop

Step = Callable[[], object]


def timed(step: Step, count: int) -> list[float]:
    """Milliseconds of each of some steps. On a GPU they are read from events afterwards, so that no step waits for the
    device, as in training."""
    if not sizes.ON_GPU:
        return [1e3 * seconds_of(step) for _ in range(count)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def in_turns(ours: Step, other: Step, rounds: int, steps: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median over the rounds of theirs divided by ours.

    A turn begins with a step that is not timed: what one way leaves in the caches is not the other's.
    """
    pairs = []
    for _ in range(rounds):
        pair = []
        for step in (ours, other):
            if sizes.ON_GPU:
                torch.cuda.empty_cache()
            step()
            pair.append(timed(step, steps))
        pairs.append(pair)
    own, theirs = (statistics.median(time for pair in pairs for time in pair[way]) for way in (0, 1))
    ratio = statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)
    return own, theirs, ratio


class ReadyStep:
    """A run as `flperf train` builds it, on one batch of clips that stays on the device."""

    def __init__(self, regime: str, section, *overrides: str, mode: str = "split"):
        self.ours = OurStep(configuration(regime, "drawn", mode, section.folder, *overrides))
        self.run, self.meter = self.ours.run, self.ours.meter
        stream = prefetch_to_device(self.ours.batches, self.run.process.device)
        self.batch = next(stream)
        self.held = repeat(self.copied(self.batch))
        stream.close()
        for _ in range(2):  # compiles
            self()

    @staticmethod
    def copied(batch: ClipBatch) -> ClipBatch:
        """The batch in memory of its own, since a stream's is used again."""
        batch.video = batch.video.clone()
        return batch

    def __call__(self) -> None:
        loop.train_step(self.run, self.held, self.meter)

    def videos(self) -> Iterator[torch.Tensor]:
        """Its clips, uint8 `b f h w c`, without end."""
        return repeat(self.batch.video)


def pause() -> None:
    """Between ways: threads that were told to stop do so, and garbage is collected, then frozen as in training."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    if not sizes.QUICK:
        time.sleep(0.3)


def free() -> None:
    """Give the device's memory back; engines hold themselves in reference cycles."""
    gc.unfreeze()
    gc.collect()
    if sizes.ON_GPU:
        torch.cuda.empty_cache()
