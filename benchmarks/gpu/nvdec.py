"""NVDEC through DALI: one lane in turns over kinds of files, then several lanes at once."""

import statistics
import time
from functools import partial

import torch

from benchmarks import sizes
from benchmarks.gpu.section import Section
from benchmarks.gpu.videos import PREPARED, reading_of, video_configuration, write_kinds
from flperf.config import Config
from flperf.data import BatchShare
from flperf.data.dali import DaliReader, Lane
from flperf.data.loader import load_batches
from flperf.data.prepared import remaining_preprocessing
from flperf.data.pyav import opened
from flperf.data.samplers import TrainingSampler
from flperf.data.worker_messages import Reading

LANES = (1, 4, 7)  # an H100 has seven decoders


def measure(section: Section) -> None:
    start = time.monotonic()
    paths = write_kinds(section.folder)
    section.results.note(section.name, f"files written in {time.monotonic() - start:.1f} s")
    configurations = {
        kind: (video_configuration("predictor", paths[kind], section.folder), paths[kind]) for kind in paths
    }
    section.attempt("one lane", partial(one_lane, section, configurations))
    for lanes in (1, 2) if sizes.QUICK else LANES:
        for kind, (config, files) in configurations.items():
            measured = partial(several_lanes, section, f"{kind}, {lanes}", config, files, lanes)
            section.attempt(f"{lanes} lanes, {kind}", measured, needs=0 if sizes.QUICK else 4)


def used_memory() -> int:
    """Bytes in use on the device, without what PyTorch has reserved; 0 without a GPU."""
    if not sizes.ON_GPU:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def one_lane(section: Section, configurations: dict[str, tuple[Config, list[str]]]) -> None:
    """Milliseconds that a lane takes for a clip, decoding alone and with resizing, kinds of files in turns; and the
    device memory that it takes."""
    if not sizes.ON_GPU:  # where DALI has no H.264
        configurations = {kind: found for kind, found in configurations.items() if kind != PREPARED}
    lanes = {kind: Lane(sizes.DEVICE) for kind in configurations}
    wall, decoding, memory, cpu = ({kind: [] for kind in lanes} for _ in range(4))
    for number in range(3 if sizes.QUICK else 10):
        for kind, (config, files) in configurations.items():
            frame_sampling, preprocessing = reading_of(config)
            path, uniform = files[number % len(files)], number / 10
            with opened(path) as file:
                preprocessing = remaining_preprocessing(preprocessing, file)
            indices = frame_sampling.frames(range(24 if sizes.QUICK else 300), uniform)
            shape = (len(indices), *preprocessing.size, 3)
            out = None if sizes.ON_GPU else torch.empty(shape, dtype=torch.uint8)
            before, begun, used = time.perf_counter(), time.process_time(), used_memory()
            lanes[kind].read(path, indices, number, preprocessing, None, out)
            wall[kind].append(1e3 * (time.perf_counter() - before))
            cpu[kind].append(1e3 * (time.process_time() - begun))
            memory[kind].append((used_memory() - used) / 1e6)
            before = time.perf_counter()
            lanes[kind].pipeline.decode(path, indices, number)
            if sizes.ON_GPU:
                torch.cuda.synchronize()
            decoding[kind].append(1e3 * (time.perf_counter() - before))
    for kind in lanes:
        section.row(
            "NVDEC, one lane", kind,
            ms_a_clip=statistics.median(wall[kind][1:]), cpu_ms=statistics.median(cpu[kind][1:]),
            decoding_ms=statistics.median(decoding[kind][1:]), first_ms=wall[kind][0],
            memory_mb=sum(memory[kind]), memory_of_the_last_mb=memory[kind][-1],
        )  # fmt: skip


def several_lanes(section: Section, row: str, config: Config, files: list[str], lanes: int) -> None:
    """Clips a second of several lanes at once, how many cores they use, and the memory that they take."""
    seconds, warm_up = (0.2, 0.3) if sizes.QUICK else (1.5, 0.7)
    sampler, reader = TrainingSampler(len(files), 0), DaliReader(files, Reading(*reading_of(config)), sizes.DEVICE)
    work, used = sampler.batches(0, BatchShare(0, 1, 1, 1)), used_memory()  # clips are counted one by one
    batches = load_batches(reader, work, sampler, [0] * len(files), lanes, 1, sizes.DEVICE)

    def take(seconds: float) -> int:
        end, clips = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            next(batches).release()
            clips += 1
        return clips

    next(batches).release()
    take(warm_up)
    start, begun = time.monotonic(), time.process_time()
    clips = take(seconds)
    wall, cpu = time.monotonic() - start, time.process_time() - begun
    section.row(
        "NVDEC lanes", row, clips_per_s=clips / wall, cores=cpu / wall, memory_mb=(used_memory() - used) / 1e6,
        by_pyav="; ".join(reader.warned),
    )  # fmt: skip
    batches.close()
