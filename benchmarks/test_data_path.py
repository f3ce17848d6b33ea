"""The cost of data in a training step, from video, cached latents or clips in memory; and the speed of reading cached
latents.

    python -m pytest benchmarks/test_data_path.py

Data-path efficiency is the time of a step on clips in memory divided by that of a step on video: 1 means that clips are
always decoded before they are needed. `cat` of the same shards to /dev/null shows what disk and page cache can give.
"""

import itertools
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks.recording import MIN_ROUNDS
from benchmarks.sizes import QUICK
from benchmarks.training_step import training_run
from flperf.commands.latent_writer import encode_dataset
from flperf.config import Config, load_config
from flperf.data import BatchShare, latent_shards
from flperf.data.annotations import Annotations
from flperf.data.demo import write_demo
from flperf.data.loader import load_batches
from flperf.data.prefetch import prefetch_to_device
from flperf.data.samplers import Batches, TrainingSampler
from flperf.data.shard_cache import ShardReader, Shards, open_shards
from flperf.engine.optimizer import set_schedule
from flperf.engine.process import batch_share, start_process
from flperf.run import build_components, flops_per_clip
from flperf.training import loop
from flperf.training.step_meter import StepMeter

DEMO = Path(__file__).parents[1] / "configs/demo.yaml"
STEPS = 1 if QUICK else 10
BATCH, AHEAD = 8, 2  # clips of 4 MiB, batches read ahead


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo's videos, and their latents."""
    folder = tmp_path_factory.mktemp("data_path")
    write_demo(folder / "demo")
    encode_dataset(configuration(folder, "video"), start_process(), folder / "latents", as_files=False)
    return folder


def configuration(folder: Path, source: str) -> Config:
    csv = {"video": "demo/train.csv", "cache": "latents/train/manifest.csv"}[source]
    kind = {"video": "kinetics_400", "cache": "kinetics_400_cached"}[source]
    keys = [f"dataset.kind={kind}", f"dataset.train={folder / csv}", "dataset.validation=null", "dataset.labels=null"]
    return load_config(
        DEMO, [*keys, "latents.statistics_clips=16", f"experiment={folder}", f"engine.compile={not QUICK}"]
    )


class Steps:
    """A run of the demo, and its steps on one source of batches."""

    def __init__(self, folder: Path, source: str):
        config = configuration(folder, "cache" if source == "cached latents" else "video")
        process = start_process()
        components = build_components(config, process, batch_share(config.trainer, process))
        self.stream = prefetch_to_device(
            components.dataset.train_batches(0, components.share, process.device), process.device
        )
        batch = next(self.stream)
        self.run = training_run(components, batch)
        self.batches = itertools.repeat(batch) if source == "video, decoded before" else self.stream
        self.meter = StepMeter(self.run)

    def __call__(self) -> None:
        for step in range(STEPS):
            set_schedule(self.run.engine, step, self.run.config.trainer, 1000)
            loop.train_step(self.run, self.batches, self.meter)


@pytest.mark.benchmark(group="training step of the demo, by source")
def test_step(record, folder):
    """The ratio to clips decoded before is the data path's efficiency."""
    sources = {source: Steps(folder, source) for source in ("video", "video, decoded before", "cached latents")}
    run = sources["video"].run
    clips = STEPS * run.share.batch_size
    beside = {source: steps for source, steps in sources.items() if source != "video"}
    # Before each turn the streams read ahead again, as they do in a run whose step takes longer than its data.
    record(
        sources["video"], "clips", clips, flops=clips * sum(flops_per_clip(run).values()), dtype=run.dtype,
        rounds=MIN_ROUNDS, beside=beside, before=lambda _: time.sleep(0.5),
    )  # fmt: skip
    for steps in sources.values():
        steps.stream.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    """1 GiB of latents, of the shape that a V-JEPA 2 of width 1024 gives for 16 frames of 256 x 256."""
    folder, shape = tmp_path_factory.mktemp("shards"), (8, 16, 16, 1024)
    config = Config()
    config.dataset.n_frames, config.model.num_context_latents = 16, 4
    about = latent_shards.identity(config, 4, 4)
    length = BATCH if QUICK else latent_shards.clips_per_shard(shape, torch.bfloat16)
    for number in range(4):
        latents = torch.randn(length, *shape, dtype=torch.bfloat16)
        latent_shards.write_shard(
            latent_shards.shard_path(folder, number), torch.arange(length) + number * length, latents, about
        )
    names = [str(clip) for clip in range(4 * length)]
    latent_shards.write_manifest(folder, Annotations(names, [0] * len(names)), length)
    return open_shards(str(folder / latent_shards.MANIFEST), config, None)[0]


def cat(shards: Shards) -> None:
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, shards.files)], stdout=nowhere, check=True)


def stream(shards: Shards) -> Batches:
    sampler, device = TrainingSampler(len(shards.rows), 0), torch.device("cpu")
    requests, threads = sampler.batches(0, BatchShare(0, 1, BATCH, BATCH)), len(os.sched_getaffinity(0))
    batches = load_batches(ShardReader(shards), requests, sampler, [0] * sampler.size, threads, AHEAD, device)
    return prefetch_to_device(batches, device)


def forget(shards: Shards) -> None:
    """Drop the shards from the page cache."""
    for path in shards.files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_read(benchmark, record, shards, state):
    """Cold, each round starts a new stream; warm, one stream continues, as in training."""
    benchmark.group = f"1 GiB of cached latents, {state}"
    batches, clips = stream(shards), len(shards.rows)

    def before(_) -> None:
        nonlocal batches
        if state == "cold":
            batches.close()
            forget(shards)
            batches = stream(shards)
        else:
            time.sleep(0.2)  # until the stream has read ahead

    def read() -> None:
        for _ in range(clips // BATCH + (AHEAD if state == "warm" else 0)):  # not counting those read ahead
            next(batches)

    size = clips * latent_shards.row_bytes(shards.shape, shards.dtype)
    record(read, "clips", clips, bytes=size, rounds=7, beside={"cat": lambda: cat(shards)}, before=before)
    batches.close()
