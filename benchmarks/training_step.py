"""Builds whole training steps, ours and the usual way, for benchmarks of their time and memory.

python -m benchmarks.training_step predictor drawn "ours, split"     # peak memory of this process, in bytes
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import sizes
from benchmarks.memory import peak_memory_bytes
from benchmarks.usual_way import UsualStep, latent_batches
from flperf.commands.latent_writer import encode_dataset
from flperf.config import Config
from flperf.data.samplers import ClipBatch
from flperf.engine.optimizer import set_schedule
from flperf.engine.process import batch_share, start_process
from flperf.models.baselines import LatentSample
from flperf.run import Components, TrainingRun, build_components, build_training_engine, evaluation_share
from flperf.training import loop
from flperf.training.step_meter import StepMeter

Step = Callable[[], object]
USUAL = {"usual, fp32": False, "usual, bf16 autocast": True}  # name -> autocast
CLIPS = 16  # in the cache of latents


def configuration(regime: str, source: str, mode: str, folder: Path, *overrides: str) -> Config:
    """A configuration for `source`: "drawn" (clips of moving shapes, encoded in the step), "video" (the demo's files,
    written on first use) or "cache" (latents that `write_cache` has written to the folder).

    It keeps no moving average, because the usual way does not.
    """
    clips = [
        f"dataset.shapes.train_clips={CLIPS}",
        "dataset.shapes.validation_clips=0",
        f"latents.statistics_clips={sizes.BATCH}",
    ]
    files = {
        "drawn": [],
        "video": ["dataset.kind=demo", f"dataset.train={folder}/demo/train.csv", "dataset.validation=null"],
        "cache": [
            "dataset.kind=kinetics_400_cached",
            f"dataset.train={folder}/{mode}/train/manifest.csv",
            "dataset.validation=null",
        ],
    }
    clips += ["engine.compile=false"] if sizes.QUICK else []
    keys = [*clips, f"backbone.encode={mode}", "trainer.ema_decay=null", f"experiment={folder}", "dataset.labels=null"]
    return sizes.configuration(regime, "vjepa2", *keys, *files[source], *overrides, size=sizes.STEP_SIZE)


def write_cache(folder: Path) -> None:
    """Write the latents of the drawn clips: as shards with `encode: split`, and as FutureLatents' files with
    `encode: joint`."""
    process = start_process()
    for mode, name, as_files in (("split", "split", False), ("joint", "files", True)):
        config = configuration("predictor", "drawn", mode, folder, "engine.compile=false")
        encode_dataset(config, process, folder / name, as_files=as_files)


def training_run(components: Components, batch: ClipBatch) -> TrainingRun:
    """The run of these components with the statistics of one batch, and an engine."""
    latents = LatentSample("standardize", components.geometry, components.process.device)
    latents.add(*components.raw_latents(batch), batch.sample)
    run = components.with_statistics(*latents.result(components.dataset.channel_statistics))
    return TrainingRun(**vars(run), engine=build_training_engine(components))


class OurStep:
    """A run as `flperf train` builds it. Calling it takes one step."""

    def __init__(self, config: Config):
        process = start_process()
        components = build_components(config, process, batch_share(config.trainer, process))
        self.batches = components.dataset.train_batches(0, components.share, process.device)
        self.run = training_run(components, next(self.batches))
        self.meter = StepMeter(self.run)
        set_schedule(self.run.engine, 0, config.trainer, config.trainer.max_steps)

    def __call__(self) -> None:
        loop.train_step(self.run, self.batches, self.meter)


def ours(regime: str, source: str, mode: str, folder: Path, *overrides: str) -> OurStep:
    return OurStep(configuration(regime, source, mode, folder, *overrides))


def usual(run: Components, source: str, folder: Path, autocast: bool) -> UsualStep:
    """The usual way, with clips from the same source."""
    device = run.process.device
    if source == "cache":
        batches = latent_batches(
            folder / "files/train/manifest.csv", run.share.batch_size, len(os.sched_getaffinity(0))
        )
    else:
        batches = (batch.video for batch in run.dataset.train_batches(0, run.share, device))
    return UsualStep(run.config, run.geometry, batches, device, autocast)


def build(regime: str, source: str, variant: str, folder: Path) -> Step:
    if variant in USUAL:
        config, process = configuration(regime, source, "joint", folder), start_process()
        components = build_components(config, process, evaluation_share(config, process))
        return usual(components, source, folder, USUAL[variant])
    return ours(regime, source, variant.removeprefix("ours, "), folder)


def main(regime: str, source: str, variant: str, folder: str = ".", *size: str) -> None:
    if size == ("quick",):
        sizes.be_quick()
    step = build(regime, source, variant, Path(folder))
    for _ in range(2):
        step()
    print(peak_memory_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
