"""Readers of clips whose output is dropped: in worker processes, as flperf reads, and in threads of this process."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

from benchmarks import sizes
from benchmarks.gpu.videos import reading_of
from flperf.config import Config
from flperf.data import BatchShare
from flperf.data.loader import Reader, load_batches
from flperf.data.pyav import PyAVReader
from flperf.data.samplers import TrainingSampler
from flperf.data.worker_messages import Reading
from flperf.data.workers import WorkerReader

FIRST_CLIP = 60.0  # seconds within which it has to come


def in_processes(config: Config, paths: list[str]) -> Reader:
    return WorkerReader(paths, Reading(*reading_of(config)), sizes.DEVICE)


def in_threads(config: Config, paths: list[str]) -> Reader:
    return PyAVReader(paths, *reading_of(config))


READERS: dict[str, Callable[[Config, list[str]], Reader]] = {"threads": in_threads, "processes": in_processes}


@contextmanager
def reading(reader: Reader, files: int, workers: int, rate: float | None = None) -> Iterator[list[int]]:
    """Read clips in the background, at `rate` a second or as fast as possible; yields the number of clips so far, a
    list of one. The first clip has come."""
    sampler = TrainingSampler(files, 0)
    requests = sampler.batches(0, BatchShare(0, 1, 1, 1))  # clips are counted one by one
    batches = load_batches(reader, requests, sampler, [0] * files, workers, 1, sizes.DEVICE)
    count, stop, first = [0], Event(), Event()

    def consume() -> None:
        start = time.monotonic()
        for batch in batches:
            batch.release()
            count[0] += 1
            first.set()
            if stop.is_set():
                break
            if rate:
                time.sleep(max(0.0, start + count[0] / rate - time.monotonic()))
        batches.close()

    thread = Thread(target=consume, daemon=True)
    thread.start()
    try:
        if not first.wait(FIRST_CLIP):
            raise TimeoutError(f"no clip came within {FIRST_CLIP:.0f} s")
        yield count
    finally:
        stop.set()
        thread.join()


def rate_of(running, seconds: float, warm_up: float) -> float:
    """Clips a second of a `reading` context, over some seconds after its first clip and a warm-up."""
    with running as count:
        time.sleep(warm_up)
        before, start = count[0], time.monotonic()
        time.sleep(seconds)
        return (count[0] - before) / (time.monotonic() - start)
