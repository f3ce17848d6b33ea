"""The training step on clips that are ready, beside readers, on video files by each way, and on cached latents.

Each way is compared with a few steps on ready clips just before it. Its batches that were read ahead are taken before
it is timed, so that a reader that can't keep up shows at once.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch

from benchmarks import sizes
from benchmarks.gpu.readers import READERS, reading
from benchmarks.gpu.section import Section
from benchmarks.gpu.turns import ReadyStep, free, pause, timed
from benchmarks.gpu.videos import video_configuration, write_kinds
from benchmarks.training_step import configuration
from flperf.config import Config
from flperf.data import open_dataset
from flperf.data.annotations import Annotations
from flperf.data.cores import reading_cores
from flperf.data.latent_shards import MANIFEST, identity, shard_path, write_manifest, write_shard
from flperf.data.prefetch import prefetch_to_device
from flperf.data.preprocessing import Preprocessing
from flperf.run import TrainingRun
from flperf.training import loop
from flperf.training.step_meter import StepMeter

BESIDE_RATE = 23.0  # clips a second that readers beside the step read: what the DiT's step takes on an H100
DECODERS = {"dit": ("auto", "pyav", "dali"), "predictor": ("auto",)}
CACHED_CLIPS = 32

Way = Callable[[], AbstractContextManager[tuple[Callable[[], object], StepMeter]]]  # its step, and what times that


def measure(section: Section) -> None:
    paths = write_kinds(section.folder)
    for regime in ("dit", "predictor"):
        section.attempt(f"step, {regime}", partial(measure_regime, section, regime, paths))
        free()


def measure_regime(section: Section, regime: str, paths: dict[str, list[str]]) -> None:
    start = time.monotonic()
    ready = ReadyStep(regime, section)
    section.results.note(section.name, f"{regime}: first steps after {time.monotonic() - start:.0f} s")
    compare = Comparison(section, regime, ready)
    original, *_, prepared = paths
    config = video_configuration(regime, paths[original], section.folder)
    for readers in READERS:
        way = partial(beside_readers, readers, config, paths[original], ready)
        compare(f"readers beside, {readers}", way)
    for kind in (original, prepared):
        for decoder in DECODERS[regime]:
            config = video_configuration(regime, paths[kind], section.folder, f"dataset.decoder={decoder}")
            compare(f"{kind}, {decoder}", partial(on_dataset, config, ready.run))
    if regime == "dit":
        keys = ["dataset.decoder=pyav", "dataset.threads=2"]  # what a machine of four cores leaves for reading
        config = video_configuration(regime, paths[prepared], section.folder, *keys)
        compare(f"{prepared}, pyav, 2 readers", partial(on_dataset, config, ready.run))
    compare("cached latents", lambda: on_dataset(cached_configuration(section, regime, ready.run), ready.run))
    compare("ready clips again", lambda: steps_of(ready))


class Comparison:
    """Times ways to get clips, each after some steps on ready clips, and writes a row for each."""

    def __init__(self, section: Section, regime: str, ready: ReadyStep):
        self.section, self.regime, self.ready = section, regime, ready
        self.ready_steps, self.steps, self.warm_up = (1, 2, 1) if sizes.QUICK else (3, 8, 2)

    def __call__(self, name: str, way: Way) -> None:
        measured = partial(self._measure, name, way)
        self.section.attempt(f"{self.regime}, {name}", measured, needs=0 if sizes.QUICK else 8)

    def _measure(self, name: str, way: Way) -> None:
        pause()
        ready = timed(self.ready, self.ready_steps)
        with way() as (step, meter):
            timed(step, self.warm_up)
            meter.timer.spans.clear()
            taken = timed(step, self.steps)
            stages = meter.timer.read(self.steps)
        ms, ready_ms = statistics.mean(taken), statistics.median(ready)
        self.section.row(
            f"step, {self.regime}", name,
            ms=statistics.median(taken), mean_ms=ms, clips_per_s=1e3 * sizes.BATCH / ms, ready_ms=ready_ms,
            speed_to_ready=ready_ms / ms, waiting_ms=stages["data_ms"], encode_ms=stages["encode_ms"],
        )  # fmt: skip


@contextmanager
def steps_of(ready: ReadyStep) -> Iterator[tuple[Callable[[], object], StepMeter]]:
    yield ready, ready.meter


@contextmanager
def beside_readers(way: str, config: Config, paths: list[str], ready: ReadyStep):
    """Steps on ready clips, while files are read at a fixed rate, in threads or processes, and dropped."""
    workers = 2 if sizes.QUICK else reading_cores(sizes.DEVICE)[0]
    with reading(READERS[way](config, paths), len(paths), workers, BESIDE_RATE):
        yield ready, ready.meter


@contextmanager
def on_dataset(config: Config, run: TrainingRun):
    """Steps of a run on the clips of another dataset; the batches that were read ahead have been taken."""
    latents = config.dataset.kind == "kinetics_400_cached"
    dataset = open_dataset(config, None if latents else Preprocessing.of(config.backbone), config.seed)
    run = replace(run, dataset=dataset, encoder=None if latents else run.encoder)
    device = run.process.device
    batches = prefetch_to_device(dataset.train_batches(0, run.share, device), device)
    meter = StepMeter(run)
    try:
        drain(batches)
        yield partial(loop.train_step, run, batches, meter), meter
    finally:
        batches.close()


def drain(batches: Iterator, seconds: float = 4.0) -> None:
    """Take more batches than are read ahead, for some seconds at most."""
    end = time.monotonic() + (0.3 if sizes.QUICK else seconds)
    for _ in range(8):
        next(batches)
        if time.monotonic() > end:
            break


def cached_configuration(section: Section, regime: str, run: TrainingRun) -> Config:
    """A configuration that reads latents from shards, which are written here: random ones of the right shape."""
    folder = section.folder / f"latents_{regime}"
    config = configuration(regime, "drawn", "split", section.folder)
    geometry, count = run.geometry, 2 * sizes.BATCH if sizes.QUICK else CACHED_CLIPS
    frames = geometry.context_frames + geometry.target_frames
    shape = (frames, geometry.height, geometry.width, geometry.dim)
    about = identity(config, geometry.context_frames, geometry.target_frames)
    if not (folder / MANIFEST).exists():
        folder.mkdir()
        latents = torch.randn(count, *shape, device=run.process.device).to(run.dtype).cpu()
        write_shard(shard_path(folder, 0), torch.arange(count), latents, about)
        write_manifest(folder, Annotations([str(clip) for clip in range(count)], [0] * count), count)
    keys = ["dataset.kind=kinetics_400_cached", f"dataset.train={folder / MANIFEST}", "dataset.validation=null"]
    return configuration(regime, "drawn", "split", section.folder, *keys)
