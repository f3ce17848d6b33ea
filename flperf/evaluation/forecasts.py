"""Writes forecasts of validation clips: one safetensors file with all samples, and a folder of pictures per clip.

This is the work of `flperf sample`. It is apart from the command's parser so that mistakes in the arguments are
reported before torch is loaded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flperf.config import Dataset as DatasetConfig
from flperf.data.unreadable import NONE_USABLE, BadClip
from flperf.errors import UserError
from flperf.evaluation.visualise import Example, write_example
from flperf.files import atomic_file
from flperf.objectives.build import forecast
from flperf.run import Run


@dataclass(frozen=True)
class Pace:
    """The times of forecast latent frames, in seconds after the last video frame of the context.

    Latent frame k ahead, counted from 0, is computed from `covered` video frames of the clip, the first of the
    `per_latent` frames from one latent frame to the next. Its time is that of the last of these, frame
    k per_latent + covered after the context.
    """

    interval: float  # seconds from one frame of the clip to the next
    per_latent: int
    covered: int

    def seconds_ahead(self, frames: int) -> list[float]:
        """The times of the first `frames` forecast latent frames."""
        return [(frame * self.per_latent + self.covered) * self.interval for frame in range(frames)]

    def frames_for(self, seconds: float) -> int:
        """The number of latent frames until the time is at least `seconds`."""
        return 1 + max(0, math.ceil((seconds / self.interval - self.covered) / self.per_latent - 1e-9))


@torch.no_grad()
def write_forecasts(run: Run, out: Path, clips: int, frames: int | None, seconds: float | None) -> str:
    """Forecast the first `clips` validation clips; returns a line that describes what was written.

    forecasts.safetensors holds forecast `n k t h w d`, context and target `n t h w d` (all normalised), clip int64 [n]
    (rows of the validation split) and, if the frame rates of the files are known, seconds [n t]. Raises `UserError` if
    there are no validation clips, or if `seconds` is given and the frame rates are unknown.
    """
    clips = min(clips, run.dataset.validation_size)
    if not clips:
        raise UserError("dataset.validation: is not set; forecasts are made of validation clips")
    paces = clip_paces(run, clips)
    if seconds is not None:
        if paces is None:
            kind = run.config.dataset.kind
            raise UserError(f"--seconds: clips of dataset.kind {kind!r} have no frame rate; use --frames")
        frames = max(pace.frames_for(seconds) for pace in paces)
    tensors, videos = _forecasts(run, clips, frames)
    if not len(tensors["clip"]):
        raise UserError(f"dataset.validation: {NONE_USABLE}")
    if paces is not None:
        ahead = tensors["forecast"].shape[2]
        tensors["seconds"] = torch.tensor([paces[clip].seconds_ahead(ahead) for clip in tensors["clip"].tolist()])
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "forecasts.safetensors") as unfinished:
        save_file(tensors, unfinished)
    baselines = run.baselines.to(torch.device("cpu"))
    for row, clip in enumerate(tensors["clip"].tolist()):
        context, samples, target = (tensors[name][row].float() for name in ("context", "forecast", "target"))
        write_example(out / f"clip_{clip:05d}", Example(context, samples[0], target, videos[clip], baselines))
    count, k, ahead = tensors["forecast"].shape[:3]
    return f"{out / 'forecasts.safetensors'}: {count} clips, {k} samples each, {ahead} latent frames ahead"


def _forecasts(run: Run, clips: int, frames: int | None) -> tuple[dict[str, Tensor], dict[int, Tensor | None]]:
    """Tensors of the readable clips by name, and their videos by row of the validation split, all on the CPU."""
    parts, videos = [], {}
    for batch in run.dataset.chosen_batches(
        [range(clips)], run.share.micro_batch_size, "validation", run.process.device
    ):
        context, target = run.latents(batch)
        samples = forecast(run.objective, run.forecaster, context, batch.sample.to(run.process.device), frames)
        kept = {"forecast": samples.to(run.dtype), "context": context, "target": target, "clip": batch.clip}
        parts.append({name: tensor[batch.valid].cpu() for name, tensor in kept.items()})
        for index in batch.valid.nonzero()[:, 0].tolist():
            videos[int(batch.clip[index])] = None if batch.video is None else batch.video[index].cpu()
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}, videos


def clip_paces(run: Run, clips: int) -> list[Pace] | None:
    """The times of forecasts of the first validation clips; None if clips are not video files."""
    if run.dataset.frame_rate is None or run.encoder is None:
        return None
    paths = run.dataset.splits["validation"].paths[:clips]
    intervals = [frame_interval(run.config.dataset, run.dataset.frame_rate, path) for path in paths]
    return [Pace(interval, run.encoder.frames_per_latent, run.encoder.frames_covered) for interval in intervals]


def frame_interval(dataset: DatasetConfig, frame_rate: Callable[[str], float], path: str) -> float:
    """Seconds from one frame of a file's clips to the next: exact with `dataset.fps`, else by the file's average frame
    rate. Infinite for an unreadable file, which is reported where it is decoded."""
    if dataset.fps:
        return 1 / dataset.fps
    try:
        return dataset.stride / frame_rate(path)
    except BadClip:
        return math.inf
