"""The cores that are really there, what a clip costs them, and clips a second by threads and by processes."""

import hashlib
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks import sizes
from benchmarks.gpu.readers import READERS, in_threads, rate_of, reading
from benchmarks.gpu.section import Section
from benchmarks.gpu.videos import PREPARED, video_configuration, write_kinds
from flperf.config import Config
from flperf.data.cores import cpu_quota, reading_cores
from flperf.data.samplers import TrainingSampler

WORKERS = (1, 4, 8, 14)


def measure(section: Section) -> None:
    section.attempt("cores", partial(count_cores, section))
    paths = write_kinds(section.folder)
    original = next(iter(paths))
    configurations = {
        kind: (video_configuration("predictor", paths[kind], section.folder), paths[kind])
        for kind in (original, PREPARED)
    }
    section.attempt("CPU ms a clip", partial(cost_of_clips, section, configurations))
    section.attempt("clips a second", partial(compare_workers, section, configurations))


def count_cores(section: Section) -> None:
    section.row("cores", "seen by Python", **seen())
    for threads, gain in busy_scaling().items():
        section.row("cores", f"{threads} busy threads", gain=gain)


def seen() -> dict[str, float | None]:
    """Cores by affinity and by the container's quota, those that read clips, and NUMA nodes."""
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return {
        "affinity": len(os.sched_getaffinity(0)),
        "quota": cpu_quota(),
        "machine": os.cpu_count(),
        "reading": reading_cores(sizes.DEVICE)[0],
        "nodes": nodes,
    }


def busy_scaling() -> dict[int, float]:
    """How many times as much work 2, 4, … threads do as one; the work holds no lock."""
    data, seconds = bytes(2**20), 0.05 if sizes.QUICK else 0.3

    def work(_: int) -> int:
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            hashlib.sha256(data).digest()
            count += 1
        return count

    counts = {}
    for threads in sorted({1, 2, 4, 8, len(os.sched_getaffinity(0))}):
        with ThreadPoolExecutor(threads) as pool:
            counts[threads] = sum(pool.map(work, range(threads)))
    return {threads: count / counts[1] for threads, count in counts.items()}


def cost_of_clips(section: Section, configurations: dict[str, tuple[Config, list[str]]]) -> None:
    """CPU milliseconds of this thread for a clip by PyAV, kinds of files in turns; medians."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    milliseconds: dict[str, list[float]] = {kind: [] for kind in configurations}
    readers = {kind: in_threads(config, paths) for kind, (config, paths) in configurations.items()}
    slots = {kind: torch.empty(reader.shape, dtype=torch.uint8) for kind, reader in readers.items()}
    sampler = TrainingSampler(min(len(paths) for _, paths in configurations.values()), 0)
    for request in map(sampler.request, range(3 if sizes.QUICK else 17)):
        for kind, reader in readers.items():
            start = time.thread_time()
            reader.read(request, slots[kind])
            milliseconds[kind].append(1e3 * (time.thread_time() - start))
    torch.set_num_threads(threads)
    for kind, times in milliseconds.items():
        section.row("one thread", kind, cpu_ms_a_clip=statistics.median(times[1:]))


def compare_workers(section: Section, configurations: dict[str, tuple[Config, list[str]]]) -> None:
    """Clips a second by threads of one process and by processes, in turns, twice."""
    seconds, warm_up, rounds = (0.2, 0.1, 1) if sizes.QUICK else (1.0, 0.3, 2)

    def compare(kind: str, count: int) -> None:
        config, paths = configurations[kind]
        rates: dict[str, list[float]] = {way: [] for way in READERS}
        for _ in range(rounds):
            for way, open_reader in READERS.items():
                running = reading(open_reader(config, paths), len(paths), count)
                rates[way].append(rate_of(running, seconds, warm_up))
        means = {way: sum(found) / rounds for way, found in rates.items()}
        ratio = means["threads"] / max(means["processes"], 1e-9)
        section.row("clips/s by workers", f"{kind}, {count}", **means, threads_to_processes=ratio)

    for kind in configurations:
        for count in (1, 2) if sizes.QUICK else WORKERS:
            needs = 2 * rounds * (seconds + warm_up)
            section.attempt(f"{count} workers, {kind}", partial(compare, kind, count), needs)
