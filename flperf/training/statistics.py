"""The statistics of a run's latents and its baselines: measured once on the first training clips, then kept in the
run's folder."""

import math
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from flperf.models.baselines import Baselines, LatentSample, load_statistics, save_statistics
from flperf.models.latents import Statistics
from flperf.run import Components


def latent_statistics(components: Components, path: Path) -> tuple[Statistics, Baselines]:
    """Read the file, or measure and write it if it does not exist. A collective."""
    if not path.exists():
        measured = _measure(components)
        if components.process.is_main:
            save_statistics(path, *measured)
    dist.barrier()
    return load_statistics(path, components.process.device)


def _measure(components: Components) -> tuple[Statistics, Baselines]:
    config, dataset, share, process = components.config, components.dataset, components.share, components.process
    sample = LatentSample(config.latents.embedding_norm, components.geometry, process.device)
    batches = dataset.train_batches(0, share, process.device)
    clips = min(config.latents.statistics_clips, dataset.train_size)
    rounds = math.ceil(clips / (share.micro_batch_size * share.world_size))
    for _ in tqdm(range(rounds), desc="latent statistics", leave=False, disable=None if process.is_main else True):
        batch = next(batches)
        sample.add(*components.raw_latents(batch), batch.sample)
    batches.close()
    return sample.result(dataset.channel_statistics)
